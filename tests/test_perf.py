"""Speed floors, on a machine with nothing else to do: pytest -m perf.

Not part of the suite, whose other jobs would share the cores. `python -m bench run` measures more.
"""

from __future__ import annotations

import csv
import statistics
import time

import pytest
import torch

import mxtrain
from bench.training import Trainer

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


def seconds_of(trainer, steps: int) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        trainer.step()
    torch.cuda.synchronize()
    return time.perf_counter() - start


@pytest.mark.perf
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "compiled, rounds", [(True, ROUNDS), (False, 5)], ids=["compiled", "eager"]
)
def test_a_monitor_every_10_steps_costs_less_than_2_percent(tmp_path, compiled, rounds):
    """Of the training step of a GPT of 355 million parameters, two of them turn about. Eager steps,
    of which X and dY are seen too, wait more for the processor."""
    plain, watched = (
        Trainer("tetrajet", 24, 1024, 8, 1024, torch.device("cuda"), compiled=compiled)
        for _ in "ab"
    )
    with mxtrain.monitor(watched.model, tmp_path / "run.csv", every=10):
        for trainer in (plain, watched):
            seconds_of(trainer, 12)  # compiles, and makes a row
        times = [[seconds_of(trainer, 20) for trainer in (plain, watched)] for _ in range(rounds)]
    before, after = (statistics.median(column) / 20 for column in zip(*times, strict=True))
    print(f"{1e3 * before:.2f} ms a step, {1e3 * after:.2f} ms watched: {after / before - 1:+.1%}")
    with open(tmp_path / "run.csv", newline="") as file:
        seen = {row["fprop_x.snr"] != "" for row in csv.DictReader(file)}
    assert seen == {not compiled} and after < 1.02 * before
