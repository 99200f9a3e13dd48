"""T20: GLU models whose activations have outliers learn with the fallback only."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mxtrain
from mxtrain.recipe import RECIPES, Fallback

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import llama

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


# ---- a language model, against BF16 ----


def words(length):
    """Bytes of eight made-up words of 3 to 10 letters in random order: spelling can be learnt."""
    g = torch.Generator().manual_seed(1)
    known = [torch.randint(97, 123, (n,), generator=g).tolist() for n in range(3, 11)]
    text = []
    while len(text) < length:
        text += [*known[int(torch.randint(0, 8, (), generator=g))], 32]
    return torch.tensor(text[:length])


def language_loss(recipe, kind, device, steps=20):
    """Mean loss of the last six steps of a one-block Llama, in BF16 but for the recipe."""
    torch.manual_seed(0)
    model = llama.Llama(128, 1, 2, 64, kind).to(device)
    mxtrain.convert(model, recipe, include="blocks.*")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for batch in words(steps * 4 * 65).view(steps, 4, 65).to(device):
        with torch.autocast(device, torch.bfloat16):
            logits = model(batch[:, :-1]).float().flatten(0, 1)
        loss = F.cross_entropy(logits, batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return sum(losses[-6:]) / 6, model


@pytest.mark.parametrize("kind", ["channel", "isolated"])
def test_a_language_model(kind, device):
    """T20, against BF16. What `down` multiplies has 3 blocks along its channels, of which one holds
    the outliers: a third, so the band is one around that. Measured on the CPU for two seeds, with a
    text like this one and float32 elsewhere: plain from 8% to 9% above, the fallback within 0.05%.
    """
    band = RECIPES["int8_fallback"].replace(fallback=Fallback(low=0.2, high=0.5))
    bf16, _ = language_loss("bf16", kind, device)
    plain, _ = language_loss("int8_block", kind, device)
    fallback, model = language_loss(band, kind, device)
    assert bf16 < 3 and abs(fallback - bf16) <= 0.01 * bf16
    assert plain > 1.03 * bf16 and plain - bf16 > 5 * abs(fallback - bf16)
    assert float(model.blocks[0].down.last_fallback_rate()) == pytest.approx(1 / 3)
