"""One block-scaled mma.sync: its operands as matrices, as registers, and its plain product.

The registers are packed here by the thread-value layouts that CUTLASS publishes for the instruction
(include/cute/atom/mma_traits_sm120.hpp and mma_traits_sm80.hpp, SM80_16x8_Row), which are another
statement of what csrc/ptx/block_scale.h takes from the PTX ISA. Which scale is read where the
thread and byte ids are not 0 is taken from the PTX ISA here, too: CUTLASS passes zeros. For these
only the probe on the chip (python -m mxtrain.env --selftest) is another witness.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

import mxtrain

FORMATS = ["mxfp4", "nvfp4", "mxfp8_e4m3", "mxfp8_e5m2"]


def layout(shape: tuple, stride: tuple) -> np.ndarray:
    """A CuTe layout's offsets by the linear index of its coordinates, the first the fastest."""
    offsets = np.zeros(1, int)
    for size, step in zip(shape, stride, strict=True):
        offsets = (np.arange(size)[:, None] * step + offsets[None, :]).reshape(-1)
    return offsets


def pairs(threads: tuple, values: tuple, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """(row, column) of [lane, value] from shape and stride of both, offsets row + rows * column."""
    offsets = layout(*threads)[:, None] + layout(*values)[None, :]
    return offsets % rows, offsets // rows


def codes_of_a(per_word: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and k of A's codes in lane order, [32, 4 * per_word]."""
    k = 8 * per_word
    return pairs(((4, 8), (2 * k, 1)), ((per_word, 2, 2), (16, 8, 8 * k)), 16)


def codes_of_b(per_word: int) -> tuple[np.ndarray, np.ndarray]:
    k = 8 * per_word
    return pairs(((4, 8), (k, 1)), ((per_word, 2), (8, 4 * k)), 8)


def values_of_d() -> tuple[np.ndarray, np.ndarray]:
    return pairs(((4, 8), (32, 1)), ((2, 2), (16, 8)), 16)


# The row whose scales a lane holds: of A's SFALayout the stride 0 is the pair that thread_a picks,
# of B's the one that thread_b picks.
SCALES_OF_A = layout((2, 2, 8), (8, 0, 1))
SCALES_OF_B = layout((4, 8), (0, 1))


def lane_of_scale(factor: str, row: int, thread: int) -> int:
    holds, group = (SCALES_OF_A, 2) if factor == "a" else (SCALES_OF_B, 1)
    (lane,) = (x for x in np.flatnonzero(holds == row) if x % 4 // group == thread)
    return int(lane)


def selectors(format: str, probed: bool = False) -> list[tuple[int, int, int, int]]:
    """Every legal (byte_a, thread_a, byte_b, thread_b); of the probe, those that it has."""
    scales = Shape.of(format).scales
    bytes_ = range(0, 4, scales)
    found = itertools.product(bytes_, range(2), bytes_, range(4))
    if probed:
        return [s for s in found if s[0] + s[2] == 4 - scales and s[1] == s[3] % 2]
    return list(found)


@dataclass(frozen=True)
class Shape:
    """What one instruction of a format multiplies: A [16, k] and B [8, k], scales [., scales]."""

    bits: int
    k: int
    scales: int

    @staticmethod
    def of(format: str) -> Shape:
        f = mxtrain.FORMATS[format]
        k = 256 // f.bits
        return Shape(f.bits, k, k // f.block)


@dataclass
class Operands:
    """`count` products: codes uint8 [count, rows, k], scale codes [count, rows, scales], C."""

    format: str
    a: np.ndarray
    b: np.ndarray
    scale_a: np.ndarray
    scale_b: np.ndarray
    c: np.ndarray

    def product(self) -> np.ndarray:
        """D in float64, [count, 16, 8]."""
        left, right = (
            self.values(x, s) for x, s in ((self.a, self.scale_a), (self.b, self.scale_b))
        )
        return np.einsum("imk,ink->imn", left, right) + self.c

    def values(self, codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
        f = mxtrain.FORMATS[self.format]
        of_codes = VALUES["e2m1" if f.bits == 4 else self.format[6:]][codes]
        of_scales = VALUES["e4m3" if f.two_level else "e8m0"][scales]
        return of_codes * np.repeat(of_scales, f.block, axis=2)

    def registers(self, s: tuple[int, int, int, int], rng: np.random.Generator) -> list:
        """a, b, scale_a, scale_b (uint32), c (float32) of all lanes; noise where none is read."""
        shape = Shape.of(self.format)
        per_word = 32 // shape.bits
        shifts = (shape.bits * np.arange(per_word)).astype(np.uint32)
        words = []
        for codes, (row, k) in ((self.a, codes_of_a(per_word)), (self.b, codes_of_b(per_word))):
            held = codes[:, row, k].astype(np.uint32).reshape(len(codes), 32, -1, per_word)
            words.append(np.bitwise_or.reduce(held << shifts, axis=3))
        for factor, scales, byte, thread in (
            ("a", self.scale_a, *s[:2]),
            ("b", self.scale_b, *s[2:]),
        ):
            held = rng.integers(0, 256, (len(scales), 32, 4), dtype=np.uint8)
            for row in range(scales.shape[1]):
                lane = lane_of_scale(factor, row, thread)
                held[:, lane, byte : byte + shape.scales] = scales[:, row]
            words.append(held.view("<u4")[:, :, 0])
        row, column = values_of_d()
        return [*words, self.c[:, row, column].astype(np.float32)]

    def unpack(self, d: np.ndarray) -> np.ndarray:
        """D [count, 16, 8] from what the lanes got, [count, 32, 4]."""
        out = np.full((len(d), 16, 8), np.nan)
        row, column = values_of_d()
        out[:, row, column] = d
        return out


def _minifloat(exp_bits: int, man_bits: int, special: str) -> np.ndarray:
    """The values of a small float's codes, straight from its definition."""
    bits = 1 + exp_bits + man_bits
    code = np.arange(1 << bits)
    exponent, mantissa = code >> man_bits & (1 << exp_bits) - 1, code & (1 << man_bits) - 1
    bias = (1 << exp_bits - 1) - 1
    fraction = mantissa / 2.0**man_bits + (exponent > 0)
    value = fraction * 2.0 ** (np.maximum(exponent, 1) - bias)
    if special == "ieee":
        value[exponent == (1 << exp_bits) - 1] = np.inf
        value[(exponent == (1 << exp_bits) - 1) & (mantissa > 0)] = np.nan
    if special == "nan":
        value[code & (1 << bits - 1) - 1 == (1 << bits - 1) - 1] = np.nan
    return np.where(code >> bits - 1, -value, value)


VALUES = {
    "e2m1": _minifloat(2, 1, ""),
    "e4m3": _minifloat(4, 3, "nan"),
    "e5m2": _minifloat(5, 2, "ieee"),
    "e8m0": np.append(2.0 ** (np.arange(255) - 127.0), np.nan),
}


def codes(format: str, shape: tuple, rng: np.random.Generator) -> np.ndarray:
    """Codes of any sign whose products sum exactly in float32, under scale_codes' scales."""
    if mxtrain.FORMATS[format].bits == 4:
        return rng.integers(0, 16, shape, dtype=np.uint8)
    low, high = (0x30, 0x48) if format == "mxfp8_e4m3" else (0x38, 0x44)  # 0.5 to 4, 3 binades
    return (rng.integers(low, high, shape) | rng.integers(0, 2, shape) << 7).astype(np.uint8)


def scale_codes(format: str, shape: tuple, rng: np.random.Generator) -> np.ndarray:
    low, high = (0x38, 0x48) if format == "nvfp4" else (126, 129)  # E4M3: 1 to 4; E8M0: 1/2 to 2
    return rng.integers(low, high, shape, dtype=np.uint8)


def random_operands(format: str, count: int, rng: np.random.Generator) -> Operands:
    shape = Shape.of(format)
    c = rng.integers(-64, 65, (count, 16, 8)) / 4.0
    return Operands(
        format,
        codes(format, (count, 16, shape.k), rng),
        codes(format, (count, 8, shape.k), rng),
        scale_codes(format, (count, 16, shape.scales), rng),
        scale_codes(format, (count, 8, shape.scales), rng),
        c,
    )


def one_hot(format: str, factor: str, rng: np.random.Generator) -> Operands:
    """A product for each element of a factor ("a", "b"): it is 1.0 and the others are 0."""
    shape = Shape.of(format)
    rows = 16 if factor == "a" else 8
    x = random_operands(format, rows * shape.k, rng)
    one = {"mxfp8_e4m3": 0x38, "mxfp8_e5m2": 0x3C}.get(format, 0x2)
    hot = (np.eye(rows * shape.k, dtype=np.uint8) * one).reshape(-1, rows, shape.k)
    setattr(x, factor, hot)
    return x


def one_scale(format: str, factor: str, rng: np.random.Generator) -> Operands:
    """A product for each scale of a factor: it is 2 and the others of both factors are 1."""
    shape = Shape.of(format)
    rows = 16 if factor == "a" else 8
    x = random_operands(format, rows * shape.scales, rng)
    one, two = (0x38, 0x40) if format == "nvfp4" else (127, 128)
    x.scale_a[:], x.scale_b[:] = one, one
    hot = np.eye(rows * shape.scales, dtype=bool).reshape(-1, rows, shape.scales)
    (x.scale_a if factor == "a" else x.scale_b)[hot] = two
    return x
