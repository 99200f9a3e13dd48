"""The block-scaled mma.sync: its tables, its emulation, and on a GPU what the wrappers give.

On the CPU the emulation's own source runs (csrc/ptx/block_scale.h, through mxtrain._host); on a GPU
the probe of csrc/cuda/sm120, which is the emulation on Hopper and the instruction itself on 12.x.
Both are compared with the plain product, float64, of operands whose sums are exact: every code and
every scale as the only one that counts, and random ones under every selector, with noise in all
registers that must not be read.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mma_common import (
    FORMATS,
    SCALES_OF_A,
    Operands,
    Shape,
    codes_of_a,
    codes_of_b,
    lane_of_scale,
    one_hot,
    one_scale,
    random_operands,
    selectors,
    values_of_d,
)
from sm120_common import SM120_BACKEND

import mxtrain
from mxtrain._library import mma_probe

host = pytest.importorskip("mxtrain._host", reason="this library was built for another Python")

DEVICES = ["cpu"] + (["cuda"] if SM120_BACKEND else [])


@pytest.fixture(params=DEVICES)
def where(request) -> str:
    return request.param


# ---- the tables ----


@pytest.mark.parametrize("per_word", [4, 8])
@pytest.mark.parametrize("factor", ["a", "b", "d"])
def test_fragments_are_the_published_layouts(factor, per_word):
    table = host.fragment_table(factor, per_word).reshape(32, -1, 2)
    published = {"a": codes_of_a(per_word), "b": codes_of_b(per_word), "d": values_of_d()}[factor]
    assert np.array_equal(table, np.stack(published, axis=2))
    places = {(int(row), int(k)) for row, k in table.reshape(-1, 2)}
    assert len(places) == table[..., 0].size  # no place twice, so all


def test_fragments_as_the_ptx_isa_words_them():
    """PTX ISA 9.0, "Matrix Fragments for mma.m16n8k64": A's a_i, i = 0 to 31, and B's b_i."""
    a, b = host.fragment_table("a", 8), host.fragment_table("b", 8)
    for lane in range(32):
        group, thread = lane >> 2, lane % 4
        for i in range(32):
            row = group if i < 8 or 16 <= i < 24 else group + 8
            k = thread * 8 + (i & 7) + (32 if i >= 16 else 0)
            assert tuple(a[lane, i // 8, i % 8]) == (row, k)
        for i in range(16):
            k = thread * 8 + (i & 7) + (32 if i >= 8 else 0)
            assert tuple(b[lane, i // 8, i % 8]) == (group, k)


def test_scales_come_from_the_published_lanes():
    for row in range(16):
        assert [host.scale_lane("a", row, t) for t in range(2)] == [
            lane_of_scale("a", row, t) for t in range(2)
        ]
    for row in range(8):
        assert [host.scale_lane("b", row, t) for t in range(4)] == [
            lane_of_scale("b", row, t) for t in range(4)
        ]
    # thread_a = 0 is the first pair of each quad of lanes: PTX ISA, "Block Scaling for mma.sync".
    assert {host.scale_lane("a", row, 0) % 4 for row in range(16)} == {0, 1}
    assert {host.scale_lane("a", row, 1) % 4 for row in range(16)} == {2, 3}
    assert SCALES_OF_A[1] == 8


# ---- the product ----


def multiply(x: Operands, s: tuple, where: str, seed: int = 1) -> np.ndarray:
    """D [count, 16, 8] by the emulation on the CPU, or by the probe on the GPU."""
    registers = x.registers(s, np.random.default_rng(seed))
    code = mxtrain.FORMATS[x.format].code
    if where == "cpu":
        d = np.stack([host.mma_block_scale(code, s, *one) for one in zip(*registers, strict=True)])
        return x.unpack(d)
    words = [torch.from_numpy(np.ascontiguousarray(r).view(np.int32)) for r in registers[:4]]
    return x.unpack(mma_probe(code, s, [*words, torch.from_numpy(registers[4])]).numpy())


def check(x: Operands, s: tuple, where: str) -> None:
    got, expected = multiply(x, s, where), x.product()
    assert np.array_equal(expected, expected.astype(np.float32)), "the sums must be exact"
    assert np.array_equal(got, expected), (x.format, s, np.argwhere(got != expected)[:4])


@pytest.mark.parametrize("factor", ["a", "b"])
@pytest.mark.parametrize("format", FORMATS)
def test_every_element_by_itself(format, factor, where):
    rng = np.random.default_rng(0)
    check(one_hot(format, factor, rng), selectors(format, probed=True)[-1], where)


@pytest.mark.parametrize("factor", ["a", "b"])
@pytest.mark.parametrize("format", FORMATS)
def test_every_scale_by_itself(format, factor, where):
    rng = np.random.default_rng(1)
    for s in selectors(format, probed=True):
        check(one_scale(format, factor, rng), s, where)


@pytest.mark.parametrize("format", FORMATS)
def test_random_operands_under_every_selector(format, where):
    rng = np.random.default_rng(2)
    for s in selectors(format, probed=where == "cuda"):
        check(random_operands(format, 4 if where == "cpu" else 64, rng), s, where)


def test_the_probe_has_every_selector_of_either_factor():
    for format in FORMATS:
        for half in (slice(0, 2), slice(2, 4)):
            assert {s[half] for s in selectors(format, probed=True)} == {
                s[half] for s in selectors(format)
            }


@pytest.mark.parametrize("format", FORMATS)
def test_a_nan_scale_marks_its_row_even_of_zeros(format, where):
    x = random_operands(format, 2, np.random.default_rng(3))
    x.a[:] = 0
    x.scale_a[0, 11, -1] = x.scale_b[1, 6, 0] = 0x7F if format == "nvfp4" else 255
    expected = np.zeros((2, 16, 8), bool)
    expected[0, 11, :] = expected[1, :, 6] = True
    got = multiply(x, selectors(format, probed=True)[0], where)
    assert np.array_equal(np.isnan(got), expected)


@pytest.mark.parametrize("format", FORMATS)
def test_sums_are_float32_in_the_order_of_k(format):
    """The emulation's own order, which the bytes of sm120_emulated follow."""
    rng = np.random.default_rng(4)
    shape = Shape.of(format)
    x = random_operands(format, 1, rng)
    x.scale_a[:] = rng.integers(0x20, 0x60, x.scale_a.shape) if format == "nvfp4" else rng.integers(
        110, 145, x.scale_a.shape
    )  # fmt: skip
    left, right = x.values(x.a, x.scale_a)[0], x.values(x.b, x.scale_b)[0]
    sums = x.c[0].astype(np.float32)
    for k in range(shape.k):
        sums = sums + np.outer(left[:, k], right[:, k]).astype(np.float32)
    assert np.array_equal(multiply(x, selectors(format)[0], "cpu")[0], sums)


def test_arguments_that_no_instruction_takes_are_refused():
    x = random_operands("mxfp4", 1, np.random.default_rng(5))
    one = [r[0] for r in x.registers((0, 0, 0, 0), np.random.default_rng(6))]
    for bad in [(1, 0, 0, 0), (0, 2, 0, 0), (0, 0, 3, 0), (0, 0, 0, 4), (-2, 0, 0, 0)]:
        with pytest.raises(ValueError, match="mma_block_scale: the arguments must be what one"):
            host.mma_block_scale(0, bad, *one)
    with pytest.raises(ValueError, match="mma_block_scale"):
        host.mma_block_scale(1, (0, 0, 0, 0), *one)  # 6-bit codes
