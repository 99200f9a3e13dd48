"""mxtrain: train neural networks in 4-bit microscaling (MX) arithmetic.

    import mxtrain
    print(mxtrain.convert(model, "tetrajet"))   # in place; then train as before

`mxtrain.quantize`, `gemm` and the rest are thin names over `torch.ops.mxtrain`;
`python -m mxtrain.env` says what this machine and build can do; docs/numerics.md says what every
byte means.
"""

from .version import __version__  # isort: skip
from . import ops as ops  # registers the fake kernels and autograd
from .convert import ConversionReport, convert
from .formats import FORMATS, Format
from .int8 import Int8Operand, int8_gemm, int8_quantize, int8_quantize_fallback
from .linear import MXLinear, linear
from .operand import (
    Operand,
    dequantize,
    draw_rng,
    draw_signs,
    gemm,
    gemm_add_,
    hadamard,
    quantize,
    quantize_dual,
    requantize,
    set_gemm_backend,
    stochastic_round,
    swizzle_scale,
    unswizzle_scale,
)
from .recipe import RECIPES, Quantizer, Recipe, get_recipe

__all__ = [
    "FORMATS",
    "RECIPES",
    "ConversionReport",
    "Format",
    "Int8Operand",
    "MXLinear",
    "Operand",
    "Quantizer",
    "Recipe",
    "__version__",
    "convert",
    "dequantize",
    "draw_rng",
    "draw_signs",
    "gemm",
    "gemm_add_",
    "get_recipe",
    "hadamard",
    "int8_gemm",
    "int8_quantize",
    "int8_quantize_fallback",
    "linear",
    "quantize",
    "quantize_dual",
    "requantize",
    "set_gemm_backend",
    "stochastic_round",
    "swizzle_scale",
    "unswizzle_scale",
]
