"""The quantized linear layer: one autograd function for every recipe, `linear` and `MXLinear`.

With X [N, K] the tokens, W [C, K] the weight, dY [N, C] and Q the six quantizers of a Recipe:

    fprop   Y  = Q(X)    Q(W)^T  + b     blocks along K = in_features
    dgrad   dX = Q(dY)   Q(W^T)^T        blocks along C = out_features
    wgrad   dW = Q(dY^T) Q(X^T)^T        blocks along N = tokens
    bias    db = column sum of dY in float32, dY unquantized

- Gradients pass straight through the quantizers; nothing is masked.
- Where autocast is on for the device of x, x is cast to its dtype first and Y has it, as F.linear
  does; the weight is quantized from its own dtype. dX, dW and db have the dtypes of x, weight and
  bias.
- Saved for backward are the packed operands; x or weight itself only where backward uses it
  unquantized, weight where backward quantizes the original, and x with `MXLinear.keep_input`.
- int8_block quantizes in squares: one quantization of X or dY serves both of its GEMMs. A
  fallback's threshold is fixed before the call (fallback.py); the function returns what fell back.
- The packed weight is kept between the calls of an MXLinear (weight_cache.py), not by `linear`.
- Randomness: one draw from torch's generator a forward, with a row for each of X, W and dY, saved
  for backward. So `torch.manual_seed` and the recomputation of a checkpoint repeat the bits.
- Where whole blocks of tokens do not fill a Hadamard group of wgrad, rows of zeros do. That is
  exact: both operands of the GEMM are rotated alike.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .checks import FLOATS, refusal, show
from .draws import DY, W, X, draw, signs_of
from .ema import update_weight_ema as update_weight_ema
from .fallback import FallbackLinear, check_threshold, initial_threshold
from .formats import FORMATS
from .int8 import Int8Operand, int8_gemm, int8_quantize
from .linear_checks import check_arguments, check_fit, check_layer
from .operand import Operand, gemm, quantize, quantize_dual, requantize
from .packed import PARTS, Packed, compacted, parts_of, quantize_squares, restored
from .recipe import Quantizer, Recipe, get_recipe
from .weight_cache import WeightCache

# ---- operands ----


def _quantize(
    x: Tensor, q: Quantizer, rng: Tensor | None, signs: Tensor | None, *,
    transpose: bool = False, toward: Tensor | None = None,
) -> Packed:  # fmt: skip
    """quantize with the fields of q. "toward" with nothing to round toward is "nearest"."""
    if q.square:
        rng = rng if q.rounding == "stochastic" else None
        layout = "transposed" if transpose else "row"
        return int8_quantize(x, rounding=q.rounding, rng=rng, layout=layout)
    rounding = "nearest" if q.rounding == "toward" and toward is None else q.rounding
    return quantize(
        x, q.format, scale_rule=q.scale_rule, rounding=rounding, transpose=transpose,
        rng=rng if rounding == "stochastic" else None, hadamard=q.hadamard, signs=signs,
        prescale=q.factor, toward=toward if rounding == "toward" else None,
    )  # fmt: skip


def _quantize_both(
    x: Tensor, row: Quantizer | None, col: Quantizer | None, rng: Tensor | None,
    row_signs: Tensor | None, col_signs: Tensor | None, threshold: Tensor | None = None,
) -> tuple[Packed | None, Packed | None, Tensor | None]:  # fmt: skip
    """The operand of x [N, K] by row and that of x.T by col, its tokens filled up for col.

    None gives None; two operands are made from one read of x. Then what fell back, or None.
    """
    n = len(x)
    if row is not None and col is not None and row.square != col.square:
        a, _, counts = _quantize_both(x, row, None, rng, row_signs, None, threshold)
        return a, _quantize_both(x, None, col, rng, None, col_signs)[1], counts
    if any(q is not None and q.square for q in (row, col)):
        return quantize_squares(x, row, col, rng, threshold)
    if col is None:
        return None if row is None else _quantize(x, row, rng, row_signs), None, None
    if row is None:
        x = _with_rows(x, _filled(n, col))
        return None, _quantize(x, col, rng, col_signs, transpose=True), None
    return *_quantize_dual(x, row, col, rng, row_signs, col_signs, False)[:2], None


def _with_rows(x: Tensor, n: int) -> Tensor:
    return x if len(x) == n else F.pad(x, (0, 0, 0, n - len(x)))


def _quantize_dual(
    x: Tensor, row: Quantizer, col: Quantizer, rng: Tensor | None, row_signs: Tensor | None,
    col_signs: Tensor | None, column_sum: bool,
) -> tuple[Operand, Operand, Tensor | None]:  # fmt: skip
    """As _quantize_both, for two that are not in squares; then the column sum of x, or None."""
    n, k = x.shape
    stochastic = "stochastic" in (row.rounding, col.rounding)
    a, b, *sums = quantize_dual(
        _with_rows(x, _filled(n, col)), row, col, rng=rng if stochastic else None,
        row_signs=row_signs, col_signs=col_signs, column_sum=column_sum,
    )  # fmt: skip
    if a.shape[0] != n:
        a = Operand(a.data[:n], a.scale[:n], a.format, (n, k), a.tensor_scale)
    return a, b, sums[0] if sums else None


def _requantize(op: Packed, q: Quantizer, rng: Tensor | None, signs: Tensor | None) -> Packed:
    """The operand by q of the transpose of op [R, cols], R filled up for q."""
    if q.square:
        return op.transposed()
    rows, cols = op.shape
    fill = _filled(rows, q) - rows
    if fill:  # codes and scales of zero are a row of zeros in every format
        data, scale = F.pad(op.data, (0, 0, 0, fill)), F.pad(op.scale, (0, 0, 0, fill))
        op = Operand(data, scale, op.format, (rows + fill, cols), op.tensor_scale)
    return requantize(
        op, q.format, scale_rule=q.scale_rule, rounding=q.rounding,
        rng=rng if q.rounding == "stochastic" else None, hadamard=q.hadamard, signs=signs,
        prescale=q.factor,
    )  # fmt: skip


def _of_input(q: Quantizer) -> bool:
    """Whether q makes wgrad's operand of X itself, not of what fprop packed of it."""
    return q.format is not None and (q.source == "original" or q.square)


