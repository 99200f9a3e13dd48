"""Every argument of every Python function, given the wrong kind of thing: one clear message each.

Never torch's schema error, an AttributeError, or a crash. tests/test_errors.py has what each
message says.
"""

from __future__ import annotations

import math

import pytest
import torch
from common import STYLE, operand

import mxtrain
from mxtrain.ema import update_weight_ema
from mxtrain.recipe import fixed_signs

X = torch.randn(64, 64)
A, NV = operand(64, 64, "mxfp4"), operand(64, 64, "nvfp4")
I8 = mxtrain.int8_quantize(X)
FALLBACK_3 = mxtrain.int8_quantize_fallback(torch.randn(64, 3 * 64), 1.0)[0]
RNG = torch.tensor([1, 2])
SIGNS = torch.ones(32, dtype=torch.int8)
SWIZZLED = mxtrain.swizzle_scale(A.scale)
LAYER = torch.nn.Linear(64, 64)
Q = mxtrain.Quantizer("mxfp4")


class Thing:
    """Nothing that any function knows."""

    def __repr__(self):
        return "a thing\nof two lines " + "and long " * 100


NO_TENSOR = ["x", [1.0], 3, Thing(), X.numpy(), torch.float32]
ODD_TENSORS = [
    X.to_sparse(),
    X.to_sparse_csr(),
    torch.nested.nested_tensor([X, X[:3]], layout=torch.jagged),
    torch.quantize_per_tensor(X, 0.1, 0, torch.qint8),
    X.to(torch.complex64),
    X.bool(),
    X.to(torch.float8_e5m2),
    X[None, None],
]
NO_INT = ["16", [16], 1.5, True, Thing(), X, math.nan, 2**63, 2**70, -(2**70)]
NO_SIZE = [*NO_INT, None, -1]
NO_NUMBER = ["1", [1.0], None, True, 1j, Thing(), math.nan, math.inf, 10**400]
NO_BOOL = [None, "x", 1, Thing(), X]
NO_NAME = ["x", "", 3, True, ["mxfp4"], {}, Thing(), X, X.numpy(), Q]
NO_FLOAT = [None, "float32", 3, Thing(), torch.int32, torch.complex64]
NO_DEVICE = [None, "nowhere", "cpu:x", 1.5, True, ["cpu"], Thing()]
TENSOR, OPTIONAL = [None, *NO_TENSOR, *ODD_TENSORS], [*NO_TENSOR, *ODD_TENSORS]
PLAIN = OPTIONAL[: len(NO_TENSOR) + 4]  # that no rounding may read it is no reason to take any
NO_OPERAND = [None, *NO_TENSOR, X, (A.data, A.scale)]

