"""Operands of int8_block and the functions that make and multiply them.

A matrix [R, K] as int8 codes in [-127, 127] that share a float32 scale in squares of 128 x 128.
A square is its own transpose, so x and x.T are quantized at once, and what backward multiplies is
what forward multiplied. A block whose largest magnitude exceeds a threshold *falls back*: what the
codes leave of it is quantized once more, which makes some 16 bits of its 8.
Source: arXiv 2503.08040; docs/numerics.md defines the bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import (
    check_dtype,
    check_int,
    check_name,
    check_number,
    check_tensor,
    kind,
    refusal,
    show,
)
from .formats import INT8_BLOCK, INT8_LAYOUTS, ROUNDINGS
from .int8_ops import BLOCK, blocks

_ops = torch.ops.mxtrain


@dataclass(frozen=True, eq=False)  # tensors have no one truth of ==
class Int8Operand:
    """A logical `[R, K]` matrix in int8_block. value = scale * data (+ residual_scale * residual).

    Attributes:
        data: int8 `[R, Kp]`; Kp is K rounded up to 128, the tail zero.
        scale: float32 `[ceil(R/128), Kp/128]`, any strides; NaN for a block that is not finite.
        shape: (R, K).
        residual: int8 like data, written only in blocks that fell back; None without a fallback.
            Or a pool of such blocks alone, `[tiles, 128, 128]` (see `packed`).
        residual_scale: float32 like scale.
        mask: uint8 like scale, 1 where the block fell back. With a pool int32: 1 + the number of
            the block's tile, 0 where it has none.
    """

    data: Tensor
    scale: Tensor
    shape: tuple[int, int]
    residual: Tensor | None = None
    residual_scale: Tensor | None = None
    mask: Tensor | None = None

    format = INT8_BLOCK

    def __post_init__(self) -> None:
        what = "Int8Operand"
        check_tensor(what, "data", self.data)
        check_tensor(what, "scale", self.scale)
        for name in ("residual", "residual_scale", "mask"):
            check_tensor(what, name, getattr(self, name), optional=True)
        if not isinstance(self.shape, tuple) or len(self.shape) != 2:
            got, advice = show(self.shape), "Pass what int8_quantize returned."
            raise TypeError(
                refusal(what, "shape", "be a tuple (R, K)", got, kind(self.shape), advice)
            )
        given = sum(t is not None for t in (self.residual, self.residual_scale, self.mask))
        if given not in (0, 3):
            name, advice = "residual, residual_scale and mask", "Pass what int8_quantize returned."
            got, context = f"{given} of them", f"shape {self.shape}"
            raise ValueError(refusal(what, name, "be given together", got, context, advice))
        for size in self.shape:
            check_int(what, "shape", size, low=0)
        if self.data.dim() != 2 or self.data.shape[0] != self.shape[0]:
            context, advice = f"data {list(self.data.shape)}", "Pass what int8_quantize returned."
            raise ValueError(
                refusal(what, "shape", "have data's rows", self.shape, context, advice)
            )

    def __repr__(self) -> str:
        """Without the codes and scales, which may be large and on a GPU."""
        residual = ", with residual" if self.residual is not None else ""
        return f"Int8Operand(shape={self.shape}, device='{self.data.device}'{residual})"

    @property
    def parts(self) -> tuple[Tensor | None, ...]:
        """Every tensor of it; `Int8Operand.of(parts, shape)` is the inverse."""
        return self.data, self.scale, self.residual, self.residual_scale, self.mask

    @classmethod
    def of(cls, parts: tuple[Tensor | None, ...], shape: tuple[int, int]) -> Int8Operand:
        """The operand of these parts."""
        data, scale, *residual = parts
        return cls(data, scale, shape, *residual)

    @property
    def nbytes(self) -> int:
        """Bytes of everything it holds."""
        return sum(t.nbytes for t in self.parts if t is not None)

    def without_fallback(self) -> Int8Operand:
        """The same codes, without the residual."""
        return Int8Operand(self.data, self.scale, self.shape)

    @property
    def is_packed(self) -> bool:
        """Whether the residual is a pool."""
        return self.residual is not None and self.residual.dim() == 3

    def packed(self, count: int) -> Int8Operand:
        """The same with the residuals of at most `count` blocks, in a pool of 16 KB for each.

        Those of the blocks with the largest scale are kept; the others are as if they had not
        fallen back. `int8_gemm` multiplies the result as it is. How many fell back is the first
        of `int8_quantize_fallback`'s counts, on the device; a share of the blocks needs no wait.

        Args:
            count: from 0 to the number of blocks. An operand with a pool of no more tiles, or
                without a residual, is returned as it is.

        Raises:
            TypeError: for a count that is not an int.
            ValueError: for a negative one.
            RuntimeError: for one above the number of blocks.
        """
        check_int("Int8Operand.packed", "count", count, low=0)
        if self.residual is None or (self.is_packed and len(self.residual) <= count):
            return self
        op = self.unpacked()
        pool, slots = _ops.int8_pack_residual(op.residual, op.scale, op.mask, count)
        return Int8Operand(self.data, self.scale, self.shape, pool, self.residual_scale, slots)

    def unpacked(self) -> Int8Operand:
        """The same with the residual like data, not in a pool."""
        if not self.is_packed:
            return self
        residual = _ops.int8_unpack_residual(self.residual, self.mask, *self.data.shape)
        fell_back = (self.mask > 0) & (self.mask <= len(self.residual))
        grids = self.residual_scale, fell_back.to(torch.uint8)
        return Int8Operand(self.data, self.scale, self.shape, residual, *grids)

    def transposed(self) -> Int8Operand:
        """The operand `[K, R]` of the transpose: exact, by moving codes; a pool is unpacked."""
        if self.is_packed:
            return self.unpacked().transposed()
        r, k = self.shape

        def turn(codes: Tensor | None) -> Tensor | None:
            return None if codes is None else F.pad(codes[:, :k].t(), (0, -r % BLOCK)).contiguous()

        def flip(grid: Tensor | None) -> Tensor | None:
            return None if grid is None else grid.t()

        grids = (self.residual_scale, self.mask)
        turned = turn(self.data), self.scale.t()
        return Int8Operand(*turned, (k, r), turn(self.residual), *map(flip, grids))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values as `[R, K]` of dtype; float32 arithmetic, residual included."""
        check_dtype("dequantize", "dtype", dtype)
        r, k = self.shape

        def spread(grid: Tensor) -> Tensor:
            return grid.repeat_interleave(BLOCK, 0)[:r].repeat_interleave(BLOCK, 1)[:, :k]

        value = spread(self.scale) * self.data[:, :k]
        if self.residual is not None:
            op = self.unpacked()
            second = spread(op.residual_scale) * op.residual[:, :k]
            value = torch.where(spread(op.mask).bool(), value + second, value)
        return value.to(dtype)


