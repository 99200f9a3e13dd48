"""The kernel of csrc/cuda/quantize_pairs.cu: bfloat16 to mxfp4, nearest, blocks across rows, byte
for byte.

A word holds the elements of two operand rows, so what could go wrong is that one row's values reach
the other's codes; and the edges of tiles of 256 x 64, and what is left to the general kernels.
"""

from __future__ import annotations

import pytest
import torch
from common import RULES, check_quantize, wide_range

pytestmark = pytest.mark.ops("quantize")


@pytest.mark.parametrize("rule", RULES)
def test_blocks_of_every_exponent(rule, device):
    check_quantize(wide_range(384, 576).T, "mxfp4", device, scale_rule=rule)
    check_quantize(wide_range(192, 320, 1), "mxfp4", device, scale_rule=rule, transpose=True)


@pytest.mark.parametrize("rule", RULES)
def test_every_value_beside_another_of_any_kind(rule, device):
    every = (torch.arange(1 << 16) * 40503 % (1 << 16)).to(torch.int32)  # odd: each value once
    every = torch.where(every < 1 << 15, every, every - (1 << 16)).to(torch.int16)
    x = torch.randn(32, 1 << 16, generator=torch.Generator().manual_seed(5)).bfloat16()
    x[7] = every.view(torch.bfloat16)
    check_quantize(x, "mxfp4", device, scale_rule=rule, transpose=True)


@pytest.mark.parametrize("swizzle", [False, True])
@pytest.mark.parametrize(
    "shape", [(1, 64), (64, 2), (33, 62), (255, 66), (256, 64), (257, 128), (513, 190), (96, 63)]
)
def test_edges_of_tiles(shape, swizzle, device):
    torch.manual_seed(shape[0])
    more = dict(transpose=True, swizzle=swizzle)
    check_quantize(torch.randn(shape).bfloat16(), "mxfp4", device, **more)
    wide = torch.randn(shape[0], shape[1] + 25).bfloat16()
    for first in (1, 2, 8):  # pitches of both parities, views that start anywhere
        for pitch in (24, 25):
            view = wide[:, : shape[1] + pitch].contiguous()[:, first : first + shape[1]]
            check_quantize(view, "mxfp4", device, **more)
    check_quantize(wide[:1].expand(70, -1)[:, : shape[1]], "mxfp4", device, **more)