TARGET = {
    "scale_rule": [None, *NO_NAME],
    "rounding": [None, *NO_NAME],
    "rng": PLAIN,
    "hadamard": [None, *NO_INT, -1, 8, 512],
    "prescale": [*NO_NUMBER, 0, -1.0],
    "swizzle": NO_BOOL,
}
QUANTIZER = {
    "format": NO_NAME,
    "scale_rule": [None, *NO_NAME],
    "rounding": [None, *NO_NAME],
    "hadamard": [None, *NO_INT, -1, 8],
    "signs": [None, *NO_NAME],
    "prescale": [*NO_NUMBER, 0, -1.0],
    "source": [None, *NO_NAME],
}
# (function, arguments that are right, values of each that are not)
CALLS = [
    (
        mxtrain.quantize,
        {"x": X, "format": "mxfp4", "hadamard": 32},
        {
            "x": TENSOR,
            "format": [None, *NO_NAME],
            "transpose": NO_BOOL,
            "signs": OPTIONAL,
            "toward": OPTIONAL,
            **TARGET,
        },
    ),
    (
        mxtrain.quantize,
        {"x": X, "format": "mxfp4", "rounding": "stochastic"},
        {"rng": [None, *OPTIONAL]},
    ),
    (
        mxtrain.quantize,
        {"x": X, "format": "mxfp4", "rounding": "toward"},
        {"toward": [None, *OPTIONAL]},
    ),
    (
        mxtrain.quantize_dual,
        {"x": X, "row": Q, "col": Q},
        {
            "x": TENSOR,
            "row": [None, "mxfp4", {}, Thing(), X, mxtrain.Quantizer()],
            "col": [None, "mxfp4", {}, Thing(), X, mxtrain.Quantizer()],
            "rng": PLAIN,
            "row_signs": OPTIONAL,
            "col_signs": OPTIONAL,
            "row_toward": OPTIONAL,
            "col_toward": OPTIONAL,
            "swizzle": NO_BOOL,
            "column_sum": NO_BOOL,
        },
    ),
    (
        mxtrain.requantize,
        {"operand": A, "hadamard": 32},
        {"operand": NO_OPERAND, "format": NO_NAME, "signs": OPTIONAL, **TARGET},
    ),
    (mxtrain.dequantize, {"operand": A}, {"operand": NO_OPERAND, "dtype": NO_FLOAT}),
    (
        mxtrain.gemm,
        {"a": A, "b": A},
        {
            "a": NO_OPERAND,
            "b": [*NO_OPERAND, NV],
            "bias": OPTIONAL,
            "alpha": NO_NUMBER,
            "out_dtype": NO_FLOAT,
            "accumulate": [None, *NO_NAME],
        },
    ),
    (
        mxtrain.gemm_add_,
        {"out": torch.zeros(64, 64), "a": A, "b": A},
        {
            "out": [*TENSOR, torch.zeros(64, 64, requires_grad=True)],
            "a": NO_OPERAND,
            "b": [*NO_OPERAND, NV],
            "alpha": NO_NUMBER,
            "accumulate": [None, *NO_NAME],
        },
    ),
    (
        mxtrain.hadamard,
        {"x": X, "group": 32},
        {
            "x": [None, *NO_TENSOR, *ODD_TENSORS[:-1]],
            "group": [*NO_SIZE, 0, 7, 512],
            "signs": OPTIONAL,
        },
    ),
    (
        mxtrain.stochastic_round,
        {"x": X, "dtype": torch.bfloat16, "rng": RNG},
        {
            "x": [None, *NO_TENSOR, *ODD_TENSORS[:-1]],
            "dtype": [*NO_FLOAT, torch.float16],
            "rng": TENSOR,
        },
    ),
    (mxtrain.swizzle_scale, {"scale": A.scale}, {"scale": TENSOR}),
    (
        mxtrain.unswizzle_scale,
        {"scale": SWIZZLED, "rows": 64, "cols": 2},
        {
            "scale": TENSOR,
            "rows": [*NO_SIZE, 2**63 - 1, 2**62, 2**56],
            "cols": [*NO_SIZE, 2**63 - 1],
        },
    ),
    (mxtrain.draw_rng, {"n": 1}, {"n": NO_SIZE, "device": NO_DEVICE}),
    (
        mxtrain.draw_signs,
        {"group": 16, "n": 1},
        {"group": NO_SIZE, "n": NO_SIZE, "device": NO_DEVICE},
    ),
    (fixed_signs, {"g": 16}, {"g": [*NO_SIZE, 0, 8], "device": NO_DEVICE}),
    (
        mxtrain.Operand,
        {"data": A.data, "scale": A.scale, "format": "mxfp4", "shape": (64, 64)},
        {
            "data": [None, *NO_TENSOR, *ODD_TENSORS[:4], X[None], X[:3]],
            "scale": [None, *NO_TENSOR, *ODD_TENSORS[:4]],
            "format": [None, *NO_NAME],
            "shape": [None, "ab", 64, (64,), (64, 64, 64), (-64, 64), (64, "64"), (64, 2**63), X],
            "tensor_scale": PLAIN,
            "swizzled": NO_BOOL,
        },
    ),
    (mxtrain.Quantizer, {"format": "mxfp4"}, QUANTIZER),
    (
        mxtrain.Recipe,
        {"name": "mine"},
        {
            "name": [None, "", 3, ["a"], Thing(), X],
            "fprop_x": [None, "mxfp4", {}, Thing(), X],
            "wgrad_dy": [None, "mxfp4", {}, Thing(), X],
            "ema_beta": ["1", [1.0], True, 1j, Thing(), math.nan, math.inf, 10**400, -1, 0.5],
            "ema_warmup": NO_SIZE,
            "ema_fraction": ["1", [1.0], True, 1j, Thing(), math.nan, math.inf, 10**400, -1, 0.5],
            "ema_at_half": ["1", [1.0], True, 1j, Thing(), math.nan, math.inf, 10**400, -1, 0.5],
            "accumulate": [None, *NO_NAME],
            "reference": [None, 3, X],
        },
    ),
    (mxtrain.Recipe.from_dict, {"fields": {"name": "a"}}, {"fields": [None, "a", [1], 3, {}, X]}),
    (mxtrain.get_recipe, {"recipe": "bf16"}, {"recipe": [None, *NO_NAME]}),
    (
        mxtrain.RECIPES["tetrajet"].misfit,
        {"in_features": 1, "out_features": 1},
        {"in_features": NO_SIZE, "out_features": NO_SIZE},
    ),
    (
        mxtrain.convert,
        {"model": LAYER, "recipe": "bf16"},
        {
            "model": [None, *NO_TENSOR, X, torch.nn.Linear],
            "recipe": [None, *NO_NAME, [], [("*",)], ["*", "bf16"], [(3, "bf16")], [("*", 3)]],
            "include": [[], (), 5, [None], "re:(", "nothing", Thing(), {3: 4}],
            "exclude": [5, [None], "re:(", "nothing", Thing()],
            "strict": NO_BOOL,
        },
    ),
    (
        mxtrain.linear,
        {"x": X, "weight": X},
        {
            "x": TENSOR[:-1],
            "weight": TENSOR,
            "bias": OPTIONAL,
            "recipe": [None, *NO_NAME],
            "weight_ema": OPTIONAL,
        },
    ),
    (
        mxtrain.MXLinear,
        {"in_features": 64, "out_features": 64},
        {
            "in_features": [*NO_SIZE, 2**62],
            "out_features": [*NO_SIZE, 2**62],
            "bias": NO_BOOL,
            "device": NO_DEVICE[1:],
            "dtype": [*NO_FLOAT[1:], torch.float64],
            "recipe": [None, *NO_NAME],
        },
    ),
    (
        mxtrain.MXLinear.from_linear,
        {"module": torch.nn.Linear(64, 64)},
        {
            "module": [None, *NO_TENSOR, X, torch.nn.Linear, torch.nn.ReLU()],
            "recipe": [None, *NO_NAME],
        },
    ),
    (mxtrain.MXLinear(64, 64), {"x": X}, {"x": TENSOR[:-1]}),
    (
        mxtrain.int8_quantize,
        {"x": X, "rounding": "stochastic", "rng": RNG},
        {
            "x": TENSOR,
            "rounding": [None, *NO_NAME, "toward"],
            "rng": [None, *OPTIONAL],
            "layout": [None, *NO_NAME],
        },
    ),
    (
        mxtrain.int8_quantize_fallback,
        {"x": X, "threshold": 1.0},
        {
            "x": TENSOR,
            "threshold": [*NO_NUMBER[:-2], -math.inf, 0, -1.0, X, -torch.ones(1)],
            "layout": [None, *NO_NAME],
        },
    ),
    (
        mxtrain.int8_gemm,
        {"a": I8, "b": I8},
        {
            "a": [*NO_OPERAND, A, FALLBACK_3],
            "b": [*NO_OPERAND, A, FALLBACK_3],
            "bias": [*OPTIONAL, torch.ones(3)],
            "out_dtype": NO_FLOAT,
        },
    ),
    (
        mxtrain.Int8Operand,
        {"data": I8.data, "scale": I8.scale, "shape": (64, 64)},
        {
            "data": [None, *NO_TENSOR, *ODD_TENSORS[:4]],
            "scale": [None, *NO_TENSOR, *ODD_TENSORS[:4]],
            "shape": [None, 3, "x", (1,), (1.5, 2), (63, 64), (-1, 64), X],
            "mask": [*NO_TENSOR, *ODD_TENSORS[:4]],
        },
    ),
    (
        update_weight_ema,
        {"layers": [], "lr": 0.1},
        {
            "layers": [None, "x", 3, X, Thing(), [None], [LAYER]],
            "lr": ["x", [1.0], True, 1j, Thing(), math.nan, math.inf, -1],
        },
    ),
]
CASES = [
    pytest.param(function, good, name, values, id=f"{i}-{name}")
    for i, (function, good, bad) in enumerate(CALLS)
    for name, values in bad.items()
]


