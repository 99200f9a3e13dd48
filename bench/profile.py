"""`python -m bench profile ROW`: where the device time of one call of a row goes, by kind of
kernel, from torch's profiler.

The kernels of a few calls, made one after the other as a caller without a CUDA graph makes them,
are sorted by name (KINDS). "idle" is the time from the first kernel's start to the last one's end
in which no kernel ran: launch gaps, or a host that is too slow. The profiler slows the host down,
so compare the time per call with that of `python -m bench run`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from .cases import Case
from .report import BadInput, aligned

KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("folded GEMM, split K", ("folded_gemm_kernel<*, (mxtrain::cuda::sm90::Tiling)2>",)),
    ("folded GEMM", ("folded_gemm", "packed_gemm")),
    ("int8 GEMM", ("int8_gemm",)),
    ("residuals packed", ("int8_pack", "int8_unpack")),
    ("fold", ("fold_kernel", "shift_kernel")),
    ("quantize_dual", ("quantize_dual",)),
    ("requantize", ("requantize",)),
    ("quantize", ("quantize_", "amax_", "finish_tensor_scale")),
    ("dequantize, epilogue", ("dequantize_kernel", "mxtrain::cuda::epilogue")),
    ("column_sum", ("column_strips", "column_total", "column_runs")),
    ("mxtrain, other", ("mxtrain::",)),
    ("attention", ("flash", "fmha", "attention", "sdpa")),
    ("cuBLAS", ("nvjet", "gemm", "cutlass", "cublas", "gemv", "splitKreduce")),
    ("optimizer", ("FusedAdam", "multi_tensor")),
    ("copies and fills", ("Memcpy", "Memset")),
    ("torch.compile", ("triton",)),
)
"""(kind, parts of kernel names), the first that fits; "*" stands for anything."""


@dataclass(frozen=True)
class Kernel:
    """One kernel that ran: its name, start and end in microseconds."""

    name: str
    start: float
    end: float


def kind_of(name: str) -> str:
    """The kind of a kernel."""

    def fits(pattern: str) -> bool:
        at = 0
        for part in pattern.split("*"):
            at = name.find(part, at)
            if at < 0:
                return False
            at += len(part)
        return True

    return next((kind for kind, parts in KINDS if any(map(fits, parts))), "other")


def busy(kernels: Iterable[Kernel]) -> float:
    """Microseconds in which at least one of them ran."""
    total, until = 0.0, float("-inf")
    for k in sorted(kernels, key=lambda k: k.start):
        total += max(0.0, k.end - max(k.start, until))
        until = max(until, k.end)
    return total


def table(kernels: Sequence[Kernel], calls: int) -> str:
    """Milliseconds and launches a call, by kind, and what is left."""
    span = max(k.end for k in kernels) - min(k.start for k in kernels)
    found: dict[str, list[float]] = {}
    for k in kernels:
        found.setdefault(kind_of(k.name), []).append(k.end - k.start)
    rows = sorted(found.items(), key=lambda row: -sum(row[1]))
    lines = [(name, sum(us), f"{len(us) / calls:.0f}") for name, us in rows]
    lines.append(("idle", span - busy(kernels), ""))
    lines.append(("all", span, f"{len(kernels) / calls:.0f}"))
    text = [("kernels", "ms a call", "launches")]
    return aligned(text + [(name, f"{us / calls / 1e3:.2f}", n) for name, us, n in lines])


def kernels_of(case: Case, calls: int, warm: int = 5) -> list[Kernel]:
    """The kernels of some calls of a case on the GPU, after others that compile and warm up."""
    device = torch.device("cuda", torch.cuda.current_device())
    inputs = case.make(device)
    for _ in range(warm):
        case.call(*inputs)
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(calls):
            case.call(*inputs)
        torch.cuda.synchronize()
    return [
        Kernel(event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    ]


def profile(case: Case, calls: int) -> str:
    """The table of a case. Raises BadInput where no GPU or no kernel is."""
    if not torch.cuda.is_available():
        raise BadInput("profile needs a CUDA GPU and torch sees none")
    kernels = kernels_of(case, calls)
    if not kernels:
        raise BadInput(f"the profiler saw no kernel of {case.name}")
    return f"{case.name}, {calls} calls, {torch.cuda.get_device_name()}\n{table(kernels, calls)}"
