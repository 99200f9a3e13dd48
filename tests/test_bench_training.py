"""The benchmark's rows of training steps."""

from __future__ import annotations

import pytest
import torch
from bench_common import CPU
from test_bench import run

import mxtrain
from bench import cases, suites, training


@pytest.mark.parametrize("unit", ["step", "graph"])
def test_training_rows_train_every_layer_of_the_blocks(unit, monkeypatch):
    """One step after another, the same model but for the linear layers; tokens are counted."""
    monkeypatch.setattr(training, "BACKEND", "aot_eager")
    monkeypatch.setattr(training, "VOCABULARY", 512)  # a third of the time, else
    torch._dynamo.reset()
    names = [f"train/gpt/{recipe}/2x64/2x32/{unit}" for recipe in ("tetrajet", "bf16")]
    chosen = [cases.build(name) for name in names]
    losses = []
    for case in chosen:
        (trainer,) = inputs = case.make(CPU)
        quantized = [m for m in trainer.model.modules() if isinstance(m, mxtrain.MXLinear)]
        assert len(quantized) == (8 if case.op else 0)
        before = [p.detach().clone() for p in trainer.model.parameters()]
        got = [case.call(*inputs) for _ in range(3)]
        assert case.check(inputs, got[0], 0) <= case.tolerance and got[2] < got[1] < got[0]
        parameters = trainer.model.parameters()
        assert not any(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
        losses.append(got[0])
    assert losses[0] != losses[1]
    ours, bf16 = run(chosen).rows
    assert ours["vs_bf16"] > 0 and not ours["graph"]
    assert bf16["tokens_per_second"] == pytest.approx(64e6 / bf16["us"]["p50"])


def test_the_training_row_has_about_350_million_parameters():
    with torch.device("meta"):
        model = training.GPT(24, 1024, 1024)
    assert sum(p.numel() for p in model.parameters()) == 354_871_296
    assert "train/gpt/tetrajet/24x1024/16x1024/step" in suites.names("full", ["64x64"])