@pytest.mark.parametrize("function, good, name, values", CASES)
def test_one_message(function, good, name, values):
    for value in values:
        with pytest.raises((TypeError, ValueError, RuntimeError)) as caught:
            function(**{**good, name: value})
        message = str(caught.value)
        assert STYLE.fullmatch(message) and "\n" not in message, (value, message)
        assert len(message) < 600, message


@pytest.mark.parametrize("function, good", [call[:2] for call in CALLS], ids=range(len(CALLS)))
def test_the_right_arguments_are_right(function, good):
    if not isinstance(good.get("rounding"), str):  # else what is missing is the point
        function(**good)


def test_meta_tensors_and_gradients():
    meta = X.to("meta")
    assert mxtrain.quantize(meta, "nvfp4").dequantize().shape == (64, 64)
    a = mxtrain.quantize(X.clone().requires_grad_(), "nvfp4")
    assert not a.data.requires_grad and not a.dequantize().requires_grad
    out = mxtrain.gemm(a, a, torch.ones(64, requires_grad=True))
    assert out.isfinite().all()


def test_numpy_scalars_are_numbers():
    numpy = pytest.importorskip("numpy")
    a = mxtrain.quantize(X, "mxfp4", hadamard=numpy.int64(32), prescale=numpy.float32(0.5))
    b = mxtrain.quantize(X, "mxfp4", hadamard=32, prescale=0.5)
    assert torch.equal(a.data, b.data)


def test_huge_empty_scales_are_refused():
    """Sizes near 2^63 that take no memory must not overflow, nor take forever."""
    scale = torch.empty(2**62, 0, dtype=torch.uint8)
    for call in (
        lambda: mxtrain.swizzle_scale(scale),
        lambda: mxtrain.unswizzle_scale(SWIZZLED, 2**63 - 1, 2**63 - 1),
        lambda: mxtrain.unswizzle_scale(SWIZZLED, 2**63 - 1, 2),
        lambda: mxtrain.quantize(X[:0, :1].expand(0, 2**62), "mxfp4"),
        lambda: mxtrain.quantize(X[:1, :0].expand(2**62, 0), "mxfp4", transpose=True),
    ):
        with pytest.raises(RuntimeError, match=r"2\^56"):
            call()
    empty = mxtrain.swizzle_scale(scale[: 2**56])
    assert empty.shape == (2**49, 0, 512)
    assert mxtrain.unswizzle_scale(empty, 2**56, 0).shape == (2**56, 0)
