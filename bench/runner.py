"""From cases to rows: check against the reference, time beside the baselines, derive the ratios.

A row is the dict that the JSON file holds; what does not apply is None, times are microseconds:

    name, us, eager_us, gbps, of_copy, tflops, vs_bf16, error, noisy: the schema.
    vs_peer, peer: the speed-up over the named peer, sampled alternately with this row.
    over_floor: us.p50 over (an empty kernel + the bytes over the copy bandwidth).
    eager: p20, p50 and p80 of eager calls. graph: whether us is of graph replays; where a capture
        failed, us is of eager calls and note says why.
    bytes, flops: counted for one call. wrong: whether error exceeds the case's tolerance.
    tokens_per_second: of a row that trains.
    samples, calls, sets, peak_bytes: of the measurement; the last is the most memory that one call
        holds above its inputs.
    saved_bytes: of activations, which a layer keeps from its forward to its backward.
    saved_vs_bf16: those of the BF16 row over this row's.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Protocol

import torch

from mxtrain import env

from .cases import Case
from .report import describe
from .suites import PEAKS
from .timing import (
    Rotation,
    Run,
    Timer,
    copy_set,
    is_noisy,
    percentiles,
    sample,
    set_count,
    tensor_bytes,
    warm_up,
)


@dataclass
class Outcome:
    """Rows measured, rows not run and rows that failed as (name, reason), and the peaks."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    peaks: dict[str, float | None] = field(default_factory=dict)
    interrupted: bool = False

    @property
    def wrong(self) -> list[str]:
        """Names of the rows whose error is too large."""
        return [row["name"] for row in self.rows if row["wrong"]]


class Reporter(Protocol):
    """What a run tells while it works."""

    def begin(self, name: str) -> None: ...

    def end(self, name: str, text: str) -> None: ...


@dataclass
class Prepared:
    """A case whose inputs exist and whose outputs were checked, ready to be sampled."""

    case: Case
    error: float | None
    eager: Run
    graph: Run | None
    calls: int  # in one run
    run_us: float  # a guess
    sets: int
    peak_bytes: int | None
    saved_bytes: int | None
    note: str = ""


def has_kernel(op: str, key: str) -> bool:
    """Whether torch.ops.mxtrain.<op> exists and has a kernel for a dispatch key."""
    try:
        return env.has_kernel(op, key)
    except RuntimeError:  # an op that this build does not know
        return False


def unavailable(case: Case, key: str) -> str | None:
    """Why a case cannot run on devices of a dispatch key ("CPU", "CUDA"), or None if nothing is
    known to hinder it.
    """
    if case.op and not has_kernel(case.op, key):
        return f"this build has no {key} kernel of mxtrain::{case.op}"
    if case.requires and importlib.util.find_spec(case.requires) is None:
        return f"needs {case.requires} (pip install {case.requires})"
    return None


def prepare(case: Case, timer: Timer) -> Prepared:
    """Make the inputs, check the outputs, warm up and capture. Raises whatever the case raises."""
    first = case.make(timer.device)
    out = case.call(*first)
    error = case.check(first, out, timer.checked_elements) if case.check else None
    del out
    peak = timer.peak_bytes(lambda: case.call(*first))
    saved = case.saved(*first) if case.saved else None
    count = set_count(tensor_bytes(first), timer.cache_bytes)
    sets = [first, *(copy_set(first) for _ in range(count - 1))]

    rotation, captured = Rotation(case.call, sets), Rotation(case.call, sets)
    few = timer.first_calls(count)
    rotation(few)
    (few_us,) = timer.read([timer.record(lambda: rotation(few))])
    calls = timer.calls(few_us / few, count)
    graph, note = None, ""
    try:
        if case.graph:
            graph = timer.capture(
                warm=lambda: Rotation(case.call, sets)(count), run=lambda: captured(calls)
            )
    except RuntimeError as problem:
        if not timer.healthy():
            raise
        note = f"no graph: {first_line(problem)}"
    run_us = few_us / few * calls
    return Prepared(
        case, error, lambda: rotation(calls), graph, calls, run_us, count, peak, saved, note
    )


