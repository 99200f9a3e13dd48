"""What each op of `torch.ops.mxtrain` is: shapes (as fake kernels), errors and autograd.

The schemas are in csrc/library.cpp; docs/numerics.md defines every byte. An *operand* is a logical
`[R, K]` matrix as `data` uint8 `[R, Kp * bits / 8]`, `scale` uint8 `[R, Kp / block]` (E8M0, or E4M3
for nvfp4) and `tensor_scale` float32 `[1]` for nvfp4, `[0]` for the others (inputs may pass None);
Kp is K rounded up to a block. `format`, `scale_rule`, `rounding` and `accumulate` are the int codes
of `mxtrain.formats`. Ops whose name ends in _ change arguments; only hadamard is differentiable. On
bad input they and their fake kernels raise RuntimeError with
`mxtrain::<op>: <argument> must <condition>, got <value> (<context>). <what to do>`.

quantize(x, format, scale_rule=1, rounding=0, transpose=False, rng=None, hadamard=0, signs=None,
         prescale=1.0, toward=None, swizzle=False) -> (data, scale, tensor_scale)
    The operand of x `[R, K]` (bfloat16, float16 or float32, any strides), or with transpose of x.T
    `[K, R]`. Raises for another dtype or rank, a block axis of size 0, an unknown code, stochastic
    rounding without rng, rng that is not int64 [2] on x's device, signs that are not int8
    [hadamard], hadamard that does not divide Kp, a prescale that is not finite and positive, toward
    without rounding "toward" or of another shape. Source: OCP MX v1.0 section 6; arXiv 2502.20853
    section 3.
quantize_dual(x, rng, row_*, col_*, swizzle=False, column_sum=False)
    -> (data, scale, tensor_scale) of x, then of x.T, then sum
    The same bytes as two calls of quantize, from one read of x. sum is column_sum(x), float32
    `[K]`, or `[0]` where column_sum is false. Errors as quantize.
requantize(data, scale, tensor_scale, format, cols, out_format, scale_rule=1, rounding=0, rng=None,
           hadamard=0, signs=None, prescale=1.0, swizzle=False) -> (data, scale, tensor_scale)
    The operand of the transpose of an operand `[R, cols]`: the same bytes as
    quantize(dequantize(...), transpose=True), from packed bytes to packed bytes. Raises also where
    codes, scales and format disagree. Source: arXiv 2502.20853 (double quantization).
dequantize(data, scale, tensor_scale, format, cols, dtype)
    -> `[R, cols]` of dtype (bfloat16, float16 or float32).
hadamard(x, group, signs=None) -> x's shape and dtype
    (x * signs) H_group / sqrt(group) on consecutive groups along the last axis, in float32.
    Differentiable. Raises unless group is 16, 32, 64, 128 or 256 and divides the last axis.
    Source: arXiv 2502.20586 section 3.
stochastic_round(x, dtype, rng) -> x's shape
    float32 to bfloat16, float8_e4m3fn or float8_e5m2; finite values stay finite.
column_sum(dy) -> float32 `[C]`
    The sum over the rows of dy `[N, C]` (bfloat16, float16 or float32, any strides) in float32, in
    the order of docs/numerics.md: the same bytes on every device. Raises for another dtype or rank.
swizzle_scale(scale) -> uint8 `[ceil(R/128), ceil(C/4), 512]` from `[R, C]`;
unswizzle_scale(scale, rows, cols) undoes it.
    The scale layout of Blackwell's tensor cores (PTX ISA, tcgen05 scale factors); see
    docs/layouts.md.
gemm(a, a_scale, a_tensor_scale, b, b_scale, b_tensor_scale, format, bias, alpha, out_dtype,
     accumulate=0) -> `[M, N]`
    alpha * A B^T + bias for operands A `[M, K]` and B `[N, K]`, float32 accumulation. A NaN scale
    makes its row (column) NaN. Scales may be swizzled (the padding 0), which sm100 then takes as
    they are. Raises where K or the formats differ, or bias is not a float vector of N.

gemm_add_(out, a, a_scale, a_tensor_scale, b, b_scale, b_tensor_scale, format, alpha, accumulate=0)
    out += alpha * A B^T in float32, for the accumulation of gradients: out `[M, N]` is contiguous
    float32. The product is rounded to float32, then added. Raises as gemm, and for another out.

adamw_(params, grads, exp_avgs, exp_avg_sqs, steps, lr, beta1, beta2, eps, weight_decay, lr_tensor,
       rng, emas, ema_weights, weight_changes, quantized_changes, scale_rule=1, rounding=0)
    One step of AdamW on a list of parameters, each array read and written once. params: contiguous
    float32, or bfloat16, which rounds by stochastic_round with a row of rng int64 `[T, 2]` each
    (None: to nearest). grads: like params. exp_avgs, exp_avg_sqs: float32; steps: one float32
    each, counted up here. lr_tensor: one float64 on the device that stands for lr, or None. emas
    (float32, or an empty list) go by ema_weights `[T]` toward the new parameter, as torch.lerp
    does. weight_changes, quantized_changes (float32, or empty lists): to these are added |w - w'|
    and |Q(w) - Q(w')| of matrices, Q being quantize to mxfp4 with scale_rule and rounding ("toward"
    takes the average before and after). docs/optimizers.md has the arithmetic. Source: arXiv
    1711.05101 algorithm 2; arXiv 2502.20853 (Q-EMA, oscillation ratio).
ramped_adamw_(params, ..., rng, grad_sums, counts, periods)
    The same with Q-Ramping: an element is updated in every period-th step, by the mean of the
    gradients since its last update and a learning rate as many times as large. grad_sums: float32;
    counts, periods: uint8 or int16, like params. A gradient tensor that is not finite is counted
    and not added. Source: arXiv 2502.20853, its section on Q-Ramping.
quantization_statistics(x, data, scale, tensor_scale, format, prescale=1.0) -> float64 `[128, 8]`
    What rounding did to x `[R, K]` (bfloat16, float16 or float32, any strides; rotated where that
    was rotated before quantizing), against the operand that was made of it: the columns are counts
    of elements, of those in NaN blocks, nonzero, underflowing and clipped ones, then the sums of
    x^2, (x - q)^2 and the confidence. The rows are parts of x, to be added. Raises where x and the
    operand disagree. Source: arXiv 2502.20853 (quantization confidence).
oscillation_step_(state, sums, w, data, scale, tensor_scale, format)
    One transition of w `[R, K]` and its operand: state is float32 `[5, R, K]`, w' and q' of the
    step before, then the sums of |w - w'|, |q - q'| and flips, which it adds to; sums float64
    `[128, 5]` gets the squares of w - w', w', q - q' and q' and the flips, in parts to be added.
    Raises where shapes or dtypes disagree. Source: arXiv 2502.20853 (oscillation ratio).

int8_block has ops of its own. Codes are int8 in [-127, 127], `[R, Kp]` with Kp a multiple of 128,
scales float32 `[ceil(R/128), Kp/128]`, of any strides; mxtrain/int8.py explains them. Source:
arXiv 2503.08040.

int8_quantize(x, rounding=0, rng=None, layout=0) -> (data, data_t, scale)
    data `[R, Kp]` of x and data_t `[K, Rp]` of x.T, [0, 0] where the layout leaves one out; scale
    is that of x. Raises for an x without elements, another dtype or rank, rounding other than
    nearest and stochastic, an unknown layout, rng as quantize.
int8_quantize_fallback(x, threshold, layout=0)
    -> (data, data_t, scale, residual, residual_t, residual_scale, mask, counts)
    The same to nearest, with the second step where the mask, uint8 like the scale, is 1: blocks
    whose largest magnitude exceeds the float32 threshold `[1]`. Other blocks of the residual are
    not written. counts int64 `[3]`: fallen back, not finite, all. Raises also for a threshold of
    another type, or (on the CPU; on CUDA all scales are then NaN) one that is not positive.
int8_gemm(a, a_scale, b, b_scale, bias, out_dtype, residual=None, residual_scale=None, mask=None,
          residual_of_b=False) -> `[M, N]`
    A B^T + bias. The residual is of a or of b, like it and with a mask, or a pool and with slots
    as the mask. Raises where K or a grid differs, for parts of a residual without the others, and
    on the CPU for a code of -128 and a slot beyond the pool (on CUDA that is a tile of zeros).
int8_pack_residual(residual, scale, mask, count) -> (pool, slots)
    The residuals of `count` blocks, int8 `[count, 128, 128]`, rows beyond R zero; and slots, int32
    like the mask, which say where: 1 + the number of the block's tile, 0 for the others. Of those
    that fell back (the mask is set and the scale is no NaN) they are the ones with the largest
    scale, of equal scales the first in the order of the grid, in this order. Where fewer fell back,
    the tail of the pool is not written. On CUDA each looks at all blocks, so time grows with the
    square of their number. Raises where a grid differs, for a count that is negative or above the
    number of blocks.
int8_unpack_residual(pool, slots, rows, kp) -> `[rows, kp]`
    The inverse; blocks without a slot are not written. Raises where they disagree, and for slots
    beyond the pool (on CUDA their blocks are not written).

RMSNorm and SwiGLU keep their inputs for backward in int10_group: high int8 `[P, R, Cp]`, low uint8
`[P, R, Cp/4]`, scale float32 `[P, R, Cp/128]` for P matrices `[R, C]`, Cp being C rounded up to
128; mxtrain.nn has the layers. Source: arXiv 2503.08040, its contexts of non-linear operators.

rms_norm_forward(x, weight, eps, out_dtype, context=True) -> (y, high, low, scale, rstd)
    x / sqrt(mean(x^2) + eps) * weight of the rows of x `[R, C]`, C at most 16384, weight `[C]` or
    None; the context of x, and rstd float32 `[R]`, the 1 / sqrt. All but y are empty without
    context. Raises for other shapes and dtypes, and for an eps that is negative or not finite.
rms_norm_backward(dy, high, low, scale, rstd, weight, dx_dtype, weight_grad=True) -> (dx, dw)
    dx `[R, C]` of dx_dtype; dw float32 `[C]`, the column_sum of dy * x * rstd, `[0]` where there is
    no weight or its gradient is not wanted. Raises where dy and the context disagree.
swiglu_forward(gate, up, context=True) -> (h, high, low, scale)
    silu(gate) * up of matrices `[R, C]` of one dtype; the context of both, P = 2.
swiglu_backward(dh, high, low, scale, dtype) -> `[R, 2 C]` of dtype
    The gradient of the gate, and right of it that of up. Raises as rms_norm_backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import context_ops as context_ops  # registers fake kernels
from . import int8_ops as int8_ops
from . import op_checks as check
from . import optimizer_checks
from ._library import CATALOGUE
from .checks import refusal

OP_NAMES = (
    "quantize",
    "quantize_dual",
    "requantize",
    "dequantize",
    "hadamard",
    "stochastic_round",
    "column_sum",
    "swizzle_scale",
    "unswizzle_scale",
    "gemm",
    "gemm_add_",
    "adamw_",
    "ramped_adamw_",
    "quantization_statistics",
    "oscillation_step_",
    "int8_quantize",
    "int8_quantize_fallback",
    "int8_gemm",
    "int8_pack_residual",
    "int8_unpack_residual",
    "rms_norm_forward",
    "rms_norm_backward",
    "swiglu_forward",
    "swiglu_backward",
)


# ---- fake kernels: the checks of the real ones, and shapes ----


def _swizzled_shape(rows, cols) -> tuple:
    return ((rows + 127) // 128, (cols + 3) // 4, 512)


def _empty_operand(
    like: Tensor, rows, cols, format: int, swizzle: bool
) -> tuple[Tensor, Tensor, Tensor]:
    fmt = check.BY_CODE[format]
    blocks = (cols + fmt.block - 1) // fmt.block
    scale_shape = _swizzled_shape(rows, blocks) if swizzle else (rows, blocks)
    return (
        like.new_empty((rows, blocks * (fmt.block * fmt.bits // 8)), dtype=torch.uint8),
        like.new_empty(scale_shape, dtype=torch.uint8),
        like.new_empty((1 if fmt.two_level else 0,), dtype=torch.float32),
    )


@torch.library.register_fake("mxtrain::quantize")
def _(
    x,
    format,
    scale_rule=1,
    rounding=0,
    transpose=False,
    rng=None,
    hadamard=0,
    signs=None,
    prescale=1.0,
    toward=None,
    swizzle=False,
):
    check.check_matrix("quantize", "x", x)
    rows, cols = (x.shape[1], x.shape[0]) if transpose else (x.shape[0], x.shape[1])
    target = check.Target(format, scale_rule, rounding, hadamard, signs, prescale, toward)
    check.check_target("quantize", x, target, rng, cols)
    check.check_devices("quantize", x, rng=rng, signs=signs, toward=toward)
    return _empty_operand(x, rows, cols, format, swizzle)


@torch.library.register_fake("mxtrain::quantize_dual")
def _(
    x,
    rng,
    row_format,
    row_scale_rule,
    row_rounding,
    row_hadamard,
    row_signs,
    row_prescale,
    row_toward,
    col_format,
    col_scale_rule,
    col_rounding,
    col_hadamard,
    col_signs,
    col_prescale,
    col_toward,
    swizzle=False,
    column_sum=False,
):
    op = "quantize_dual"
    check.check_matrix(op, "x", x)
    row_options = (row_scale_rule, row_rounding, row_hadamard, row_signs, row_prescale, row_toward)
    col_options = (col_scale_rule, col_rounding, col_hadamard, col_signs, col_prescale, col_toward)
    check.check_target(op, x, check.Target(row_format, *row_options), rng, x.shape[1])
    check.check_target(op, x, check.Target(col_format, *col_options), rng, x.shape[0])
    check.check_devices(
        op,
        x,
        rng=rng,
        row_signs=row_signs,
        row_toward=row_toward,
        col_signs=col_signs,
        col_toward=col_toward,
    )
    row = _empty_operand(x, x.shape[0], x.shape[1], row_format, swizzle)
    col = _empty_operand(x, x.shape[1], x.shape[0], col_format, swizzle)
    return *row, *col, x.new_empty((x.shape[1] if column_sum else 0,), dtype=torch.float32)


@torch.library.register_fake("mxtrain::requantize")
def _(
    data,
    scale,
    tensor_scale,
    format,
    cols,
    out_format,
    scale_rule=1,
    rounding=0,
    rng=None,
    hadamard=0,
    signs=None,
    prescale=1.0,
    swizzle=False,
):
    target = check.Target(out_format, scale_rule, rounding, hadamard, signs, prescale, None)
    check.check_requantize(data, scale, tensor_scale, format, cols, target, rng)
    check.check_devices(
        "requantize", data, scale=scale, tensor_scale=tensor_scale, rng=rng, signs=signs
    )
    return _empty_operand(data, cols, data.shape[0], out_format, swizzle)


@torch.library.register_fake("mxtrain::dequantize")
def _(data, scale, tensor_scale, format, cols, dtype):
    check.check_dequantize(data, scale, tensor_scale, format, cols, dtype)
    check.check_devices("dequantize", data, scale=scale, tensor_scale=tensor_scale)
    return data.new_empty((data.shape[0], cols), dtype=dtype)


@torch.library.register_fake("mxtrain::hadamard")
def _(x, group, signs=None):
    check.check_hadamard(x, group, signs)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("mxtrain::stochastic_round")
def _(x, dtype, rng):
    check.check_stochastic_round(x, dtype, rng)
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


@torch.library.register_fake("mxtrain::column_sum")
def _(dy):
    check.check_column_sum(dy)
    return dy.new_empty((dy.shape[1],), dtype=torch.float32)


@torch.library.register_fake("mxtrain::swizzle_scale")
def _(scale):
    check.check_swizzle(scale)
    return scale.new_empty(_swizzled_shape(scale.shape[0], scale.shape[1]))


@torch.library.register_fake("mxtrain::unswizzle_scale")
def _(scale, rows, cols):
    check.check_unswizzle(scale, rows, cols)
    return scale.new_empty((rows, cols))


def _check_product(op, a_parts, b_parts, format, bias, alpha, out_dtype, accumulate) -> None:
    check.check_gemm(a_parts, b_parts, format, bias, alpha, out_dtype, accumulate, op)
    names = ("a", "a_scale", "a_tensor_scale", "b", "b_scale", "b_tensor_scale")
    parts = dict(zip(names, (*a_parts, *b_parts), strict=True))
    check.check_devices(op, parts.pop("a"), **parts, bias=bias)


@torch.library.register_fake("mxtrain::gemm")
def _(
    a, a_scale, a_tensor_scale, b, b_scale, b_tensor_scale, format, bias, alpha, out_dtype,
    accumulate=0,
):  # fmt: skip
    a_parts, b_parts = (a, a_scale, a_tensor_scale), (b, b_scale, b_tensor_scale)
    _check_product("gemm", a_parts, b_parts, format, bias, alpha, out_dtype, accumulate)
    return a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)


@torch.library.register_fake("mxtrain::gemm_add_")
def _(
    out, a, a_scale, a_tensor_scale, b, b_scale, b_tensor_scale, format, alpha, accumulate=0
):  # fmt: skip
    a_parts, b_parts = (a, a_scale, a_tensor_scale), (b, b_scale, b_tensor_scale)
    _check_product("gemm_add_", a_parts, b_parts, format, None, alpha, torch.float32, accumulate)
    check.check_accumulator(out, a, b)


@torch.library.register_fake("mxtrain::quantization_statistics")
def _(x, data, scale, tensor_scale, format, prescale=1.0):
    op = "quantization_statistics"
    check.check_statistics(op, "x", x, data, scale, tensor_scale, format)
    check.check_prescale(op, x, prescale)
    return x.new_empty((check.STATISTICS_PARTS, 8), dtype=torch.float64)


@torch.library.register_fake("mxtrain::oscillation_step_")
def _(state, sums, w, data, scale, tensor_scale, format):
    check.check_statistics("oscillation_step_", "w", w, data, scale, tensor_scale, format)
    check.check_movement(state, sums, w)


@torch.library.register_fake("mxtrain::adamw_")
def _(
    params, grads, exp_avgs, exp_avg_sqs, steps, lr, beta1, beta2, eps, weight_decay, lr_tensor,
    rng, emas, ema_weights, weight_changes, quantized_changes, scale_rule=1, rounding=0,
):  # fmt: skip
    optimizer_checks.check_adamw(optimizer_checks.AdamwCall(
        "adamw_", params, grads, exp_avgs, exp_avg_sqs, steps, beta1, beta2, eps, lr_tensor, rng,
        emas, ema_weights, weight_changes, quantized_changes, scale_rule, rounding,
    ))  # fmt: skip


@torch.library.register_fake("mxtrain::ramped_adamw_")
def _(
    params, grads, exp_avgs, exp_avg_sqs, steps, lr, beta1, beta2, eps, weight_decay, lr_tensor,
    rng, grad_sums, counts, periods,
):  # fmt: skip
    optimizer_checks.check_adamw(optimizer_checks.AdamwCall(
        "ramped_adamw_", params, grads, exp_avgs, exp_avg_sqs, steps, beta1, beta2, eps, lr_tensor,
        rng, grad_sums=grad_sums, counts=counts, periods=periods, ramped=True,
    ))  # fmt: skip


# ---- CUDA tensors in a CPU-only build ----


def _refuse_cuda(name: str) -> None:
    """Make torch.ops.mxtrain.<name> say what to do, not list the dispatcher's backends."""

    def refuse(*args, **kwargs):
        condition, context = "be on the CPU", "this build has no CUDA kernels"
        advice = "Rebuild with nvcc on the PATH: MXTRAIN_CUDA_ARCHS=native pip install ."
        raise RuntimeError(refusal(name, "tensors", condition, "CUDA tensors", context, advice))

    torch.library.impl(f"mxtrain::{name}", "CUDA")(refuse)


if not CATALOGUE["build"]["cuda_archs"]:
    for _name in OP_NAMES:
        _refuse_cuda(_name)


# ---- autograd: one op is differentiable, the others' results carry no gradient ----

_AUTOGRAD = torch.library.Library("mxtrain", "IMPL")
for _name in OP_NAMES:
    if _name != "hadamard":
        # torch's default would mark float results as requiring a gradient that nothing computes.
        _AUTOGRAD.impl(_name, torch.library.fallthrough_kernel, "Autograd")


def _hadamard_setup(ctx, inputs, output) -> None:
    _, ctx.group, signs = inputs
    ctx.save_for_backward(signs)


def _hadamard_backward(ctx, grad: Tensor):
    # The rotation is (diag(signs) H / sqrt(g)); H is symmetric, so its transpose is H first,
    # signs last.
    (signs,) = ctx.saved_tensors
    out = torch.ops.mxtrain.hadamard(grad, ctx.group)
    if signs is not None:
        negative = (signs < 0).repeat(out.shape[-1] // ctx.group)
        out = torch.where(negative, -out, out)
    return out, None, None


torch.library.register_autograd(
    "mxtrain::hadamard", _hadamard_backward, setup_context=_hadamard_setup
)