def _pair(
    x: Tensor, layout: str, data: Tensor, data_t: Tensor, scale: Tensor,
    residual: Tensor | None = None, residual_t: Tensor | None = None,
    residual_scale: Tensor | None = None, mask: Tensor | None = None,
) -> Int8Operand | tuple[Int8Operand, Int8Operand]:  # fmt: skip
    r, k = x.shape
    row = transposed = None
    if layout != "transposed":
        row = Int8Operand(data, scale, (r, k), residual, residual_scale, mask)
    if layout != "row":
        grids = [None if t is None else t.t() for t in (residual_scale, mask)]
        transposed = Int8Operand(data_t, scale.t(), (k, r), residual_t, *grids)
    return (row, transposed) if layout == "both" else row if transposed is None else transposed


def int8_quantize(
    x: Tensor, *, rounding: str = "nearest", rng: Tensor | None = None, layout: str = "row"
) -> Int8Operand | tuple[Int8Operand, Int8Operand]:
    """Quantize a matrix to int8_block, from one read of it.

    scale = max|block| / 127, code = round(x / scale); a block with NaN or Inf has the scale NaN.

    Args:
        x: `[R, K]` with elements, bfloat16, float16 or float32, any strides.
        rounding: "nearest" (ties to even) or "stochastic" (needs rng).
        rng: int64 `[2]` (seed, offset) on x's device; see `draw_rng`.
        layout: "row" for the operand of x, "transposed" for that of x.T, "both" for the two, whose
            codes are the same.

    Returns:
        Int8Operand of shape (R, K), of (K, R), or the pair.

    Raises:
        ValueError: for an unknown name.
        RuntimeError: for tensors that do not fit.
    """
    what = "int8_quantize"
    check_tensor(what, "x", x)
    check_name(what, "rounding", rounding, ("nearest", "stochastic"))
    check_tensor(what, "rng", rng, optional=True)
    check_name(what, "layout", layout, INT8_LAYOUTS)
    parts = _ops.int8_quantize(x, ROUNDINGS[rounding], rng, INT8_LAYOUTS[layout])
    return _pair(x, layout, *parts)


def int8_quantize_fallback(
    x: Tensor, threshold: Tensor | float, *, layout: str = "row"
) -> tuple[Int8Operand | tuple[Int8Operand, Int8Operand], Tensor]:
    """Quantize to int8_block, nearest, and once more what that leaves of the blocks above a limit.

    Args:
        x, layout: as in `int8_quantize`.
        threshold: positive; a float32 tensor of one element on x's device, or a number. A block
            falls back where its largest magnitude is greater. (On CUDA the value of a tensor is
            not looked at by the host; where it is not positive every scale is NaN.)

    Returns:
        What `int8_quantize` returns, with residuals, and counts int64 `[3]` on x's device: blocks
        that fell back, blocks with NaN or Inf (which do not), blocks that are not all zero.

    Raises:
        ValueError: for an unknown name or a number that is not positive.
        RuntimeError: for tensors that do not fit.
    """
    what = "int8_quantize_fallback"
    check_tensor(what, "x", x)
    check_name(what, "layout", layout, INT8_LAYOUTS)
    if not isinstance(threshold, Tensor):
        check_number(what, "threshold", threshold)
        if not threshold > 0:
            advice = "Blocks whose largest magnitude lies above it fall back."
            got, context = show(threshold), kind(threshold)
            raise ValueError(refusal(what, "threshold", "be positive", got, context, advice))
        threshold = torch.full((1,), threshold, dtype=torch.float32, device=x.device)
    check_tensor(what, "threshold", threshold)
    data, data_t, scale, *rest, counts = _ops.int8_quantize_fallback(
        x, threshold, INT8_LAYOUTS[layout]
    )
    return _pair(x, layout, data, data_t, scale, *rest), counts


