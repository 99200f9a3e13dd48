"""How a call is timed: on the host's clock, or with CUDA events around the replay of a CUDA graph.

The protocol, the same for both:

* A case has several copies of its inputs, visited in turn, and every copy keeps its outputs.
  Between two visits of one copy, more than twice the last-level cache has been read: inputs are
  always cold.
* A sample is the time of enough calls to dwarf the clock's own cost. A row is at least `fewest`
  samples; p20, p50 and p80 are reported. A row and its baseline are sampled alternately, so that a
  drift hits both.
* On CUDA a sample is one replay of a graph that holds those calls ("us": the kernels), and
  separately the same calls made one by one ("eager_us": what a caller without graphs waits for).
  Samples are enqueued without a synchronization between them, so that the host stays ahead of the
  device.

A timer has `record(run) -> mark` and `read(marks) -> microseconds`; all the rest is device
agnostic.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

Run = Callable[[], Any]

NOISY = 0.05  # a row whose (p80 - p20) / p50 exceeds this is marked
MOST_SETS = 1024
MIB = 2**20


def percentiles(samples: Sequence[float]) -> dict[str, float]:
    """{"p20", "p50", "p80"} of one or more samples, by linear interpolation between them."""
    if len(samples) == 1:
        return dict.fromkeys(("p20", "p50", "p80"), samples[0])
    p20, _, _, p80 = statistics.quantiles(samples, n=5, method="inclusive")
    return {"p20": p20, "p50": statistics.median(samples), "p80": p80}


def spread(us: dict[str, float]) -> float:
    """(p80 - p20) / p50."""
    return (us["p80"] - us["p20"]) / us["p50"] if us["p50"] else 0.0


def is_noisy(us: dict[str, float]) -> bool:
    """Whether the spread is too wide for the median to be relied on."""
    return spread(us) > NOISY


def set_count(set_bytes: int, cache_bytes: int) -> int:
    """Input copies so that the others read between two visits of one are over twice the cache."""
    if set_bytes <= 0:
        return 1
    return min(MOST_SETS, 2 + 2 * cache_bytes // set_bytes)


def tensor_bytes(values: Sequence[Any]) -> int:
    """Bytes of the tensors among values."""
    return sum(v.nbytes for v in values if isinstance(v, torch.Tensor))


def copy_set(values: Sequence[Any]) -> tuple:
    """The same values with every tensor at a new address; other objects are shared."""
    return tuple(
        v.detach().clone().requires_grad_(v.requires_grad) if isinstance(v, torch.Tensor) else v
        for v in values
    )


class Rotation:
    """Calls a function on input sets in turn. The outputs of each set live until its next visit."""

    def __init__(self, call: Callable[..., Any], sets: Sequence[tuple]) -> None:
        self.call, self.sets = call, sets
        self.outputs: list[Any] = [None] * len(sets)
        self.next = 0

    def __call__(self, calls: int) -> None:
        for _ in range(calls):
            index = self.next
            self.outputs[index] = self.call(*self.sets[index])
            self.next = (index + 1) % len(self.sets)


class CpuTimer:
    """Wall-clock time of calls on the CPU."""

    device = torch.device("cpu")
    key = "CPU"  # torch's dispatch key of the kernels that run here
    fewest, most = 5, 100  # samples of a row
    sample_us = 2000.0  # the least length of a sample
    checked_elements = 1 << 18  # of the slice compared with the reference
    first_warm_seconds = warm_seconds = 0.0

    def __init__(self, cache_bytes: int | None = None) -> None:
        self.cache_bytes = _cpu_cache_bytes() if cache_bytes is None else cache_bytes

    def calls(self, call_us: float, sets: int) -> int:
        """Calls in a sample."""
        return max(1, math.ceil(self.sample_us / max(call_us, 0.1)))

    def first_calls(self, sets: int) -> int:
        """Calls from which the time of one is estimated."""
        return 1

    def record(self, run: Run) -> float:
        """Run, and return a mark for `read`."""
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def read(self, marks: Sequence[float]) -> list[float]:
        """Microseconds of each mark."""
        return [mark * 1e6 for mark in marks]

    def capture(self, warm: Run, run: Run) -> Run | None:
        """A CUDA graph of `run` after one `warm`; there is none on a CPU."""
        return None

    def peak_bytes(self, run: Run) -> int | None:
        """The most memory that `run` holds above what was held before; not known on a CPU."""
        return None

    def healthy(self) -> bool:
        """Whether the device still works after an error."""
        return True

    def release(self) -> None:
        """Give back the memory of finished cases."""


class CudaTimer:
    """Device time on the current CUDA device, between events."""

    key = "CUDA"
    fewest, most = 20, 100
    sample_us = 1000.0
    checked_elements = 1 << 20
    first_warm_seconds = 0.5  # before the first row: clocks come up from idle
    warm_seconds = 0.05  # before each row
    most_calls = 2000  # kernels in one graph

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        properties = torch.cuda.get_device_properties(self.device)
        self.cache_bytes = getattr(properties, "L2_cache_size", 0) or 64 * MIB

    def calls(self, call_us: float, sets: int) -> int:
        """Calls in a sample: whole rounds over the sets, because a graph fixes the addresses."""
        rounds = math.ceil(self.sample_us / (max(call_us, 0.1) * sets))
        return sets * max(1, min(rounds, self.most_calls // sets))

    def first_calls(self, sets: int) -> int:
        """One round, so that every set has been touched."""
        return sets

    def record(self, run: Run) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        """Enqueue run between two events. Does not wait."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        return start, end

    def read(self, marks: Sequence[tuple[torch.cuda.Event, torch.cuda.Event]]) -> list[float]:
        """Waits for the device, then the microseconds of each mark."""
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) * 1e3 for start, end in marks]

    def capture(self, warm: Run, run: Run) -> Run | None:
        """Replays of a graph of `run`. `warm` runs first on the same side stream: lazy
        initialization (cuBLAS workspaces, compilation) must not be captured. Raises what the
        capture raises.
        """
        stream, current = torch.cuda.Stream(self.device), torch.cuda.current_stream(self.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            warm()
        current.wait_stream(stream)
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=stream):
                run()
        finally:
            torch.cuda.set_stream(current)  # a failed capture leaves its own stream current
        return graph.replay  # the bound method keeps the graph alive

    def peak_bytes(self, run: Run) -> int | None:
        """The most memory that `run` holds above what was held before, as torch's allocator counts
        it.
        """
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        run()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before

    def healthy(self) -> bool:
        """Whether the device still works after an error; a sticky CUDA error ends the run."""
        try:
            torch.cuda.synchronize(self.device)
            return bool(torch.ones(1, device=self.device).item() == 1)
        except RuntimeError:
            return False

    def release(self) -> None:
        """Give back the memory of finished cases: graphs' private pools, too."""
        gc.collect()
        torch.cuda.empty_cache()


