"""mxtrain: train neural networks in 4-bit microscaling (MX) arithmetic.

    import mxtrain
    print(mxtrain.convert(model, "tetrajet"))   # in place; then train as before

`mxtrain.quantize`, `gemm` and the rest are thin names over `torch.ops.mxtrain`;
`python -m mxtrain.env` says what this machine and build can do; docs/numerics.md says what every
byte means.
"""

from .version import __version__  # isort: skip
from . import nn as nn
from . import ops as ops  # registers the fake kernels and autograd
from . import optim as optim
from .convert import ConversionReport, convert
from .cost import model_cost, relative_cost
from .export import FrozenLinear, export_weights, load_exported
from .formats import FORMATS, Format
from .int8 import Int8Operand, int8_gemm, int8_quantize, int8_quantize_fallback
from .linear import MXLinear, linear
from .mix import MIXES, Mix, ModuleClass, get_mix
from .monitor import Monitor, monitor
from .operand import (
    Operand,
    column_sum,
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
from .oscillation import oscillation_step_, quantization_statistics
from .recipe import RECIPES, Quantizer, Recipe, get_recipe
from .schedule import TargetPrecision

__all__ = [
    "FORMATS",
    "MIXES",
    "RECIPES",
    "ConversionReport",
    "Format",
    "FrozenLinear",
    "Int8Operand",
    "MXLinear",
    "Mix",
    "ModuleClass",
    "Monitor",
    "Operand",
    "Quantizer",
    "Recipe",
    "TargetPrecision",
    "__version__",
    "column_sum",
    "convert",
    "dequantize",
    "draw_rng",
    "draw_signs",
    "export_weights",
    "gemm",
    "gemm_add_",
    "get_mix",
    "get_recipe",
    "hadamard",
    "int8_gemm",
    "int8_quantize",
    "int8_quantize_fallback",
    "linear",
    "load_exported",
    "model_cost",
    "monitor",
    "nn",
    "optim",
    "oscillation_step_",
    "quantization_statistics",
    "quantize",
    "quantize_dual",
    "relative_cost",
    "requantize",
    "set_gemm_backend",
    "stochastic_round",
    "swizzle_scale",
    "unswizzle_scale",
]
