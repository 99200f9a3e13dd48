"""T19: what a fallback costs int8_gemm, on a GPU with nothing else to do: pytest -m perf."""

from __future__ import annotations

import statistics

import pytest
import torch

from bench import cases

ROUNDS, CALLS = 15, 3


@pytest.fixture(scope="module")
def times():
    """Milliseconds of a call of each row, sampled in turn: they share clocks and heat."""

    def of(shape: str, *rows: str) -> dict[str, float]:
        chosen = [cases.build(f"int8_gemm/{row}/{shape}") for row in rows]
        inputs = [case.make(torch.device("cuda")) for case in chosen]
        samples: dict[str, list[float]] = {row: [] for row in rows}
        for sample in range(ROUNDS + 3):
            for row, case, made in zip(rows, chosen, inputs, strict=True):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                for _ in range(CALLS):
                    case.call(*made)
                end.record()
                torch.cuda.synchronize()
                if sample >= 3:
                    samples[row].append(start.elapsed_time(end) / CALLS)
        found = {row: statistics.median(values) for row, values in samples.items()}
        print(found)
        return found

    return of


@pytest.mark.perf
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_t19_time_grows_with_the_rate(times):
    rows = ["r0.0", "r0.1", "r0.2", "r1.0", "r0.1+channels", "r0.2+channels", "r0.2+tokens"]
    t = times("8192x8192x8192", *rows)
    assert 0.98 * t["r0.0"] <= t["r0.1"] <= 1.02 * t["r0.2"] <= 1.04 * t["r1.0"]
    assert t["r1.0"] <= 2.1 * t["r0.0"]
    assert t["r0.1+channels"] <= 1.12 * t["r0.0"] and t["r0.2+channels"] <= 1.22 * t["r0.0"]
    assert t["r0.2+channels"] <= 1.02 * t["r0.2+tokens"]


@pytest.mark.perf
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_t19_a_full_row_of_blocks(times):
    """One of the 32 rows of blocks: a rate of 3%, at most 15% over as many at random."""
    t = times("4096x4096x4096", "r0.03125", "r0.03125+tokens")
    assert t["r0.03125+tokens"] <= 1.15 * t["r0.03125"]