def _filled(n: int, q: Quantizer) -> int:
    """n, rounded up to q's Hadamard group where n in whole blocks is not a multiple of it."""
    if q.hadamard == 0 or FORMATS[q.format].padded(n) % q.hadamard == 0:
        return n
    return -(-n // q.hadamard) * q.hadamard


def _product(
    a: Packed | Tensor, b: Packed | Tensor, bias: Tensor | None, alpha: float,
    dtype: torch.dtype, out_dtype: torch.dtype, accumulate: str,
) -> Tensor:  # fmt: skip
    """alpha * a b^T + bias in out_dtype: an MX GEMM of two operands, else a matmul in dtype."""
    if isinstance(a, Int8Operand) and isinstance(b, Int8Operand):
        return int8_gemm(a, b, bias, out_dtype)
    if isinstance(a, Operand) and isinstance(b, Operand):
        return gemm(a, b, bias, alpha=alpha, out_dtype=out_dtype, accumulate=accumulate)
    # alpha is 1 here: Recipe allows a prescale only where both sides have a format.
    a = a.dequantize(dtype) if isinstance(a, Packed) else a.to(dtype)
    b = b.dequantize(dtype) if isinstance(b, Packed) else b.to(dtype)
    return F.linear(a, b, None if bias is None else bias.to(dtype)).to(out_dtype)


# ---- the autograd function ----


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, ema: Tensor | None, rng: Tensor | None,
    drawn: Tensor | None, recipe: Recipe, dtype: torch.dtype, cache: WeightCache | None,
    threshold: Tensor | None, need_x: bool, need_w: bool, again: bool,
) -> tuple[Tensor, Packed | Tensor | None, Packed | Tensor | None, Tensor | None]:  # fmt: skip
    """Y [..., C] of x [..., K]; where needed, what wgrad uses of X and dgrad of W; the counts.

    again: whether backward quantizes X once more.
    """
    fx, fw, wx, dw = recipe.fprop_x, recipe.fprop_w, recipe.wgrad_x, recipe.dgrad_w
    signs = signs_of(recipe, "fprop", drawn, x.device)
    x_rng, w_rng = (None, None) if rng is None else (rng[X], rng[W])

    row = fx if fx.format else None
    col = wx if need_w and not again and _of_input(wx) else None
    col_signs = signs_of(recipe, "wgrad", drawn, x.device) if col else None
    rows = x.reshape(-1, x.shape[-1])
    x_row, x_col, counts = _quantize_both(rows, row, col, x_rng, signs, col_signs, threshold)
    if isinstance(x_col, Int8Operand):
        x_col = compacted(x_col, recipe.fallback.kept_share)  # before what else needs memory
    w_row = None
    if fw.format:
        make = partial(_quantize, weight, fw, w_rng, signs, toward=ema)
        w_row = make() if cache is None else cache.fprop(weight, ema, recipe, make)
    y = _product(
        rows if x_row is None else x_row, weight if w_row is None else w_row, bias,
        recipe.alpha("fprop"), dtype, dtype, recipe.accumulate,
    )  # fmt: skip

    keep_x = keep_w = None
    if need_w:
        keep_x = x if wx.format is None or again else x_row if x_col is None else x_col
    if need_x:
        keep_w = weight if dw.source == "original" else w_row
    # As F.linear does it: no in-place op may follow if a Function returns a view. In two dimensions
    # too: the torch.compile of 2.11 gives backward zeros for what F.linear itself returned.
    y = torch.ops.aten._unsafe_view(y, [*x.shape[:-1], weight.shape[0]])
    return y, keep_x, keep_w, counts