def _check_operand(what: str, argument: str, value: object) -> None:
    if not isinstance(value, Int8Operand):
        got, advice = type(value).__name__, "Make one with mxtrain.int8_quantize."
        raise TypeError(refusal(what, argument, "be an Int8Operand", got, show(value), advice))


def _residual_tail(op: Int8Operand) -> Tensor:
    """The residual's codes beyond K, of the blocks that fell back."""
    k, last = op.shape[1], op.mask[:, -1]
    if op.is_packed:
        tiles = last[(last > 0) & (last <= len(op.residual))].long() - 1
        return op.residual[tiles][:, :, k % BLOCK :]
    fallen = last.repeat_interleave(BLOCK)[: op.shape[0], None] != 0
    return torch.where(fallen, op.residual[:, k:], 0)


def _check_tail(what: str, name: str, op: Int8Operand) -> None:
    """On the CPU, RuntimeError where codes beyond K are not zero: the op does not know K.

    Of an operand that the op took.
    """
    k = op.shape[1]
    real = type(op.data) is Tensor and op.data.device.type == "cpu"
    if torch.compiler.is_compiling() or not real or op.data.shape[1] == k:
        return
    bad = None
    if op.data[:, k:].any():
        bad = name
    elif op.residual is not None and _residual_tail(op).any():
        bad = "residual"
    if bad is not None:
        condition, got = f"hold zeros beyond K = {k}", "other codes"
        context, advice = f"shape {list(op.data.shape)}", "Pass what int8_quantize returned."
        raise RuntimeError(refusal(what, bad, condition, got, context, advice))


def int8_gemm(
    a: Int8Operand, b: Int8Operand, bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # fmt: skip
    """D = A B^T + bias for A `[M, K]` and B `[N, K]`, of which one may have a residual.

    Per block of K, ascending: acc = fma(scale_a * scale_b, integer product, acc) in float32, then
    the same for the residual where the block fell back. The integer products are exact and the
    order is fixed, so CPU and CUDA give the same bytes.

    What the operands hold must be what int8_quantize writes: codes in [-127, 127], zeros beyond K,
    scales of at least 0 or NaN; of a residual, where the mask is set; of a pool, slots within it.
    On the CPU that is checked. On CUDA it is not, for the host would have to wait: what breaks it
    is multiplied as it stands, without an error (-128 as -128, codes beyond K as if K were longer,
    a slot beyond the pool as a tile of zeros).

    Args:
        a, b: operands with the same K.
        bias: `[N]` float vector, or None.
        out_dtype: bfloat16, float16 or float32.

    Returns:
        `[M, N]` of out_dtype.

    Raises:
        ValueError: where K differs, or both have a residual.
        RuntimeError: for tensors that do not fit; on the CPU also for what no quantizer writes.
    """
    what = "int8_gemm"
    _check_operand(what, "a", a)
    _check_operand(what, "b", b)
    check_tensor(what, "bias", bias, optional=True)
    check_dtype(what, "out_dtype", out_dtype)
    shapes = f"a {a.shape}, b {b.shape}"
    if a.shape[1] != b.shape[1]:
        got, advice = f"{a.shape[1]} and {b.shape[1]}", "The contraction axis is last: D = A B^T."
        raise ValueError(refusal(what, "a and b", "have the same K", got, shapes, advice))
    if a.residual is not None and b.residual is not None:
        advice = "Use without_fallback() of one."
        condition = "have at most one residual"
        raise ValueError(refusal(what, "a and b", condition, "two", shapes, advice))
    of_b = b.residual is not None
    own = b if of_b else a
    out = _ops.int8_gemm(
        a.data, a.scale, b.data, b.scale, bias, out_dtype,
        own.residual, own.residual_scale, own.mask, of_b,
    )  # fmt: skip
    _check_tail(what, "a", a)
    _check_tail(what, "b", b)
    return out


def block_amax(x: Tensor) -> Tensor:
    """Largest finite magnitude of each 128 x 128 block of x `[R, K]`: float32, by plain torch."""
    r, k = x.shape
    v = F.pad(x.detach().abs(), (0, -k % BLOCK, 0, -r % BLOCK))
    v = torch.where(v.isfinite(), v, 0)
    v = v.view(blocks(r), BLOCK, blocks(k), BLOCK)
    return v.amax((1, 3)).to(torch.float32)
