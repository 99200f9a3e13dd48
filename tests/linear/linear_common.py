"""What the tests of the linear layer share: recipes, inputs, the definition, a record of ops."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import mxtrain
from mxtrain import reference
from mxtrain.fallback import initial_threshold
from mxtrain.recipe import GEMMS, RECIPES, Quantizer, Recipe, fixed_signs

NAMES = list(RECIPES)
QUANTIZED = [name for name in NAMES if name != "bf16"]

_FP8, _SR = Quantizer("mxfp8_e4m3"), Quantizer("mxfp4", rounding="stochastic")
_ROTATED = Quantizer("mxfp8_e4m3", hadamard=64, signs="drawn")
_FORWARD = Quantizer("mxfp4", "ceil", "stochastic", 128, "fixed", 0.5, source="forward")
_FP6 = Quantizer("mxfp6_e2m3", "even")
_I8, _I8_SR = Quantizer("int8_block"), Quantizer("int8_block", rounding="stochastic")
_I8_AGAIN = Quantizer("int8_block", source="forward")
OWN = [
    Recipe("all rotated", *[_ROTATED] * 6),
    Recipe("stochastic forward", _SR, _SR, _SR, _SR, _SR, _SR),
    Recipe(
        "nvfp4 forward, requantized in groups of 128",
        Quantizer("nvfp4", "even"),
        Quantizer("nvfp4", "even"),
        Quantizer("mxfp4"),
        Quantizer("mxfp4", source="forward"),
        Quantizer("mxfp4", "ceil", "stochastic", 128, "fixed"),
        _FORWARD,
    ),
    Recipe("mixed", _FP8, _FP8, _FP6, _FP6, Quantizer(), Quantizer()),
    Recipe("wgrad alone", wgrad_dy=_FP8, wgrad_x=_FP8),
    RECIPES["int8_fallback"].replace(name="wgrad without fallback", wgrad_x=_I8),
    RECIPES["int8_fallback"].replace(name="wgrad without fallback, stochastic", wgrad_x=_I8_SR),
    Recipe("int8 forward", _I8, _I8, _FP8, _FP8, _FP8, _FP8),
    Recipe("fp8 forward", _FP8, _FP8, _I8_SR, _I8, _I8_SR, _I8_SR),
    RECIPES["int8_block"].replace(name="int8, one stochastic W", fprop_w=_I8_SR, dgrad_w=_I8_AGAIN),
    Recipe("int8, half of it", _I8, Quantizer(), _I8_SR, _I8, Quantizer(), _I8),
]
ALL = list(RECIPES.values()) + OWN


def tensors(*lead: int, k=128, c=128, device="cpu", dtype=torch.float32, seed=0):
    """x [*lead, k], weight [c, k], bias [c] and dy [*lead, c]; the first three require grad."""
    g = torch.Generator().manual_seed(seed)
    shapes = ((*lead, k), (c, k), (c,), (*lead, c))
    x, w, b, dy = (torch.randn(s, generator=g).to(device, dtype) for s in shapes)
    return x.requires_grad_(), w.requires_grad_(), b.requires_grad_(), dy


def run(f, x, w, b, dy, seed=1):
    """Y, dX, dW, db of f(x, w, b)."""
    torch.manual_seed(seed)
    y = f(x, w, b)
    y.backward(dy)
    out = [y.detach()]
    for t in (x, w, b):
        out.append(None if t is None or t.grad is None else t.grad)
        if t is not None:
            t.grad = None
    return out


def draws(recipe: Recipe) -> bool:
    """Whether a training step takes numbers from torch's generator."""
    quantizers = [q for gemm in GEMMS for q in recipe.pair(gemm)]
    return recipe.needs_rng or any(q.signs == "drawn" for q in quantizers)


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


# ---- the definition, without any of the layer's economies ----


