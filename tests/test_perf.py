"""Speed floors, on a machine with nothing else to do: pytest -m perf.

Not part of the suite, whose other jobs would share the cores. `python -m bench run` measures more.
"""

from __future__ import annotations

import statistics
import time

import pytest
import torch

import mxtrain

ROUNDS = 7


def milliseconds(call) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


@pytest.mark.perf
def test_quantize_is_8_times_as_fast_as_eager_torchao():
    """BF16 to mxfp4, nearest, floor, 4096x4096, on the CPU's threads, turn about."""
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    config = pytest.importorskip("torchao.prototype.mx_formats.config")
    x = torch.randn(4096, 4096).bfloat16()
    floor = config.ScaleCalculationMode.FLOOR
    pair = (
        lambda: mxtrain.quantize(x, "mxfp4", scale_rule="floor"),
        lambda: mx.to_mx(x, torch.float4_e2m1fn_x2, 32, floor),
    )
    ours, theirs = pair[0](), pair[1]()  # warm, and the same bytes
    assert torch.equal(ours.data, theirs[1].view(torch.uint8).reshape(ours.data.shape))
    times = [[milliseconds(call) for call in pair] for _ in range(ROUNDS)]
    ours_ms, theirs_ms = (statistics.median(column) for column in zip(*times, strict=True))
    ratio = theirs_ms / ours_ms
    print(f"{ours_ms:.1f} ms against {theirs_ms:.1f} ms: {ratio:.1f} times")
    assert ratio >= 8, (ours_ms, theirs_ms)