class _Linear(torch.autograd.Function):
    """Y [..., C] of x [..., K], weight and ema [C, K], bias [C], rng [3, 2], drawn [3, g]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, ema: Tensor | None,
        rng: Tensor | None, drawn: Tensor | None, recipe: Recipe, dtype: torch.dtype,
        cache: WeightCache | None, threshold: Tensor | None, keep_input: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        need_x, need_w = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        again = keep_input and need_w and _of_input(recipe.wgrad_x)
        y, keep_x, keep_w, counts = _forward(
            x, weight, bias, ema, rng, drawn, recipe, dtype, cache, threshold, need_x, need_w, again
        )
        threshold = threshold if again else None
        ctx.save_for_backward(*parts_of(keep_x), *parts_of(keep_w), rng, drawn, threshold)
        ctx.recipe, ctx.dtype, ctx.in_features, ctx.again = recipe, dtype, weight.shape[1], again
        ctx.cache, ctx.weight = cache, None if cache is None else weight
        ctx.x_dtype, ctx.weight_dtype = x.dtype, weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)  # no zeros for the counts, which have no gradient
        if counts is None:
            return y
        ctx.mark_non_differentiable(counts)
        return y, counts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 11
        recipe, dtype = ctx.recipe, ctx.dtype
        need_x, need_w, need_b = ctx.needs_input_grad[:3]
        *parts, rng, drawn, threshold = ctx.saved_tensors
        x_parts, w_parts = tuple(parts[:PARTS]), tuple(parts[PARTS:])
        w_data = w_parts[0]
        x_shape = (*dy.shape[:-1], ctx.in_features)
        dy = dy.reshape(-1, dy.shape[-1])
        if dy.dtype not in FLOATS:
            dy = dy.to(dtype)
        (n, c), k = dy.shape, ctx.in_features
        x_rng, w_rng, dy_rng = (None,) * 3 if rng is None else (rng[X], rng[W], rng[DY])
        dgrad_signs = signs_of(recipe, "dgrad", drawn, dy.device) if need_x else None
        wgrad_signs = signs_of(recipe, "wgrad", drawn, dy.device) if need_w else None
        row = recipe.dgrad_dy if need_x and recipe.dgrad_dy.format else None
        col = recipe.wgrad_dy if need_w and recipe.wgrad_dy.format else None
        dx = dw = db = None
        if need_b and row and col and not (row.square or col.square):
            both = _quantize_dual(dy, row, col, dy_rng, dgrad_signs, wgrad_signs, True)
            dy_row, dy_col, db = both
        else:
            dy_row, dy_col, _ = _quantize_both(dy, row, col, dy_rng, dgrad_signs, wgrad_signs)

        if need_x:
            q = recipe.dgrad_w
            if q.format is None:
                w = w_data.t()
            else:
                make = partial(_quantize, w_data, q, w_rng, dgrad_signs, transpose=True)
                if q.source == "forward":
                    w = restored(w_parts, recipe.fprop_w, (c, k))
                    make = partial(_requantize, w, q, w_rng, dgrad_signs)
                cache = ctx.cache
                w = make() if cache is None else cache.dgrad(ctx.weight, w_data, recipe, make)
            dx = _product(
                dy if dy_row is None else dy_row, w, None,
                recipe.alpha("dgrad"), dtype, ctx.x_dtype, recipe.accumulate,
            ).reshape(x_shape)  # fmt: skip
        if need_w:
            q = recipe.wgrad_x
            if q.format is None:
                x = x_parts[0].reshape(n, k).t()
            elif ctx.again:
                x = x_parts[0].reshape(n, k)
                _, x, _ = _quantize_both(x, None, q, x_rng, None, wgrad_signs, threshold)
            elif q.source == "forward" and not q.square:
                x = restored(x_parts, recipe.fprop_x, (n, k))
                x = _requantize(x, q, x_rng, wgrad_signs)
            else:
                x = restored(x_parts, q, (k, _filled(n, q)))
            dw = _product(
                dy.t() if dy_col is None else dy_col, x, None,
                recipe.alpha("wgrad"), dtype, ctx.weight_dtype, recipe.accumulate,
            )  # fmt: skip
        if need_b:
            db = torch.ops.mxtrain.column_sum(dy) if db is None else db
            db = db.to(ctx.bias_dtype)
        return dx, dw, db, *(None,) * 8


def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, recipe: Recipe, ema: Tensor | None,
    training: bool, cache: WeightCache | None = None, threshold: Tensor | None = None,
    keep_input: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Y, and what fell back where the recipe has a fallback."""
    device = x.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
    if x.numel() == 0 or weight.numel() == 0:
        # Nothing to quantize; torch knows the shapes and that the gradients are zero.
        bias = None if bias is None else bias.to(dtype)
        return F.linear(x.to(dtype), weight.to(dtype), bias), None
    x = x.to(dtype)
    if threshold is None and recipe.fprop_x.fallback:
        threshold = initial_threshold(x.reshape(-1, x.shape[-1]), recipe)
    grad = torch.is_grad_enabled()
    # In training the draw does not depend on whether autograd records: a reentrant checkpoint runs
    # the first forward without, and its recomputation must advance the generator alike.
    rng, drawn = draw(recipe, training or grad, x)
    requires_grad = x.requires_grad or weight.requires_grad
    if grad and (requires_grad or (bias is not None and bias.requires_grad)):
        parts = x, weight, bias, ema, rng, drawn, recipe, dtype, cache, threshold, keep_input
        out = _Linear.apply(*parts)
        return out if recipe.fprop_x.fallback else (out, None)
    needs = False, False, False
    out = _forward(x, weight, bias, ema, rng, drawn, recipe, dtype, cache, threshold, *needs)
    return out[0], out[3]


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, recipe: str | Recipe = "tetrajet",
    weight_ema: Tensor | None = None, threshold: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """y = x W^T + b, its forward and both its backward GEMMs quantized as the recipe says.

    The bias gradient is the plain float32 column sum of dY in every recipe. (The code released with
    TetraJet sums the stochastically quantized dY: the same mean with more noise.)

    A recipe that rounds stochastically or draws signs takes random numbers from torch's default
    generator of the device, once a call.

    Args:
        x: `[..., in_features]`, bfloat16, float16 or float32; it may have no elements.
        weight: `[out_features, in_features]`, any of these dtypes.
        bias: `[out_features]` or None.
        recipe: a name of `RECIPES`, or a Recipe.
        weight_ema: like weight; what fprop_w rounds toward in a recipe with `ema_beta`. None: it
            rounds to nearest.
        threshold: float32 `[1]`, positive, above which a block of x falls back in a recipe with a
            fallback. None: the quantile of x's own blocks, which costs another read of x.

    Returns:
        `[..., out_features]` in the autocast dtype where autocast is on for the device of x, else
        in the dtype of x. Differentiable once.

    Raises:
        TypeError: for another dtype.
        ValueError: where the shapes disagree, the recipe does not fit them, or it has no average
            to round toward.
    """
    recipe = get_recipe(recipe)
    check_arguments(x, weight, bias, weight_ema)
    if weight_ema is not None and recipe.ema_beta is None:
        condition, advice = "be None in a recipe without ema_beta", "Leave it out."
        context = f"recipe {recipe.name!r}"
        raise ValueError(refusal("linear", "weight_ema", condition, "one", context, advice))
    check_threshold("linear", threshold, recipe)
    check_fit("linear", recipe, weight.shape[1], weight.shape[0])
    return _linear(x, weight, bias, recipe, weight_ema, True, threshold=threshold)[0]


