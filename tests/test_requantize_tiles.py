"""The kernel of csrc/cuda/requantize_codes.cu: mxfp4 to mxfp4, stochastic, byte for byte.

A tile of 128 x 256 codes is rounded in place in shared memory, so what could go wrong is where its
bytes lie (checked on any machine), its edges, more tiles than run at once, and
squares that leave the fast path beside squares that do not. test_strips.py has its scales.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from common import RULES, assert_same_bytes
from torch import Tensor

import mxtrain
from mxtrain import reference

pytestmark = pytest.mark.ops("requantize")

RNG = torch.tensor([0x123456789ABCDEF, 2**33 + 7])


@pytest.fixture(scope="module")
def tile():
    host = pytest.importorskip("mxtrain._host", reason="this library was built for another Python")
    return host.code_tile()


def random_operand(rows: int, cols: int, first: int = 118, last: int = 122) -> tuple:
    """Any codes, also in the padding; scales from first to last."""
    generator = torch.Generator().manual_seed(rows * 10007 + cols)
    blocks = -(-cols // 32)
    data = torch.randint(0, 256, (rows, 16 * blocks), dtype=torch.uint8, generator=generator)
    scale = torch.randint(first, last + 1, (rows, blocks), dtype=torch.uint8, generator=generator)
    return data, scale, generator


def check(data: Tensor, scale: Tensor, cols: int, device, **options) -> None:
    operand = mxtrain.Operand(data.to(device), scale.to(device), "mxfp4", (len(data), cols))
    options["rounding"] = "stochastic"
    got = mxtrain.requantize(operand, rng=RNG.to(device), **options)
    want = reference.requantize(data, scale, None, "mxfp4", cols, rng=RNG, **options)
    assert_same_bytes(got.scale, want[1])
    assert_same_bytes(got.data, want[0])


# ---- where a tile's bytes lie, on any machine ----


def assert_each_bank_once(offsets: np.ndarray) -> None:
    """16-byte accesses, [..., 8 lanes that are served at once]: 8 times 4 of the 32 banks."""
    groups = np.sort(offsets // 16 % 8, axis=-1)
    assert (groups == np.arange(8)).all()


def test_rows_and_columns_fill_the_same_bytes(tile):
    rows, columns = tile["chunk"], tile["column"]
    assert (rows.ravel() == np.arange(0, 128 * 128, 16)).all()
    assert (np.sort(columns.reshape(4, -1), axis=1) == rows.reshape(4, -1)).all()  # by bands
    # A lane's columns lie in 128 bytes that are no other lane's.
    assert (columns // 128 == np.arange(128).reshape(4, 32, 1)).all()
    assert_each_bank_once(columns.transpose(0, 2, 1).reshape(4, 8, 4, 8))
    assert_each_bank_once(rows)


def test_stores_take_every_block_once(tile):
    thread, step = np.indices((128, 8))
    column, band = thread // 4 + 32 * step, thread % 4
    assert (tile["stored"] == tile["column"][band, column // 8, column % 8]).all()
    assert len(np.unique(tile["stored"])) == 1024
    assert_each_bank_once(tile["stored"].T.reshape(8, 16, 8))


def test_scales_of_a_column_are_a_word(tile):
    scales, column = tile["block_scale"], tile["scaled_column"][:, 0]
    assert (np.sort(column) == np.arange(256)).all()
    words = scales[:, column // 8, column % 8].T  # [word, band]
    assert (words == np.arange(1024).reshape(256, 4)).all()


# ---- the kernel ----


@pytest.mark.parametrize("swizzle", [False, True])
@pytest.mark.parametrize(
    "shape", [(128, 256), (127, 257), (129, 255), (512, 768), (33, 1000), (1000, 33), (700, 520)]
)
def test_edges_of_tiles(shape, swizzle, device):
    data, scale, _ = random_operand(*shape)
    check(data, scale, shape[1], device, swizzle=swizzle)


@pytest.mark.parametrize("rule", RULES)
def test_squares_of_both_paths_side_by_side(rule, device):
    data, scale, generator = random_operand(700, 900, 113, 121)
    for code in (0, 90, 255):
        scale[torch.rand(scale.shape, generator=generator) < 0.002] = code
    check(data, scale, 900, device, scale_rule=rule)
    check(data, scale, 900, device, scale_rule=rule, prescale=0.75)


@pytest.mark.parametrize("shift", [1, 4, 8, 16])
@pytest.mark.parametrize("which", ["data", "scale"])
def test_operands_that_start_anywhere(which, shift, device):
    data, scale, _ = random_operand(300, 512)
    moved = {"data": data.to(device), "scale": scale.to(device)}
    t = moved[which]
    buffer = torch.empty(t.numel() + shift, dtype=torch.uint8, device=device)
    moved[which] = buffer[shift:].view(t.shape).copy_(t)
    got = mxtrain.requantize(
        mxtrain.Operand(moved["data"], moved["scale"], "mxfp4", (300, 512)),
        rounding="stochastic",
        rng=RNG.to(device),
    )
    want = reference.requantize(data, scale, None, "mxfp4", 512, rounding="stochastic", rng=RNG)
    assert_same_bytes(got.scale, want[1])
    assert_same_bytes(got.data, want[0])


def test_more_tiles_than_run_at_once(device):
    """Against the CPU's kernel."""
    sms = 2
    if torch.device(device).type == "cuda":
        sms = torch.cuda.get_device_properties(device).multi_processor_count
    # 9 CTAs a multiprocessor, 20 tiles below one another.
    rows, cols = 128 * 20 - 3, 256 * -(-2 * 9 * sms // 20) + 64
    data, scale, _ = random_operand(rows, cols)
    scale[::997, ::3] = 60
    made = [
        mxtrain.requantize(
            mxtrain.Operand(data.to(d), scale.to(d), "mxfp4", (rows, cols)),
            rounding="stochastic",
            rng=RNG.to(d),
        )
        for d in (device, "cpu")
    ]
    assert_same_bytes(made[0].scale, made[1].scale)
    assert_same_bytes(made[0].data, made[1].data)
