"""T20: a GLU model whose activations have an outlier channel learns with the fallback only."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mxtrain

pytestmark = pytest.mark.ops("int8_quantize", "int8_quantize_fallback", "int8_gemm")
VOCABULARY, DIM, HIDDEN, CHANNEL, SIZE = 64, 1024, 256, 131, 1000.0


class Glu(nn.Module):
    """The next token from the last one, through a gated block; one channel of its input is large.

    That channel is scaled up and its weights are scaled down, as it is in models that have grown
    outliers: the function is the one without it, up to what quantization loses.
    """

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, DIM)
        self.gate, self.up = (nn.Linear(DIM, HIDDEN, bias=False) for _ in range(2))
        self.down = nn.Linear(HIDDEN, DIM, bias=False)
        self.head = nn.Linear(DIM, VOCABULARY)
        scale = torch.ones(DIM)
        scale[CHANNEL] = SIZE
        self.register_buffer("scale", scale)
        with torch.no_grad():
            for layer in (self.gate, self.up):
                layer.weight /= scale
                layer.weight.register_hook(lambda grad: grad * (self.scale == 1))

    def forward(self, tokens):
        x = F.rms_norm(self.embed(tokens), (DIM,)) * self.scale
        return self.head(self.down(F.silu(self.gate(x)) * self.up(x)))


def final_loss(recipe, device, steps=12):
    """Mean cross entropy of the last steps, where it falls fast, and the model."""
    torch.manual_seed(0)
    model = Glu().to(device)
    if recipe is not None:
        mxtrain.convert(model, recipe, include=["gate", "up", "down"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        tokens = torch.randint(0, VOCABULARY, (256,), generator=generator)
        wanted = (tokens * 5 + 1) % VOCABULARY
        loss = F.cross_entropy(model(tokens.to(device)), wanted.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return sum(losses[-3:]) / 3, model


def test_an_outlier_channel(device):
    exact, _ = final_loss(None, device)
    plain, _ = final_loss("int8_block", device)
    fallback, model = final_loss("int8_fallback", device)
    assert abs(fallback - exact) <= 0.01 * exact
    assert plain - exact > 20 * abs(fallback - exact) and plain > 1.05 * exact
    assert 4 < float(model.gate.fallback_threshold) < SIZE