# ---- the module ----

# How the attributes begin in which a layer counts; each is replaced, never changed in place.
_COUNTS = ("_ema_", "ema_active", "_fallback_")


class MXLinear(FallbackLinear):
    """An `nn.Linear` whose GEMMs run as a recipe says. It has the parameters of `nn.Linear`.

    The state_dict is that of `nn.Linear` too, so checkpoints load both ways, unless the recipe has
    `ema_beta`. Then it also has `weight_ema` (float32, the average of the weight that fprop's
    weight quantizer rounds toward), `ema_updates` (int64) and, with `ema_at_half`, `ema_peak_lr`
    (float64). Loading a checkpoint without these restarts the average from the loaded weight.

    The average is updated after every `step()` of an optimizer that holds the weight, unless the
    weight is frozen: the first update copies the weight, a later one is
    `weight_ema.lerp_(weight, layer.ema_step)`. Where an optimizer holds a copy instead (float32
    masters), call `update_weight_ema([layer], lr)` after its step. For the first `ema_warmup`
    updates `ema_active` is False and the weight rounds to nearest, in training and evaluation
    alike. Every rank computes the same average: pass `broadcast_buffers=False` to
    DistributedDataParallel, or it is sent again with every forward.

    The packed weight is kept between calls where the recipe rounds it without random numbers, so
    micro-steps, checkpoints and evaluation do not quantize it again: it is made anew after every
    optimizer step, in-place change, eval(), load_state_dict or to(). Only a write by hand that
    autograd does not see, to `weight.data` between two forwards, needs `layer.drop_cache()`; with
    `layer.keep_packed = False` nothing is kept (mxtrain/weight_cache.py).

    A recipe with a fallback has three more buffers, the threshold and what moves it after a step of
    the optimizer that holds the weight (mxtrain/fallback.py).

    Set `layer.recipe` to change the recipe; the state above comes and goes with it.

    Raises:
        ValueError: where the recipe does not fit in_features and out_features.
    """

    keep_input: bool = False
    """Whether to save the input itself, by reference, and quantize it for wgrad in backward: the
    same bytes, once more read. It saves memory where who made the input keeps it anyway, as
    attention its output. A recipe that makes X^T from the packed X keeps that, whatever is set."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, device: Any = None,
        dtype: torch.dtype | None = None, *, recipe: str | Recipe = "tetrajet",
    ) -> None:  # fmt: skip
        check_layer(in_features, out_features, bias, device, dtype)
        recipe = get_recipe(recipe)
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._adopt(recipe)

    @classmethod
    def from_linear(cls, module: nn.Linear, recipe: str | Recipe = "tetrajet") -> MXLinear:
        """Turn module itself into an MXLinear and return it: same object, parameters and hooks."""
        if type(module) is not nn.Linear:
            got, advice = type(module).__name__, "A subclass may use its weight in its own ways."
            what, condition = "MXLinear.from_linear", "be exactly a torch.nn.Linear"
            raise TypeError(refusal(what, "module", condition, got, show(module), advice))
        recipe = get_recipe(recipe)
        check_fit("MXLinear", recipe, module.in_features, module.out_features)
        module.__class__ = cls
        module._adopt(recipe)
        return module

    def _adopt(self, recipe: str | Recipe) -> None:
        """Set what an MXLinear has and an nn.Linear has not."""
        self._start_without_ema()
        self._start_without_cache()
        self._start_without_fallback()
        self.recipe = recipe

    @property
    def recipe(self) -> Recipe:
        """What the six quantizers are. May be set, to a name or a Recipe."""
        return self._recipe

    @recipe.setter
    def recipe(self, recipe: str | Recipe) -> None:
        recipe = get_recipe(recipe)
        check_fit("MXLinear", recipe, self.in_features, self.out_features)
        self._recipe = recipe
        self.drop_cache()
        self._begin_or_end_ema()
        self._begin_or_end_fallback()

    def forward(self, x: Tensor) -> Tensor:
        ema = self.weight_ema if self.ema_active else None
        check_arguments(x, self.weight, self.bias, ema)
        cache, threshold = self._usable_cache(x), self._threshold_for(x)
        arguments = x, self.weight, self.bias, self._recipe, ema, self.training
        y, counts = _linear(*arguments, cache, threshold, self.keep_input)
        if counts is not None:
            self._count_fallback(counts)
        return y

    def remember(self) -> Callable[[], None]:
        """A function that puts back what training moves beside parameters and buffers: counts."""
        counts = self._counts()

        def put_back() -> None:
            for name in self._counts():
                delattr(self, name)
            vars(self).update(counts)

        return put_back

    def _counts(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name.startswith(_COUNTS)}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, recipe={self._recipe.name!r}"
