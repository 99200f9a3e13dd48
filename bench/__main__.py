"""`python -m bench run | compare | plot | profile | list`.

Exit codes: 0 ok; 1 a row is slower than allowed, differs from the reference, or failed; 2 usage; 3
no GPU where one is needed.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from . import report
from .report import BadInput

OK, REGRESSION, USAGE, NO_GPU, INTERRUPTED = 0, 1, 2, 3, 130
SUITE_NAMES = ("quick", "full", "cpu")


class Progress:
    """A bar where stderr is a terminal and tqdm is installed, else one line a row."""

    def __init__(self, total: int, stream: TextIO) -> None:
        self.total, self.count, self.stream, self.bar = total, 0, stream, None
        if stream.isatty():
            try:
                from tqdm import tqdm

                self.bar = tqdm(total=total, file=stream, unit="row", leave=False)
            except ImportError:
                pass

    def begin(self, name: str) -> None:
        """A row starts."""
        if self.bar is not None:
            self.bar.set_description(name)

    def end(self, name: str, text: str) -> None:
        """A row is finished, or will not run."""
        self.count += 1
        line = f"[{self.count}/{self.total}] {name}  {text}"
        if self.bar is None:
            print(line, file=self.stream, flush=True)
        else:
            self.bar.write(line, file=self.stream)
            self.bar.update()

    def close(self) -> None:
        """Nothing more will be shown."""
        if self.bar is not None:
            self.bar.close()


def listed(values: Sequence[str] | None) -> list[str]:
    """The words of options that take commas, spaces, or both."""
    return [word for value in values or () for word in value.split(",") if word]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(
        dest="command", required=True, metavar="run|compare|plot|profile|list"
    )
    run = commands.add_parser("run", help="measure, print a table, write JSON")
    run.add_argument("--suite", choices=SUITE_NAMES, default="quick", help="default: %(default)s")
    run.add_argument("--json", type=Path, metavar="FILE", help="where to write the measurements")
    run.add_argument(
        "--seconds", type=float, metavar="S", help="sampling time of a row (default: 0.3; cpu 0.5)"
    )
    show = commands.add_parser("list", help="the rows of a suite")
    show.add_argument("--suite", choices=SUITE_NAMES, help="default: all of them")
    for command in (run, show):
        command.add_argument(
            "--ops", nargs="+", metavar="OP", help="only these families, name prefixes or globs"
        )
        command.add_argument(
            "--shapes", nargs="+", metavar="RxC", help="in place of the suite's own matrix shapes"
        )
    compare = commands.add_parser("compare", help="two JSON files, row by row")
    compare.add_argument("a", type=Path, metavar="A.json", help="the baseline")
    compare.add_argument("b", type=Path, metavar="B.json")
    compare.add_argument(
        "--fail-above", metavar="PCT", help="exit with 1 where a row of B is more percent slower"
    )
    profile = commands.add_parser("profile", help="the device time of one row by kind of kernel")
    profile.add_argument(
        "row", metavar="ROW", help="such as train/gpt/tetrajet/24x1024/16x1024/step"
    )
    profile.add_argument("--calls", type=int, default=3, metavar="N", help="default: %(default)s")
    plot = commands.add_parser("plot", help="roofline and bars as PNG")
    plot.add_argument("file", type=Path, metavar="FILE.json")
    plot.add_argument("-o", "--out", type=Path, required=True, metavar="DIR")
    return top


def command_run(args: argparse.Namespace) -> int:
    """Measure a suite."""
    if args.json:
        report.check_writable(args.json)
    if args.seconds is not None and not 0 < args.seconds < 3600:
        raise BadInput(f"--seconds must be between 0 and 3600, got {args.seconds}")
    import torch

    on_gpu = args.suite != "cpu"
    if on_gpu and not torch.cuda.is_available():
        print(
            f"bench: suite {args.suite} needs a CUDA GPU and torch sees none; "
            "`python -m bench run --suite cpu` runs without",
            file=sys.stderr,
        )
        return NO_GPU
    cases = plan(args.suite, args)
    from . import machine, runner, timing

    timer = timing.CudaTimer() if on_gpu else timing.CpuTimer()
    seconds = args.seconds or (0.3 if on_gpu else 0.5)
    env = machine.environment(timer.device)
    env["suite"] = {"name": args.suite, "ops": listed(args.ops), "shapes": listed(args.shapes)}
    env["date"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    uuid = machine.uuid_of(timer.device)
    env["gpu_before"] = machine.gpu_state(uuid) if on_gpu else {}
    progress = Progress(len(cases), sys.stderr)
    try:
        outcome = runner.Session(cases, timer, seconds, progress).run()
    finally:
        progress.close()
    env["gpu_after"] = machine.gpu_state(uuid) if on_gpu else {}
    data = report.document(env, outcome)
    print(report.table(data))
    if args.json:
        report.write(args.json, data)
    if outcome.interrupted:
        print("bench: interrupted; the rows above are all that was measured", file=sys.stderr)
        return INTERRUPTED
    if outcome.wrong or outcome.failed:
        names = [*outcome.wrong, *(name for name, _ in outcome.failed)]
        print(f"bench: wrong or failed: {', '.join(names)}", file=sys.stderr)
        return REGRESSION
    return OK


def plan(suite: str, args: argparse.Namespace) -> list:
    """The cases that --ops and --shapes leave of a suite."""
    try:
        from . import suites
    except ImportError as error:  # mxtrain says what to do about it
        raise BadInput(str(error)) from error
    try:
        return suites.plan(suite, listed(args.ops), listed(args.shapes))
    except ValueError as error:
        raise BadInput(str(error)) from error


def command_list(args: argparse.Namespace) -> int:
    """Print the rows of the suites."""
    for suite in [args.suite] if args.suite else SUITE_NAMES:
        print(f"{suite}:")
        for case in plan(suite, args):
            counted = f"{case.bytes / 1e6:.1f} MB" if case.bytes and not case.flops else ""
            counted = f"{case.flops / 1e9:.0f} GFLOP" if case.flops else counted
            print(f"  {case.name:<58}{counted:>12}")
    return OK


def command_compare(args: argparse.Namespace) -> int:
    """Compare two files."""
    limit = None
    if args.fail_above is not None:
        try:
            limit = float(args.fail_above.removesuffix("%"))
        except ValueError:
            limit = -1.0
        if not 0 <= limit < float("inf"):
            raise BadInput(f"--fail-above must be a percentage of 0 or more, got {args.fail_above}")
    text, worse = report.compare(report.read(args.a), report.read(args.b), limit)
    print(text)
    if limit is not None and worse:
        print(f"bench: {len(worse)} of the rows are worse: {', '.join(worse)}", file=sys.stderr)
        return REGRESSION
    return OK


def command_profile(args: argparse.Namespace) -> int:
    """Profile one row."""
    if not 1 <= args.calls <= 1000:
        raise BadInput(f"--calls must be between 1 and 1000, got {args.calls}")
    from .cases import build
    from .profile import profile

    try:
        case = build(args.row)
    except ValueError as error:
        raise BadInput(str(error)) from error
    print(profile(case, args.calls))
    return OK


def command_plot(args: argparse.Namespace) -> int:
    """Draw a file."""
    data = report.read(args.file)
    try:
        from . import plot
    except ImportError as error:
        raise BadInput(f"plot needs matplotlib ({error}): pip install 'mxtrain[bench]'") from error
    if args.out.exists() and not args.out.is_dir():
        raise BadInput(f"-o {args.out}: must be a folder")
    for path in plot.draw(data, args.out, args.file.stem):
        print(path)
    return OK


COMMANDS = {
    "run": command_run,
    "compare": command_compare,
    "plot": command_plot,
    "profile": command_profile,
    "list": command_list,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    try:
        args = parser().parse_args(argv)
    except SystemExit as stop:  # argparse has printed its message, or --help
        return stop.code if isinstance(stop.code, int) else USAGE
    try:
        return COMMANDS[args.command](args)
    except BadInput as error:
        print(f"bench: {error}", file=sys.stderr)
        return USAGE
    except BrokenPipeError:  # `... | head`; the redirection keeps Python quiet at its exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except KeyboardInterrupt:
        print("bench: interrupted", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