def compose(recipe: Recipe, x, w, b, dy, ema=None, seed=1):
    """Y, dX, dW, db as the documentation defines them: six separate quantizers, three products."""
    torch.manual_seed(seed)
    rng = mxtrain.draw_rng(3, x.device) if recipe.needs_rng else [None] * 3
    firsts = {gemm: recipe.pair(gemm)[0] for gemm in ("fprop", "dgrad", "wgrad")}
    group = max(q.hadamard if q.signs == "drawn" else 0 for q in firsts.values())
    drawn = mxtrain.draw_signs(group, 3, x.device) if group else None
    signs = {}
    for i, (gemm, q) in enumerate(firsts.items()):
        fixed = fixed_signs(q.hadamard, x.device) if q.signs == "fixed" else None
        signs[gemm] = drawn[i][: q.hadamard] if q.signs == "drawn" else fixed

    x2, dy2 = x.detach().flatten(0, -2), dy.flatten(0, -2)
    pad = (0, 0, 0, -len(x2) % max(firsts["wgrad"].hadamard, 1))

    def squares(t, q, gemm, rng, forward, transpose):
        if q.source == "forward":
            return forward.transposed() if q.fallback else forward.without_fallback().transposed()
        if q.fallback:
            a = mxtrain.int8_quantize_fallback(t, initial_threshold(t, recipe))[0]
        else:
            rng = rng if q.rounding == "stochastic" else None
            a = mxtrain.int8_quantize(t, rounding=q.rounding, rng=rng)
        return a.transposed() if transpose else a

    def quantized(t, field, gemm, rng, forward=None, transpose=False):
        q = getattr(recipe, field)
        if q.format is None:
            return t.t() if transpose else t
        if q.square:
            return squares(t, q, gemm, rng, forward, transpose)
        t = forward.dequantize() if q.source == "forward" else t
        t = F.pad(t, pad) if field.startswith("wgrad") else t
        rounding = "nearest" if q.rounding == "toward" and ema is None else q.rounding
        return mxtrain.quantize(
            t, q.format, scale_rule=q.scale_rule, rounding=rounding, transpose=transpose,
            rng=rng if rounding == "stochastic" else None, hadamard=q.hadamard,
            signs=signs[gemm], prescale=q.prescale, toward=ema if rounding == "toward" else None,
        )  # fmt: skip

    def product(a, b, gemm, out, bias=None):
        operands = [t for t in (a, b) if isinstance(t, (mxtrain.Operand, mxtrain.Int8Operand))]
        if len(operands) == 2 and isinstance(a, mxtrain.Int8Operand):
            return mxtrain.int8_gemm(a, b, bias, out)
        if len(operands) == 2:
            return mxtrain.gemm(a, b, bias, alpha=recipe.alpha(gemm), out_dtype=out)
        a, b = (t if isinstance(t, torch.Tensor) else t.dequantize(x.dtype) for t in (a, b))
        return F.linear(a, b, bias).to(out)

    w, b = w.detach(), None if b is None else b.detach()
    qx, qw = quantized(x2, "fprop_x", "fprop", rng[0]), quantized(w, "fprop_w", "fprop", rng[1])
    y = product(qx, qw, "fprop", x.dtype, b)
    g = quantized(dy2, "dgrad_dy", "dgrad", rng[2])
    dx = product(g, quantized(w, "dgrad_w", "dgrad", rng[1], qw, True), "dgrad", x.dtype)
    g = quantized(dy2, "wgrad_dy", "wgrad", rng[2], transpose=True)
    dw = product(g, quantized(x2, "wgrad_x", "wgrad", rng[0], qx, True), "wgrad", w.dtype)
    db = None if b is None else reference.column_sum(dy2).to(b.dtype)
    return y.view(dy.shape), dx.view(x.shape), dw, db


# ---- what ran ----


class Ops(TorchDispatchMode):
    """Names of the mxtrain ops that ran, their arguments, and what they returned."""

    def __init__(self):
        super().__init__()
        self.names, self.calls, self.results = [], [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "mxtrain":
            self.names.append(func._schema.name.removeprefix("mxtrain::"))
            self.calls.append((func, args, kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if func.namespace == "mxtrain":
            self.results.append(result)
        return result


def ops_of(f):
    with Ops() as ops:
        f()
    return ops.names
