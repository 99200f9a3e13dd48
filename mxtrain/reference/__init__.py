"""Plain PyTorch reference of every mxtrain op, bit for bit what docs/numerics.md says.

The functions are slow, device agnostic and written to be read. A format is passed by name, and an
operand is the plain tuple ``(data, scale, tensor_scale)`` of docs/numerics.md, with
``tensor_scale`` None for the MX formats. This package imports nothing from the rest of mxtrain, so
that it can serve as its oracle.
"""

from __future__ import annotations

from .context import (
    int10_dequantize,
    int10_pack,
    int10_quantize,
    int10_unpack,
    rms_norm,
    rms_norm_backward,
    sigmoid,
    swiglu,
    swiglu_backward,
)
from .elements import (
    BFLOAT16,
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    E5M2,
    FORMATS,
    Element,
    Format,
    decode,
    decode_e8m0,
    encode,
    format_named,
    pack,
    unpack,
)
from .gemm import FOLD_BIAS, fold, gemm, gemm_float64, gemm_magnitude
from .int8 import int8_dequantize, int8_gemm, int8_quantize, int8_quantize_fallback
from .layout import swizzle, unswizzle
from .optimizer import adamw, factors, fma, lerp, ramped_adamw
from .philox import draws, draws_of_words, philox4x32
from .quantize import (
    column_sum,
    dequantize,
    hadamard,
    quantize,
    quantize_dual,
    requantize,
    stochastic_round,
)
from .statistics import confidence, oscillation_step_, quantization_statistics

__all__ = [
    "BFLOAT16",
    "E2M1",
    "E2M3",
    "E3M2",
    "E4M3",
    "E5M2",
    "FOLD_BIAS",
    "FORMATS",
    "Element",
    "Format",
    "adamw",
    "column_sum",
    "confidence",
    "decode",
    "decode_e8m0",
    "dequantize",
    "draws",
    "draws_of_words",
    "encode",
    "factors",
    "fma",
    "fold",
    "format_named",
    "gemm",
    "gemm_float64",
    "gemm_magnitude",
    "hadamard",
    "int8_dequantize",
    "int8_gemm",
    "int8_quantize",
    "int8_quantize_fallback",
    "int10_dequantize",
    "int10_pack",
    "int10_quantize",
    "int10_unpack",
    "lerp",
    "oscillation_step_",
    "pack",
    "philox4x32",
    "quantization_statistics",
    "quantize",
    "quantize_dual",
    "ramped_adamw",
    "requantize",
    "rms_norm",
    "rms_norm_backward",
    "sigmoid",
    "stochastic_round",
    "swiglu",
    "swiglu_backward",
    "swizzle",
    "unpack",
    "unswizzle",
]
