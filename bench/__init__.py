"""The microbenchmark suite: `python -m bench run | compare | plot | profile | list`, from the
repository root.

cases.py says what is measured, peers.py what it is measured against, timing.py how, runner.py turns
cases into rows; report.py prints and compares the JSON files, plot.py draws them.
"""