Timer = CpuTimer | CudaTimer


def warm_up(timer: Timer, run: Run, run_us: float, seconds: float) -> None:
    """Run for about that long without reading a clock."""
    for _ in range(min(1000, math.ceil(seconds * 1e6 / max(run_us, 1.0)))):
        run()


def sample(
    timer: Timer, runs: Sequence[Run], run_us: Sequence[float], seconds: float
) -> list[list[float]]:
    """Sample the runs alternately for about `seconds`, between timer.fewest and timer.most times.

    Args:
        timer: measures.
        runs: what to time; one entry is a row, the others its baselines.
        run_us: a guess of each run's time in microseconds.
        seconds: the time to spend.

    Returns:
        For each run its samples in microseconds, in the order taken.
    """
    count = int(seconds * 1e6 / max(sum(run_us), 1e-3))
    count = max(timer.fewest, min(timer.most, count))
    marks: list[list[Any]] = [[] for _ in runs]
    for _ in range(count):
        for own, run in zip(marks, runs, strict=True):
            own.append(timer.record(run))
    return [timer.read(own) for own in marks]


def _cpu_cache_bytes() -> int:
    """Size of the last-level cache that one core sees, where Linux tells; at most 64 MiB, else 32
    MiB.
    """
    sizes = [32 * MIB]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index3/size"):
        text = path.read_text().strip()
        unit = {"K": 1024, "M": MIB}.get(text[-1:], 1)
        digits = text.rstrip("KM")
        sizes = [int(digits) * unit] if digits.isdigit() else sizes
    return min(sizes[0], 64 * MIB)
