"""A Llama-like byte model for train_gpt.py: RMSNorm, rotary positions, a gated MLP, no biases.

A recipe quantizes qkv, proj, gate_up and down of each block; q, k and v, and gate and up, come of
one layer each, so one quantization of their input serves all. With an int8_block recipe the norms
and the gated activation keep 10 bits of their inputs (`compress_contexts`); with any other they are
torch's own RMSNorm and silu(gate) * up.

Outliers, as trained GLU models have them, can be put into what `down` multiplies. They leave the
function of the model as it is, so a recipe's loss shows what its quantization does with them:

    channel    one channel is 1024 times as large, and its column of `down` a 1024th
    isolated   single elements are 1000, where the column of `down` is zero: every 128th channel has
               the place, every fourth of these has one in 256 tokens

The columns of `down` concerned are not trained, in every recipe alike.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mxtrain

OUTLIERS = ("none", "channel", "isolated")
CHANNEL, FACTOR = 5, 1024.0  # a power of two: nothing but the quantizer sees it
SIZE, EVERY, TOKENS = 1000.0, 128, 256


def hidden_size(dim: int) -> int:
    """8/3 of dim, rounded up to whole groups of 128."""
    return -(-8 * dim // (3 * 128)) * 128


class Outliers(nn.Module):
    """h * scale + add; both are fixed."""

    def __init__(self, kind: str, hidden: int, context: int) -> None:
        super().__init__()
        scale, add = torch.ones(hidden), torch.zeros(context, hidden)
        if kind == "channel":
            scale[CHANNEL] = FACTOR
        else:
            scale[CHANNEL::EVERY] = 0
            period = min(TOKENS, context)
            for i, channel in enumerate(range(CHANNEL, hidden, EVERY)):
                if i % 4 == 0:
                    add[37 * i % period :: period, channel] = SIZE
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("add", add, persistent=False)

    def forward(self, h: Tensor) -> Tensor:
        return h * self.scale.to(h.dtype) + self.add[: h.shape[-2]].to(h.dtype)

    @torch.no_grad()
    def prepare(self, down: nn.Linear) -> None:
        """Undo in `down` what the outliers do, and keep it undone."""
        changed = self.scale != 1
        down.weight[:, changed] *= torch.where(self.scale == 0, 0.0, 1 / self.scale)[changed]
        down.weight.register_hook(lambda grad: grad * (self.scale == 1))


class LlamaBlock(nn.Module):
    """Pre-norm block on x [N, T, dim]."""

    def __init__(
        self, dim: int, heads: int, context: int, outliers: str = "none", base: float = 10000.0
    ) -> None:
        super().__init__()
        self.heads = heads
        hidden, head = hidden_size(dim), dim // heads
        self.attn_norm = mxtrain.nn.RMSNorm(dim, eps=1e-6, compress=False)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)
        self.mlp_norm = mxtrain.nn.RMSNorm(dim, eps=1e-6, compress=False)
        self.gate_up = nn.Linear(dim, 2 * hidden, bias=False)
        self.act = mxtrain.nn.SwiGLU(compress=False)
        self.outliers = None if outliers == "none" else Outliers(outliers, hidden, context)
        self.down = nn.Linear(hidden, dim, bias=False)
        # Element i of a head turns with element i + head / 2.
        rate = base ** (-torch.arange(0, head, 2) / head)
        angle = torch.arange(context)[:, None] * rate.repeat(2)
        sign = torch.ones(head)
        sign[: head // 2] = -1
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin() * sign, persistent=False)

    def turned(self, x: Tensor) -> Tensor:
        """x [N, heads, T, head] by the angles of the positions."""
        cos, sin = (t[: x.shape[-2]].to(x.dtype) for t in (self.cos, self.sin))
        return x * cos + x.roll(x.shape[-1] // 2, -1) * sin

    def attention(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        # Backward keeps all three: a v that is a view would keep the q and k before turning, too.
        q, k, v = self.turned(q), self.turned(k), v.clone()
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(y.transpose(1, 2).reshape(batch, tokens, dim))

    def mlp(self, x: Tensor) -> Tensor:
        h = self.act(self.gate_up(x))
        return self.down(h if self.outliers is None else self.outliers(h))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attn_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Llama(nn.Module):
    def __init__(
        self, dim: int, depth: int, heads: int, context: int, outliers: str = "none"
    ) -> None:  # fmt: skip
        super().__init__()
        self.tok_embed = nn.Embedding(256, dim)
        self.blocks = nn.ModuleList(
            LlamaBlock(dim, heads, context, outliers) for _ in range(depth)
        )  # fmt: skip
        self.norm = nn.RMSNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, 256, bias=False)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
        for block in self.blocks:
            if block.outliers is not None:
                block.outliers.prepare(block.down)

    def forward(self, text: Tensor) -> Tensor:
        """Bytes [N, T] -> logits of each next byte [N, T, 256]."""
        x = self.tok_embed(text)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def compress_contexts(model: nn.Module) -> None:
    """Have the blocks whose layers run in int8_block keep 10 bits for backward, as the recipe's
    paper does, and proj no codes of the attention's output, which the attention keeps."""
    for block in model.modules():
        if isinstance(block, LlamaBlock):
            recipe = getattr(block.down, "recipe", None)
            on = recipe is not None and recipe.fprop_x.square
            for layer in (block.attn_norm, block.mlp_norm, block.act):
                layer.compress = on
            if isinstance(block.proj, mxtrain.MXLinear):
                block.proj.keep_input = on
