"""Train the rows of the results table on every GPU of a machine, and write the table.

    python examples/study.py run --plan main --gpus 0 1 2 3 --budget 540 --out runs/study
    python examples/study.py run --runs gpt/bf16@0 gpt/tetrajet@0 --out runs/study
    python examples/study.py run --plan repeat --gpus 0 --out runs/repeat
    python examples/study.py report --out runs/repeat --against docs/study.json \\
        --repeats docs/study-repeat.json docs/study-fixed-order.json
    python examples/study.py list

`run` keeps one process for each GPU (more with --per-gpu) and gives it one run after another, those
of a row together. Every finished run is in DIR/results.json at once; runs that are in it already,
or in a file of --done, are not made again, and refused where they were made in a fixed order of
addition and are not asked for so, or the other way round. No run begins that would not end within
--budget seconds, by the time that others took (--expect at first); at its end what still runs is
stopped, and table.md is written. `report` writes it again, with a figure of the learning curves for
each part of it; with --against it prints beside each run what another results file has, and whether
the weights ended in the same bits; --repeats names files of runs that were made again, by which a
gap's spread is at least that from a run to its repetition. Runs of the plan `repeat` add in a fixed
order, as all do with --deterministic, so that a second time ends in the same bits.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from typing import Any, TextIO

STARTED = time.monotonic()  # the budget counts from here: the imports take seconds

from checkpoint import BadInput  # noqa: E402
from fixed_order import ENVIRONMENT  # noqa: E402
from study_report import comparison, read_results, write_report, write_results  # noqa: E402
from study_rows import DETERMINISTIC, PLANS, ROWS  # noqa: E402

Fields = dict[str, Any]
HERE = os.path.dirname(os.path.abspath(__file__))
SILENCE = 300.0  # seconds without a word after which a worker is given up
MARGIN = 8.0  # seconds of the budget that the report and the end of the workers take
TRIES = 2  # of a run that fails; the second without torch.compile


@dataclass
class Job:
    run: str  # "task/row@seed"
    options: str
    compile: bool
    tries: int = 0

    @property
    def row(self) -> str:
        return self.run.rpartition("@")[0]


@dataclass
class Worker:
    """A process that trains, and what it is doing."""

    index: int
    process: subprocess.Popen[str]
    job: Job | None = None
    last: str | None = None  # the row that it has compiled
    started: float = 0.0
    heard: float = field(default_factory=time.monotonic)
    ready: bool = False

    def give(self, job: Job) -> None:
        now = time.monotonic()
        self.job, self.started, self.heard = job, now, now
        line = {"run": job.run, "options": job.options, "compile": job.compile and job.tries == 0}
        with contextlib.suppress(OSError):  # it has died, as the end of its output will say
            self.process.stdin.write(json.dumps(line) + "\n")
            self.process.stdin.flush()

    def kill(self) -> None:
        """The process and the compilers that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Study:
    """The queue of runs, the workers and the results."""

    def __init__(self, args: argparse.Namespace, started: float) -> None:
        self.args = args
        self.deadline = started + args.budget - MARGIN
        self.results_path = os.path.join(args.out, "results.json")
        self.records = read_results([self.results_path, *args.done])
        done = {r["run"]: bool(r.get("deterministic")) for r in self.records}
        for run in args.runs:
            if done.get(run, run in args.fixed) != (run in args.fixed):
                wanted, got = ("with", "without") if run in args.fixed else ("without", "with")
                raise BadInput(
                    f"--out and --done must hold {run} {wanted} --deterministic, as it is asked "
                    f"for, got it {got}. Choose another --out, and leave its file out of --done."
                )
        fixed = " ".join([*args.options.split(), "--deterministic"])
        self.jobs = [
            Job(run, fixed if run in args.fixed else args.options, not args.no_compile)
            for run in args.runs
            if run not in done
        ]
        self.events: queue.Queue[tuple[Worker, str | None]] = queue.Queue()
        self.log: TextIO = open(os.path.join(args.out, "log.txt"), "a")  # noqa: SIM115
        self.workers: list[Worker] = []
        self.seconds: dict[str, list[float]] = {}  # of finished runs, by row and by task
        self.stopped = False

    # ---- processes ----

    def start_worker(self, index: int) -> Worker:
        gpus, per_gpu = self.args.gpus, self.args.per_gpu
        device = "cuda:0" if gpus else "cpu"
        scratch = self.args.scratch
        environment = {
            **os.environ,
            "TORCHINDUCTOR_CACHE_DIR": os.path.join(scratch, "inductor"),
            "TRITON_CACHE_DIR": os.path.join(scratch, "triton"),
            "TORCHINDUCTOR_COMPILE_THREADS": str(max(1, (os.cpu_count() or 1) // self.count)),
        }
        if self.args.fixed:
            environment = {**ENVIRONMENT, **environment}
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = gpus[index // per_gpu]
        process = subprocess.Popen(
            [sys.executable, os.path.join(HERE, "study_run.py"), device, scratch],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True,
            env=environment, start_new_session=True,
        )  # fmt: skip
        worker = Worker(index, process)
        threading.Thread(target=self.listen, args=(worker,), daemon=True).start()
        return worker

    @property
    def count(self) -> int:
        return max(1, len(self.args.gpus)) * self.args.per_gpu

    def listen(self, worker: Worker) -> None:
        for line in worker.process.stdout:
            self.events.put((worker, line))
        self.events.put((worker, None))  # it has ended

    # ---- the queue ----

    def estimate(self, job: Job) -> float:
        """Seconds that a run will take: the longest of its row, else the median of its task."""
        if job.row in self.seconds:
            return max(self.seconds[job.row])
        task = self.seconds.get(job.row.split("/")[0])
        return 1.1 * statistics.median(task) if task else self.args.expect

    def next_job(self, worker: Worker) -> Job | None:
        """Of the runs that can still end in time, the first of the row at hand, else the first.

        A row that another worker has begun is left to that one while there are others: its graphs
        are compiled there.
        """
        left = self.deadline - time.monotonic()
        fitting = [job for job in self.jobs if self.estimate(job) <= left]
        elsewhere = {w.job.row for w in self.workers if w.job is not None and w is not worker}
        for wanted in (
            lambda job: job.row == worker.last,
            lambda job: job.row not in elsewhere,
            lambda job: True,
        ):
            for job in fitting:
                if wanted(job):
                    return job
        return None

    def assign(self) -> None:
        for worker in self.workers:
            if worker.ready and worker.job is None:
                job = self.next_job(worker)
                if job is not None:
                    self.jobs.remove(job)
                    self.note(f"{job.run} begins on worker {worker.index}")
                    worker.last = job.row
                    worker.give(job)

    def note(self, text: str) -> None:
        elapsed = time.monotonic() - (self.deadline + MARGIN - self.args.budget)
        print(f"{elapsed:6.0f} s  {text}", flush=True)
        self.log.write(f"{elapsed:6.0f} s  {text}\n")
        self.log.flush()

    # ---- events ----

    def handle(self, worker: Worker, line: str | None) -> None:
        worker.heard = time.monotonic()
        if worker not in self.workers:
            return  # it was given up before
        if line is None:
            worker.kill()  # what has closed its output may still live
            self.lose(worker, f"its process ended with {worker.process.returncode}")
            return
        if not (line.startswith("@") and line.endswith("\n")):  # a warning, or cut off
            self.log.write(line)
            return
        fields = json.loads(line[1:])
        if fields["event"] == "ready":
            worker.ready = True
        elif fields["event"] == "row":
            step, train, loss, metric, rate = fields["row"]
            numbers = f"{train:.4f} {loss:.4f} {metric:.4f} {rate:,.0f}/s"
            self.log.write(f"{fields['run']} step {step} {numbers}\n")
        elif fields["event"] == "done":
            self.finish(worker, fields["record"])
        elif fields["event"] == "failed":
            self.fail(worker, fields["error"])

    def finish(self, worker: Worker, record: Fields) -> None:
        job, worker.job = worker.job, None
        seconds = time.monotonic() - worker.started
        for key in (job.row, job.row.split("/")[0]):
            self.seconds.setdefault(key, []).append(seconds)
        # The speed of a run that shared its GPU says nothing.
        self.records.append({**record, "options": job.options, "alone": self.args.per_gpu == 1})
        write_results(self.results_path, self.records)
        rows = record["rows"]
        loss = f"loss {rows[-1][2]:.4f}" if rows else "no loss"
        end = "" if record["diverged"] is None else f", diverged at step {record['diverged']}"
        rate = f"{record['units_per_second']:,.0f} {record['unit']}/s"
        self.note(f"{job.run} done in {seconds:.0f} s: {loss}{end}, {rate}")

    def fail(self, worker: Worker, error: str) -> None:
        job, worker.job, worker.last = worker.job, None, None
        job.tries += 1
        again = job.tries < TRIES
        self.note(f"{job.run} failed ({error}){', once more without compile' if again else ''}")
        if again:
            self.jobs.insert(0, job)

    def lose(self, worker: Worker, reason: str) -> None:
        worker.kill()
        self.workers.remove(worker)
        if worker.job is not None:
            self.fail(worker, reason)
        else:
            self.note(f"worker {worker.index} is lost: {reason}")
        if worker.ready and self.jobs and time.monotonic() < self.deadline - 30:
            self.workers.append(self.start_worker(worker.index))

    # ---- all of it ----

    def run(self) -> None:
        self.note(f"{len(self.jobs)} runs on {self.count} workers, {self.args.budget:.0f} s")
        left = self.deadline - time.monotonic()
        if self.jobs and self.args.expect > left:
            self.note(
                f"none begins: {left:.0f} s of --budget are left for runs, and by --expect one "
                f"takes {self.args.expect:.0f} s"
            )
            self.stopped = True
        try:
            if not self.stopped:
                count = min(self.count, len(self.jobs))
                self.workers = [self.start_worker(i) for i in range(count)]
                self.prepare_text()
            while self.workers and not self.stopped:
                now = time.monotonic()
                if now >= self.deadline:
                    break
                self.assign()
                starting = any(not w.ready for w in self.workers)
                if not starting and not any(w.job for w in self.workers):
                    break  # nothing left, or nothing that would end in time
                with contextlib.suppress(queue.Empty):
                    self.handle(*self.events.get(timeout=min(1.0, self.deadline - now)))
                for worker in list(self.workers):
                    if time.monotonic() - worker.heard > SILENCE and (
                        worker.job or not worker.ready
                    ):
                        self.lose(worker, f"silent for {SILENCE:.0f} s")
        finally:
            self.end()

    def prepare_text(self) -> None:
        """Read the text once, while the workers start."""
        from study_run import task_of
        from text import read_text

        for row in dict.fromkeys(job.row for job in self.jobs):
            options = [*ROWS[row].options.split(), *self.args.options.split()]
            _, args = task_of(ROWS[row], options, self.args.scratch)
            if getattr(args, "cache", "") and not os.path.exists(args.cache):
                texts = read_text(args.text, int(1e6 * args.megabytes), args.cache)
                training, held_out = (len(t) / 1e6 for t in texts)
                self.note(f"{training:.1f} MB to train on, {held_out:.1f} MB held out")

    def end(self) -> None:
        for worker in self.workers:
            if worker.job is not None:
                self.note(f"{worker.job.run} is stopped: out of time")
            worker.kill()
        left = [job.run for job in self.jobs] + [w.job.run for w in self.workers if w.job]
        self.note(f"{len(left)} runs left" + (": " + " ".join(left) if left else ""))
        self.workers = []
        self.log.close()


# ---- the command ----


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="study", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train what is missing, then write the report")
    run.add_argument(
        "--plan", nargs="+", default=[], choices=PLANS, help="runs that belong together"
    )
    run.add_argument("--runs", nargs="+", default=[], metavar="ROW@SEED", help="further runs")
    run.add_argument("--gpus", nargs="*", default=[], metavar="N", help="none: on the CPU")
    run.add_argument("--per-gpu", type=int, default=1, help="processes; speed is measured with one")
    run.add_argument("--budget", type=float, default=1e9, help="seconds, all included")
    run.add_argument("--expect", type=float, default=120.0, help="seconds of a run, at first")
    run.add_argument("--options", default="", help="options of the script for every run")
    run.add_argument("--no-compile", action="store_true", help="eager, though a row says --compile")
    help = "sums in one order in all runs, not in those of the plan repeat alone (fixed_order.py)"
    run.add_argument("--deterministic", action="store_true", help=help)
    run.add_argument("--scratch", metavar="DIR", help="text and compiled kernels (a temporary one)")
    report = commands.add_parser("report", help="write the table and the figures")
    report.add_argument("--against", metavar="FILE", help="results to set beside these")
    help = "the same runs made again: the spread of a gap of their size is at least theirs"
    report.add_argument("--repeats", nargs="+", default=[], metavar="FILE", help=help)
    for command in (run, report):
        command.add_argument("--out", metavar="DIR", required=True)
        command.add_argument("--done", nargs="+", default=[], metavar="FILE", help="other results")
    commands.add_parser("list", help="the rows and the plans")
    return parser


def check(args: argparse.Namespace) -> None:
    args.runs = list(dict.fromkeys([run for plan in args.plan for run in PLANS[plan]] + args.runs))
    fixed = args.runs if args.deterministic else []
    args.fixed = {*fixed, *(run for plan in DETERMINISTIC & {*args.plan} for run in PLANS[plan])}
    for run in args.runs:
        row, _, seed = run.rpartition("@")
        if row not in ROWS or not seed.isdigit():
            must = "--runs must be a row of `study.py list`, @ and a seed"
            raise BadInput(f"{must}, got {run}. Example: gpt/bf16@0.")
        if ROWS[row].recipe is None:
            must = "--runs must be of rows that have a recipe"
            raise BadInput(f"{must}, got {run}. The package no longer has what that row had.")
    if not args.runs:
        raise BadInput("--plan or --runs must name a run, got neither. See `study.py list`.")
    for name in ("per_gpu", "budget", "expect"):
        if getattr(args, name) <= 0:
            option, got = f"--{name.replace('_', '-')}", getattr(args, name)
            raise BadInput(f"{option} must be positive, got {got}. See --help.")


def check_files(args: argparse.Namespace) -> None:
    against, repeats = getattr(args, "against", None), getattr(args, "repeats", [])
    named = {"done": args.done, "against": [against] if against else [], "repeats": repeats}
    for option, paths in named.items():
        for path in paths:
            if not os.path.exists(path):
                must = f"--{option} must name results.json files"
                raise BadInput(f"{must}, got {path}. It does not exist.")


def main(argv: list[str] | None = None) -> int:
    """The program. Returns 0, or 2 for bad input."""
    args = make_parser().parse_args(argv)
    try:
        if args.command == "list":
            for name, row in ROWS.items():
                recipe = row.recipe or "(trained with what the package no longer has)"
                recipe = recipe if isinstance(recipe, str) else recipe.describe()
                print(name, recipe, sep="\n    " if "\n" in recipe else "  ")
            for name, runs in PLANS.items():
                print(f"plan {name}: {len(runs)} runs")
            return 0
        check_files(args)
        os.makedirs(args.out, exist_ok=True)
        if args.command == "run":
            check(args)
            with tempfile.TemporaryDirectory() as folder:
                args.scratch = args.scratch or folder
                os.makedirs(args.scratch, exist_ok=True)
                study = Study(args, STARTED if argv is None else time.monotonic())

                def stop(number: int, frame: Any) -> None:
                    study.stopped = True

                before = {n: signal.signal(n, stop) for n in (signal.SIGINT, signal.SIGTERM)}
                try:
                    study.run()
                finally:
                    for number, handler in before.items():
                        signal.signal(number, handler)
        records = read_results([os.path.join(args.out, "results.json"), *args.done])
        repeats = [read_results([path]) for path in getattr(args, "repeats", [])]
        print(write_report(records, args.out, args.command == "report", repeats))
        if getattr(args, "against", None):
            others = read_results([args.against])
            print(f"beside {args.against}:\n\n{comparison(records, others, repeats)}")
        return 0
    except (BadInput, OSError) as error:
        print(f"study: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