def measure(
    entries: Sequence[Prepared], timer: Timer, seconds: float, warm_seconds: float
) -> list[tuple[Prepared, dict[str, Any]]]:
    """The entries with their rows, sampled alternately after a warm-up of each."""
    if not entries:
        return []
    guesses = [entry.run_us for entry in entries]

    def samples(runs: Sequence[Run]) -> list[list[float]]:
        for run, guess in zip(runs, guesses, strict=True):
            warm_up(timer, run, guess, warm_seconds)
        return sample(timer, runs, guesses, seconds)

    eager = samples([entry.eager for entry in entries])
    if any(entry.graph for entry in entries):
        chosen = samples([entry.graph or entry.eager for entry in entries])
    else:
        chosen = eager
    rows = [_row(*parts) for parts in zip(entries, chosen, eager, strict=True)]
    for entry, row in zip(entries, rows, strict=True):
        compare_with(row, rows, entry.case)
    return list(zip(entries, rows, strict=True))


def _row(entry: Prepared, samples: list[float], eager_samples: list[float]) -> dict[str, Any]:
    case = entry.case
    us = percentiles([t / entry.calls for t in samples])
    eager = percentiles([t / entry.calls for t in eager_samples])
    row = {
        "name": case.name,
        "us": us,
        "eager_us": eager["p50"],
        "gbps": case.bytes / us["p50"] / 1e3 if case.bytes and not case.flops else None,
        "of_copy": None,
        "tflops": case.flops / us["p50"] / 1e6 if case.flops else None,
        "vs_bf16": None,
        "error": entry.error,
        "noisy": is_noisy(us),
        "vs_peer": None,
        "peer": None,
        "over_floor": None,
        "eager": eager,
        "graph": entry.graph is not None,
        "bytes": case.bytes,
        "flops": case.flops,
        "wrong": entry.error is not None and not entry.error <= case.tolerance,  # NaN is wrong
        "samples": len(samples),
        "calls": entry.calls,
        "sets": entry.sets,
        "peak_bytes": entry.peak_bytes,
        "saved_bytes": entry.saved_bytes,
        "saved_vs_bf16": None,
        "tokens_per_second": case.tokens / us["p50"] * 1e6 if case.tokens else None,
    }
    if entry.note:
        row["note"] = entry.note
    return row


