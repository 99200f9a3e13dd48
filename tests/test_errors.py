"""Bad input: every refusal is one message.

It names the op, the argument, the condition, what came and what to do.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from common import operand, refuses

import mxtrain

X = torch.randn(64, 64)
RNG = torch.tensor([1, 2])
SIGNS = torch.ones(64, dtype=torch.int8)


def refused(error, match, call):
    with refuses(error, match):
        call()


def q(x=X, format="mxfp4", **options):
    return lambda: mxtrain.quantize(x, format, **options)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (q(X.double()), "x must be bfloat16, float16 or float32, got float64"),
        (q(torch.ones(4, 32, dtype=torch.int32)), "x must be bfloat16"),
        (q(torch.randn(32)), r"x must have 2 dimensions, got 1 \(shape \[32\]\)"),
        (q(torch.randn(2, 3, 32)), "x must have 2 dimensions, got 3"),
        (q(torch.randn(4, 0)), "block axis longer than 0"),
        (q(torch.randn(0, 4), transpose=True), "block axis longer than 0"),
        (q(rounding="stochastic"), "rng must be given"),
        (q(rounding="stochastic", rng=torch.tensor([1.0, 2.0])), "rng must be int64"),
        (
            q(rounding="stochastic", rng=torch.tensor([1, 2, 3])),
            r"rng must be int64 of shape \[2\]",
        ),
        (q(hadamard=24), "hadamard must be 0, 16, 32, 64, 128 or 256, got 24"),
        (q(hadamard=-16), "hadamard must be 0, 16"),
        (
            q(torch.randn(4, 96), hadamard=64),
            r"hadamard must divide the padded contraction axis, got 64 \(K = 96, padded to 96\)",
        ),
        (q(hadamard=32, signs=SIGNS), r"signs must be contiguous, of shape \[32\], got \[64\]"),
        (q(hadamard=64, signs=SIGNS.float()), "signs must be int8"),
        (q(signs=SIGNS), "signs must come with a Hadamard group"),
        (q(prescale=0.0), "prescale must be finite and positive"),
        (q(prescale=float("nan")), "prescale must be finite"),
        (q(rounding="toward"), "toward must be given with rounding 'toward'"),
        (q(toward=X), "toward must be given with rounding 'toward' and only then"),
        (q(rounding="toward", toward=X[:, :32]), "toward must have x's shape"),
        (q(rounding="toward", toward=X.double()), "toward must be bfloat16"),
        (
            lambda: torch.ops.mxtrain.quantize(X, 9),
            r"format must be one of the known codes, got 9 \(known: 0 mxfp4, 1 ",
        ),
        (lambda: torch.ops.mxtrain.quantize(X, 0, -1), "scale_rule must be one of"),
        (lambda: torch.ops.mxtrain.quantize(X, 0, 0, 7), "rounding must be one of"),
    ],
)
def test_quantize(call, match):
    refused(RuntimeError, match, call)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (q(format="mxfp5"), "format must be one of mxfp4, mxfp6_e3m2, .*, nvfp4, got 'mxfp5'"),
        (q(scale_rule="up"), "scale_rule must be one of floor, ceil, even, got 'up'"),
        (q(rounding="down"), "rounding must be one of nearest, stochastic, toward, got 'down'"),
        (
            lambda: mxtrain.gemm(operand(4, 32, "mxfp4"), operand(4, 32, "mxfp8_e4m3")),
            "a and b must have the same format",
        ),
        (
            lambda: mxtrain.gemm(operand(4, 32, "mxfp4"), operand(4, 31, "mxfp4")),
            "a and b must have the same K, got 32 and 31",
        ),
        (
            lambda: mxtrain.gemm(
                operand(4, 32, "mxfp4"), operand(4, 32, "mxfp4"), accumulate="fp8"
            ),
            "accumulate must be one of fp32, fast",
        ),
        (lambda: mxtrain.requantize(operand(4, 32, "mxfp4"), "int4"), "format must be one of"),
    ],
)
def test_names(call, match):
    refused(ValueError, match, call)


@pytest.mark.parametrize(
    "call",
    [
        lambda: mxtrain.gemm(X, X),
        lambda: mxtrain.dequantize(X),
        lambda: mxtrain.requantize(X),
    ],
)
def test_not_an_operand(call):
    refused(TypeError, "must be an Operand, got Tensor", call)


def deq(data, scale, format=0, cols=32, dtype=torch.float32, tensor_scale=None):
    return lambda: torch.ops.mxtrain.dequantize(data, scale, tensor_scale, format, cols, dtype)


BYTES, SCALES = torch.zeros(4, 16, dtype=torch.uint8), torch.zeros(4, 1, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (deq(BYTES.float(), SCALES), "operand data must be uint8 with 2 dimensions, got float32"),
        (deq(BYTES, SCALES[:, 0]), "operand scale must be uint8 with 2 dimensions"),
        (deq(BYTES[:, :15], SCALES), "whole blocks of 32 codes of 4 bits, got rows of 15 bytes"),
        (deq(BYTES[:, :0], SCALES), "whole blocks"),
        (deq(BYTES, SCALES[:3]), r"operand scale must have shape \[4, 1\], got \[3, 1\]"),
        (deq(BYTES, SCALES, format=3), "whole blocks of 32 codes of 8 bits, got rows of 16 bytes"),
        (deq(BYTES, SCALES, cols=33), "cols must lie in the last block of the operand, got 33"),
        (deq(BYTES, SCALES, cols=0), "cols must lie in the last block"),
        (
            deq(BYTES, SCALES, dtype=torch.float64),
            "dtype must be bfloat16, float16 or float32, got float64",
        ),
        (deq(BYTES, SCALES, tensor_scale=torch.ones(1)), "tensor_scale must be absent"),
        (deq(BYTES, SCALES.expand(4, 2), format=5), "tensor_scale must be given, got None"),
        (
            deq(BYTES, SCALES.expand(4, 2), format=5, tensor_scale=torch.ones(2)),
            "tensor_scale must be one float32",
        ),
        (deq(BYTES, SCALES, format=-1), "format must be one of the known codes"),
    ],
)
def test_dequantize(call, match):
    refused(RuntimeError, match, call)


def test_requantize():
    a = operand(4, 40, "mxfp4")
    refused(
        RuntimeError,
        "rounding must be nearest or stochastic",
        lambda: mxtrain.requantize(a, rounding="toward"),
    )
    refused(RuntimeError, "rng must be given", lambda: mxtrain.requantize(a, rounding="stochastic"))
    refused(RuntimeError, "hadamard must divide", lambda: mxtrain.requantize(a, hadamard=64))
    refused(
        RuntimeError,
        "block axis longer than 0",
        lambda: mxtrain.requantize(operand(0, 40, "mxfp4")),
    )
    call = lambda cols: torch.ops.mxtrain.requantize(a.data, a.scale, None, 0, cols, 0)  # noqa: E731
    refused(RuntimeError, "cols must lie in the last block", lambda: call(65))


def test_gemm():
    a, b, c = operand(4, 40, "mxfp4"), operand(6, 40, "mxfp4"), operand(6, 80, "mxfp4")
    refused(
        RuntimeError,
        r"bias must be bfloat16, float16 or float32 of shape \[6\], got float32 \[4\]",
        lambda: mxtrain.gemm(a, b, torch.ones(4)),
    )
    refused(
        RuntimeError,
        "bias must be bfloat16, float16 or float32",
        lambda: mxtrain.gemm(a, b, torch.ones(6, dtype=torch.int64)),
    )
    refused(RuntimeError, "out_dtype must be", lambda: mxtrain.gemm(a, b, out_dtype=torch.float64))
    refused(RuntimeError, "alpha must be finite", lambda: mxtrain.gemm(a, b, alpha=float("inf")))

    def raw():
        return torch.ops.mxtrain.gemm(
            a.data, a.scale, None, c.data, c.scale, None, 0, None, 1.0, torch.float32
        )

    refused(RuntimeError, "a and b must have the same K, got 64 and 96", raw)


def test_the_small_ops():
    refused(RuntimeError, "group must be 16", lambda: mxtrain.hadamard(X, 0))
    refused(RuntimeError, "group must be 16", lambda: mxtrain.hadamard(X, 7))
    refused(RuntimeError, "group must be 16", lambda: mxtrain.hadamard(X, 48))
    refused(
        RuntimeError, "group must divide the last axis", lambda: mxtrain.hadamard(X[:, :40], 32)
    )
    refused(RuntimeError, "x must be bfloat16", lambda: mxtrain.hadamard(X.double(), 32))
    refused(RuntimeError, "at least 1 dimension", lambda: mxtrain.hadamard(X[0, 0], 32))
    refused(
        RuntimeError,
        "x must be float32, got bfloat16",
        lambda: mxtrain.stochastic_round(X.bfloat16(), torch.bfloat16, RNG),
    )
    refused(
        RuntimeError,
        "dtype must be bfloat16, float8",
        lambda: mxtrain.stochastic_round(X, torch.float16, RNG),
    )
    refused(
        RuntimeError,
        "rng must be int64",
        lambda: mxtrain.stochastic_round(X, torch.bfloat16, RNG.int()),
    )
    refused(RuntimeError, "scale must be uint8", lambda: mxtrain.swizzle_scale(X))
    refused(
        RuntimeError,
        r"scale must be uint8 of shape \[1, 1, 512\]",
        lambda: mxtrain.unswizzle_scale(SCALES, 4, 1),
    )


def test_dual():
    row, col = mxtrain.Quantizer("mxfp4", rounding="stochastic"), mxtrain.Quantizer("mxfp4")
    refused(RuntimeError, "rng must be given", lambda: mxtrain.quantize_dual(X, row, col))
    refused(
        RuntimeError, "block axis longer than 0", lambda: mxtrain.quantize_dual(X[:0], col, col)
    )
    refused(
        ValueError,
        "format must be one of",
        lambda: mxtrain.quantize_dual(X, mxtrain.Quantizer(None), col),
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs two devices")
@pytest.mark.ops("quantize")
def test_devices(device):
    if device == "cuda":
        x = X.cuda()
        refused(
            RuntimeError,
            "rng must be on the device of the first argument",
            q(x, rounding="stochastic", rng=RNG),
        )
        refused(RuntimeError, "signs must be on the device", q(x, hadamard=64, signs=SIGNS))


def test_meta_tensors_among_real_ones():
    """A meta tensor would otherwise select the fake kernel, which returns memory as it finds it."""
    meta_rng, meta_signs = RNG.to("meta"), SIGNS.to("meta")
    a = operand(4, 64, "mxfp4")
    match = "must be on the device of the first argument, got meta"
    refused(RuntimeError, match, q(rounding="stochastic", rng=meta_rng))
    refused(RuntimeError, match, q(hadamard=64, signs=meta_signs))
    refused(RuntimeError, match, q(rounding="toward", toward=X.to("meta")))
    refused(RuntimeError, match, lambda: mxtrain.hadamard(X, 64, meta_signs))
    refused(RuntimeError, match, lambda: mxtrain.stochastic_round(X, torch.bfloat16, meta_rng))
    refused(RuntimeError, match, lambda: mxtrain.gemm(a, a, torch.ones(4, device="meta")))
    layer = mxtrain.MXLinear(64, 64, device="meta")
    refused(RuntimeError, "weight must be on the device of x, got meta", lambda: layer(X))


def test_factors_are_checked_as_float32():
    refused(RuntimeError, "prescale must be finite and positive", q(prescale=1e300))
    refused(RuntimeError, "prescale must be finite and positive", q(prescale=1e-300))
    a = operand(4, 64, "mxfp4")
    refused(RuntimeError, "alpha must be finite", lambda: mxtrain.gemm(a, a, alpha=1e300))


def test_not_even_tensors():
    a = operand(4, 64, "mxfp4")
    refused(TypeError, "x must be a torch.Tensor, got NoneType", q(None))
    refused(TypeError, "x must be a torch.Tensor, got list", q([1.0]))
    seed = r"rng must be a torch.Tensor or None, got int \(42\)\. Pass int64 \[2\] \(seed, offset\)"
    refused(TypeError, seed, q(rng=42))
    refused(
        TypeError,
        "rng must be a torch.Tensor",
        lambda: mxtrain.stochastic_round(X, torch.bfloat16, None),
    )
    refused(
        TypeError,
        "data must be a torch.Tensor",
        lambda: mxtrain.Operand(None, a.scale, "mxfp4", (4, 64)),
    )
    refused(
        ValueError,
        "format must be one of",
        lambda: mxtrain.Operand(a.data, a.scale, "zzz", (4, 64)),
    )
    refused(
        ValueError,
        "shape must have data's rows",
        lambda: mxtrain.Operand(a.data, a.scale, "mxfp4", (9, 64)),
    )
    refused(TypeError, "x must be a torch.Tensor", lambda: mxtrain.MXLinear(64, 64)(None))


@pytest.mark.parametrize("recipe", [None, 3, {}, [], ["tetrajet"], ("*", "tetrajet")])
def test_convert_wants_a_recipe(recipe):
    refused(
        TypeError,
        "recipe must be a name, a Recipe, a Mix, or a list",
        lambda: mxtrain.convert(torch.nn.Linear(64, 64), recipe),
    )


def test_convert_wants_a_model_and_patterns():
    model = torch.nn.Linear(64, 64)
    refused(
        TypeError,
        "model must be a torch.nn.Module, got NoneType",
        lambda: mxtrain.convert(None, "tetrajet"),
    )
    refused(
        TypeError,
        "include must be made of strings",
        lambda: mxtrain.convert(model, "tetrajet", include=5),
    )
    refused(
        ValueError,
        "must be a regular expression",
        lambda: mxtrain.convert(model, "tetrajet", include="re:("),
    )
    refused(
        ValueError,
        "prescale must be positive and finite",
        lambda: mxtrain.Quantizer("mxfp4", prescale="a"),
    )


def test_every_raise_goes_through_refusal():
    """In the sources: so that no message can lack a part. (Imports fail in words of their own.)"""
    package = Path(mxtrain.__file__).parent
    for path in package.rglob("*.py"):
        if path.name == "_library.py":
            continue
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise) and node.exc is not None:
                (argument,) = node.exc.args
                text = ast.unparse(argument)
                assert text == "message" or text.startswith("refusal("), (path.name, node.lineno)
