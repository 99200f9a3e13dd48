"""Philox4x32 (Salmon, Moraes, Dror, Shaw, SC'11) in int64, and the draws of an operand."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import refusal

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
GROUP = 32  # elements of a call
ROUNDS = 7  # the fewest with which Philox4x32 passes BigCrush (SC'11, table 2)


def _mul32(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """(high, low) 32 bits of a 32 x 32 bit product, by halves so that int64 never overflows."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox4x32(counter: list[Tensor], key: list[Tensor], rounds: int = ROUNDS) -> list[Tensor]:
    """Four output words from four counter and two key words: int64 in [0, 2^32), broadcastable."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        high0, low0 = _mul32(MULTIPLIERS[0], c0)
        high1, low1 = _mul32(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return [c0, c1, c2, c3]


def draws_of_words(words: list[Tensor]) -> Tensor:
    """The 32 draws, along a new last axis, that a group takes from the four words of its call.

    Quarter s, elements 8 s to 8 s + 7, takes the words w[t] ^ c[s], low halves first.
    """
    c1, c2 = (((w << 16) | (w >> 16)) & MASK for w in (words[0] ^ words[1], words[2] ^ words[3]))
    quarters = [w ^ c for c in (torch.zeros_like(c1), c1, c2, c1 ^ c2) for w in words]
    return torch.stack([h for word in quarters for h in (word & 0xFFFF, word >> 16)], dim=-1)


def draws(rng: Tensor, rows: int, cols: int, stream: int) -> Tensor:
    """The 16-bit draws, int64 [rows, cols], of an operand with ``cols`` padded columns.

    ``rng`` is int64 [2]: (seed, offset). ``stream`` is 0 for the row operand and 1 for the
    transposed one. Element (r, k) is of group g = r * ceil(cols / 32) + k // 32, which has the
    counter (low word of g, high word of g, low word of offset, stream) and the key (low, high word
    of seed).
    """
    if rng.dtype != torch.int64 or rng.shape != (2,):
        got, advice = f"{rng.dtype} {list(rng.shape)}", "See mxtrain.draw_rng."
        raise ValueError(refusal("draws", "rng", "be int64 [2]", got, "seed, offset", advice))
    seed, offset = rng[0], rng[1]
    groups = -(-cols // GROUP)
    g = torch.arange(rows * groups, dtype=torch.int64, device=rng.device)
    counter = [g & MASK, (g >> 32) & MASK, offset & MASK, torch.full_like(offset, stream)]
    words = philox4x32(counter, [seed & MASK, (seed >> 32) & MASK])
    return draws_of_words(words).reshape(rows, groups * GROUP)[:, :cols].contiguous()
