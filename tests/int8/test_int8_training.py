"""T20: a GLU model whose activations have outliers learns with the fallback only."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mxtrain

pytestmark = pytest.mark.ops("int8_quantize", "int8_quantize_fallback", "int8_gemm")
VOCABULARY, DIM, HIDDEN, CHANNEL, SIZE = 64, 1024, 256, 131, 1000.0
TOKENS = 256
ISOLATED = ((17, 133, 1.0), (90, 517, 1.1), (200, 773, 1.2))  # row, channel, in units of SIZE


class Glu(nn.Module):
    """The next token from the last one, through a gated block; some of its input is large.

    A channel is scaled up and its weights are scaled down, as it is in models that have grown
    outliers; or single elements are large, where the weights are zero. The function is the one
    without them, up to what quantization loses. These weights stay as they are.
    """

    def __init__(self, kind):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, DIM)
        self.gate, self.up = (nn.Linear(DIM, HIDDEN, bias=False) for _ in range(2))
        self.down = nn.Linear(HIDDEN, DIM, bias=False)
        self.head = nn.Linear(DIM, VOCABULARY)
        scale = torch.ones(DIM)
        add = torch.zeros(TOKENS, DIM)
        if kind == "channel":
            scale[CHANNEL] = SIZE
        else:
            for row, channel, size in ISOLATED:
                scale[channel], add[row, channel] = 0, size * SIZE
        self.register_buffer("scale", scale)
        self.register_buffer("add", add)
        with torch.no_grad():
            for layer in (self.gate, self.up):
                layer.weight *= torch.where(scale == 0, 0.0, 1 / scale)
                layer.weight.register_hook(lambda grad: grad * (self.scale == 1))

    def forward(self, tokens):
        x = F.rms_norm(self.embed(tokens), (DIM,)) * self.scale + self.add
        return self.head(self.down(F.silu(self.gate(x)) * self.up(x)))


def final_loss(recipe, kind, device, steps=12):
    """Mean cross entropy of the last steps, where it falls fast, and the model."""
    torch.manual_seed(0)
    model = Glu(kind).to(device)
    if recipe is not None:
        mxtrain.convert(model, recipe, include=["gate", "up", "down"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        tokens = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
        wanted = (tokens * 5 + 1) % VOCABULARY
        loss = F.cross_entropy(model(tokens.to(device)), wanted.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return sum(losses[-3:]) / 3, model


@pytest.mark.parametrize("kind", ["channel", "isolated"])
def test_outliers(kind, device):
    exact, _ = final_loss(None, kind, device)
    plain, _ = final_loss("int8_block", kind, device)
    fallback, model = final_loss("int8_fallback", kind, device)
    assert abs(fallback - exact) <= 0.01 * exact
    assert plain - exact > 20 * abs(fallback - exact) and plain > 1.05 * exact
    assert 4 < float(model.gate.fallback_threshold) < SIZE
