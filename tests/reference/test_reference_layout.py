"""The 128x4 scale layout against its formula and torchao's to_blocked."""

from __future__ import annotations

import pytest
import torch
from common import refuses

import mxtrain.reference as ref

SHAPES = [(1, 1), (128, 4), (129, 5), (32, 3), (256, 12), (300, 9)]


def random_scale(rows: int, cols: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(31)
    return torch.randint(1, 256, (rows, cols), generator=generator).to(torch.uint8)


@pytest.mark.parametrize("shape", SHAPES)
def test_swizzle_formula(shape: tuple[int, int]) -> None:
    rows, cols = shape
    scale = random_scale(rows, cols)
    swizzled = ref.swizzle(scale)
    assert swizzled.shape == (-(-rows // 128), -(-cols // 4), 512) and swizzled.is_contiguous()
    expected = torch.zeros_like(swizzled)
    for r in range(rows):
        for c in range(cols):
            offset = (r % 32) * 16 + (r // 32 % 4) * 4 + c % 4
            expected[r // 128, c // 4, offset] = scale[r, c]
    assert torch.equal(swizzled, expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_swizzle_matches_torchao(shape: tuple[int, int]) -> None:
    utils = pytest.importorskip("torchao.prototype.mx_formats.utils")
    scale = random_scale(*shape)
    assert torch.equal(ref.swizzle(scale).flatten(), utils.to_blocked(scale).flatten())


@pytest.mark.parametrize("shape", SHAPES)
def test_round_trip(shape: tuple[int, int]) -> None:
    scale = random_scale(*shape)
    assert torch.equal(ref.unswizzle(ref.swizzle(scale), *shape), scale)


def test_bad_shapes_raise() -> None:
    with refuses(ValueError, match="2 dimensions"):
        ref.swizzle(torch.zeros(3, dtype=torch.uint8))
    with refuses(ValueError, match="must have shape"):
        ref.unswizzle(torch.zeros(1, 1, 512, dtype=torch.uint8), 129, 4)
