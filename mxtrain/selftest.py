"""`python -m mxtrain.env --selftest [FILE]`: what the owner of a GPU runs once, and sends back.

Bytes of quantize against the reference in every format, scale rule and rounding; GEMM against
float64 on 40 shapes for each backend that the GPU has, and for what `auto` takes; the block-scaled
instruction of 12.x by itself, register by register, against its emulation on the CPU; torch's own
scaled_mm on the same operands, where it takes them; and the quick suite of the benchmark, in a
checkout. Each part (mxtrain/selftest_parts.py) runs in a process of its own, so that a kernel that
hangs or breaks the CUDA context ends that part only, with the name of what it was at. FILE is one
JSON: the report of mxtrain.env, a list of parts with every figure, and the benchmark's own JSON.

Exit status: 0 where everything that ran passed, 1 where a part failed, 2 where FILE cannot be
written. What cannot run here is listed as not run, with the reason, and fails nothing; but a build
that has no code for a visible GPU fails the part build, and one that lacks the GEMM which the GPU
has tensor cores for fails gemm:cuda:auto, both with what to build.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from .formats import FORMATS, GEMM_BACKENDS
from .selftest_parts import FAILED, NOT_RUN, PASSED, steps

FILE = "mxtrain-selftest.json"
SCHEMA = 1
PART_SECONDS, BENCH_SECONDS = 600, 1800


# ---- one part, in a process of its own ----


def write_part(name: str, path: Path) -> None:
    """Run a part; each name and result goes to path as it comes, one line of JSON each."""
    with path.open("w") as file:
        for step in steps(name):
            print(json.dumps(step), file=file, flush=True)


def read_part(path: Path) -> tuple[list[dict], str]:
    """The results that write_part got to, and the name of the check that it did not finish."""
    results, started = [], ""
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            step = json.loads(line)
        except ValueError:  # cut off
            break
        started = step if isinstance(step, str) else ""
        if isinstance(step, dict):
            results.append(step)
    return results, started


def part_names(cuda: bool) -> list[str]:
    names = ["quantize:cpu", "gemm:cpu:cpu"]
    if cuda:
        block_scaled = [name for name, f in FORMATS.items() if f.bits != 6]
        names += ["quantize:cuda", *(f"gemm:cuda:{name}" for name in GEMM_BACKENDS)]
        names += [f"probe:{f}" for f in block_scaled]
        names += [f"scaled_mm:{f}" for f in block_scaled]
    return names


def _tail(text: str | bytes | None, lines: int = 3) -> str:
    text = text.decode(errors="replace") if isinstance(text, bytes) else text or ""
    return " | ".join(text.strip().splitlines()[-lines:])[:1000]


def _in_a_process(name: str) -> dict:
    """Run a part; what it answered, and where and how it ended if it did not get to its end."""
    start, ended = time.perf_counter(), ""
    root = str(Path(__file__).parent.parent)
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "results.jsonl"
        command = [sys.executable, "-m", "mxtrain.selftest", name, str(out)]
        try:
            done = subprocess.run(
                command, capture_output=True, timeout=PART_SECONDS,
                env={**os.environ, "PYTHONPATH": path},
            )  # fmt: skip
            error = done.stderr
            ended = f"exit status {done.returncode}" if done.returncode else ""
        except subprocess.TimeoutExpired as late:
            error, ended = late.stderr, f"not finished after {PART_SECONDS} s"
        results, started = read_part(out)
    part = {"part": name, "status": FAILED, "detail": "no results", "results": results}
    if ended:
        if started:
            results.append({"name": started, "status": FAILED, "detail": f"unfinished: {ended}"})
            ended += f" in {started}"
        part["detail"] = f"{ended}: {_tail(error)}"
    elif results:
        states = [r["status"] for r in results]
        if FAILED not in states:
            part["status"] = PASSED if PASSED in states else NOT_RUN
        part["detail"] = _summary(results)
    part["seconds"] = round(time.perf_counter() - start, 1)
    return part


def _summary(results: list[dict]) -> str:
    """The counts, and the worst figure or the first refusal."""
    ran = [r for r in results if r["status"] != NOT_RUN]
    failed = [r for r in ran if r["status"] == FAILED]
    text = f"{len(ran) - len(failed)} of {len(ran)}" if ran else results[0]["detail"][:150]
    shares = [r["of_bound"] for r in ran if "of_bound" in r and "float32" in r["name"]]
    if shares:
        text += f"; float32 out: at most {max(shares):.2g} of the error allowed"
    text += "".join(f"; {r['note']}" for r in ran if "note" in r)
    return text + (f"; first: {failed[0]['name']}" if failed else "")


def _bench(cuda: bool) -> dict:
    """The quick suite of the benchmark, which a checkout has beside the package."""
    part = {"part": "bench:quick", "status": NOT_RUN, "seconds": 0.0, "results": []}
    if not cuda:
        return {**part, "detail": "needs a GPU"}
    root = Path(__file__).parent.parent
    if not (root / "bench/suites.py").exists():
        return {**part, "detail": "no bench package here: run it in a checkout"}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "bench.json"
        command = [sys.executable, "-m", "bench", "run", "--suite", "quick", "--json", str(out)]
        try:
            done = subprocess.run(
                command, cwd=root, stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE, timeout=BENCH_SECONDS,
            )  # fmt: skip
            part["status"] = PASSED if done.returncode == 0 else FAILED
            part["detail"] = f"exit status {done.returncode}: {_tail(done.stderr, 1)}"
        except subprocess.TimeoutExpired:
            part |= {"status": FAILED, "detail": f"not finished after {BENCH_SECONDS} s"}
        if out.exists():
            part["json"] = json.loads(out.read_text())
    part["seconds"] = round(time.perf_counter() - start, 1)
    return part


def _build(unserved: Sequence[str]) -> dict:
    """Whether the build has code for every visible GPU; unserved names each that it lacks."""
    results = [{"name": text, "status": FAILED} for text in unserved]
    detail = "; ".join(unserved) or "has code for every visible GPU"
    status = FAILED if unserved else PASSED
    return {"part": "build", "status": status, "seconds": 0.0, "results": results, "detail": detail}


def run(
    path: Path, report: dict, cuda: bool, bench: bool = True, unserved: Sequence[str] = ()
) -> int:
    """Run everything, print a line a part, write the JSON; the exit status.

    cuda: whether the build has code for the GPU that "cuda" means; unserved: what to build for each
    visible GPU that it has none for, which is a failure.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        print(f"mxtrain.env: --selftest cannot write {path}: {error.strerror}", file=sys.stderr)
        return 2
    names = [*(["build"] if report["gpus"] else []), *part_names(cuda)]
    names += ["bench:quick"] if bench else []
    print(f"\nself test, {len(names)} parts")
    here, parts = {"build": lambda: _build(unserved), "bench:quick": lambda: _bench(cuda)}, []
    for name in names:
        print(f"  {name:<26}", end="", flush=True)
        part = here[name]() if name in here else _in_a_process(name)
        parts.append(part)
        print(f"{part['status'].upper():<9}{part['seconds']:>6} s  {part['detail']}", flush=True)
        data = {"schema": SCHEMA, "report": report, "parts": parts}
        path.write_text(json.dumps(data, indent=1) + "\n")  # each time: it may be interrupted
    if not cuda:
        print("  not run: all of CUDA, for want of a GPU that this build has code for")
    failed = [part["part"] for part in parts if part["status"] == FAILED]
    print(f"{'FAILED: ' + ', '.join(failed) if failed else 'passed'}; all figures are in {path}")
    return 1 if failed else 0


if __name__ == "__main__":
    write_part(sys.argv[1], Path(sys.argv[2]))