class Session:
    """One run over some cases.

    A case is sampled alternately with its baselines among the cases, and with the cases that have
    the same baselines. Missing kernels and modules, and errors of peers, give skipped rows; errors
    of this package's own rows give failed ones. After an error that breaks the CUDA context the
    rest is skipped.
    """

    def __init__(
        self, cases: Sequence[Case], timer: Timer, seconds: float, reporter: Reporter
    ) -> None:
        self.cases, self.timer, self.seconds, self.reporter = cases, timer, seconds, reporter
        self.by_name = {case.name: case for case in cases}
        self.rows: dict[str, dict[str, Any]] = {}
        self.outcome = Outcome()
        self.done: set[str] = set()
        self.lost: str | None = None  # the row that broke the device

    def run(self) -> Outcome:
        """Measure the cases in order. After an interrupt: what was measured until then."""
        try:
            self._measure_all()
        except KeyboardInterrupt:
            self.outcome.interrupted = True
            for case in self.cases:
                self._skip(case, "not run: interrupted")
        self.outcome.rows = [self.rows[case.name] for case in self.cases if case.name in self.rows]
        finish(self.outcome)
        return self.outcome

    def _measure_all(self) -> None:
        warm = self.timer.first_warm_seconds
        for case in self.cases:
            if case.name in self.done:
                continue
            self.reporter.begin(case.name)
            entries = [e for e in map(self._prepare, self._group(case)) if e is not None]
            try:
                for entry, row in measure(entries, self.timer, self.seconds, warm):
                    self._file(entry.case.name, row)
                warm = self.timer.warm_seconds
            except Exception as error:
                for entry in entries:
                    self._refuse(entry.case, error)
            del entries
            self.timer.release()

    def _group(self, case: Case) -> list[Case]:
        """The case, the cases that are compared with the same rows, and these rows."""
        shared = [name for name in case.baselines if name in self.by_name]
        if not shared:
            return [case]
        mates = [c for c in self.cases if c.baselines == case.baselines and c.name not in self.done]
        return mates + [self.by_name[name] for name in shared]

    def _prepare(self, case: Case) -> Prepared | None:
        """The prepared case, or None with the reason filed."""
        reason = f"not run: the device failed in {self.lost}" if self.lost else None
        reason = reason or unavailable(case, self.timer.key)
        if reason:
            self._skip(case, reason)
            return None
        try:
            torch.manual_seed(0)
            return prepare(case, self.timer)
        except Exception as error:  # a broken peer or kernel costs its row, not the run
            self._refuse(case, error)
            return None

    def _refuse(self, case: Case, error: Exception) -> None:
        """File a case that raised: as failed where it is this package's own."""
        if not self.lost and not self.timer.healthy():
            self.lost = case.name
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            self._skip(case, f"not enough memory: {first_line(error)}")
        else:
            self._skip(case, f"{type(error).__name__}: {first_line(error)}", failed=bool(case.op))

    def _skip(self, case: Case, reason: str, failed: bool = False) -> None:
        if case.name not in self.done:
            self.done.add(case.name)
            (self.outcome.failed if failed else self.outcome.skipped).append((case.name, reason))
            self.reporter.end(case.name, f"{'FAILED' if failed else 'skipped'}: {reason}")

    def _file(self, name: str, row: dict[str, Any]) -> None:
        if name not in self.done:
            self.done.add(name)
            self.rows[name] = row
            self.reporter.end(name, describe(row))


def compare_with(row: dict[str, Any], baselines: Sequence[dict[str, Any]], case: Case) -> None:
    """Set vs_peer (of the first peer that ran), vs_bf16 and saved_vs_bf16 from the rows sampled
    beside it.
    """
    found = {base["name"]: base for base in baselines}
    row["peer"] = next((name for name in case.peers if name in found), None)
    if row["peer"]:
        row["vs_peer"] = found[row["peer"]]["us"]["p50"] / row["us"]["p50"]
    if case.bf16 in found:
        row["vs_bf16"] = found[case.bf16]["us"]["p50"] / row["us"]["p50"]
        if row["saved_bytes"]:
            row["saved_vs_bf16"] = found[case.bf16]["saved_bytes"] / row["saved_bytes"]


def finish(outcome: Outcome) -> None:
    """Set the peaks, and what depends on them: of_copy and over_floor."""
    for peak, (column, pattern) in PEAKS.items():
        best = [row for row in outcome.rows if fnmatchcase(row["name"], pattern) and row[column]]
        # the faster of graph and eager: a ceiling must not suffer from how it was launched
        rates = [row[column] * max(1.0, row["us"]["p50"] / row["eager_us"]) for row in best]
        outcome.peaks[peak] = max(rates, default=None)
    copy = outcome.peaks["copy_gbps"]
    empty = next((r["us"]["p50"] for r in outcome.rows if r["name"] == "peer/empty_kernel/1"), None)
    for row in outcome.rows:
        if copy and row["gbps"]:
            row["of_copy"] = row["gbps"] / copy
            if empty:
                row["over_floor"] = row["us"]["p50"] / (empty + row["bytes"] / copy / 1e3)


def first_line(error: BaseException) -> str:
    """What an exception says, in one line; with the next line where the first only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])
