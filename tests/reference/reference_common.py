"""What the tests of the reference quantizers share: formats, rules, inputs, ways back to values."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import pytest
import torch
from torch import Tensor

import mxtrain.reference as ref

MX = ["mxfp4", "mxfp6_e3m2", "mxfp6_e2m3", "mxfp8_e4m3", "mxfp8_e5m2"]
ALL = [*MX, "nvfp4"]
RULES = ["floor", "ceil", "even"]
ML_DTYPES: dict[str, Any] = {
    "mxfp4": ml_dtypes.float4_e2m1fn,
    "mxfp6_e3m2": ml_dtypes.float6_e3m2fn,
    "mxfp6_e2m3": ml_dtypes.float6_e2m3fn,
    "mxfp8_e4m3": ml_dtypes.float8_e4m3fn,
    "mxfp8_e5m2": ml_dtypes.float8_e5m2,
    "nvfp4": ml_dtypes.float4_e2m1fn,
}
every_format = pytest.mark.parametrize("format", ALL)
every_mx = pytest.mark.parametrize("format", MX)
every_rule = pytest.mark.parametrize("scale_rule", RULES)


def rng(seed: int, offset: int = 0) -> Tensor:
    return torch.tensor([seed, offset])


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_signs(n: int, group: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(0, 2, (n, group), generator=generator) * 2 - 1).to(torch.int8)


def wide(rows: int, cols: int, seed: int = 0) -> Tensor:
    """Gaussian values whose magnitude changes by row and block over some 60 binades, with zeros."""
    x = gaussian(rows, cols, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    e = torch.randint(-30, 30, (rows, -(-cols // 16)), generator=generator).repeat_interleave(16, 1)
    x = torch.ldexp(x, e[:, :cols])
    x[torch.rand(x.shape, generator=generator) < 0.1] = 0.0
    x[-1, : cols // 2] = 0.0
    return x


def every_finite_bfloat16() -> Tensor:
    values = (torch.arange(65536, dtype=torch.int32) << 16).view(torch.float32)
    return values[torch.isfinite(values)].to(torch.bfloat16)


def quantized(x: Tensor, format: str = "mxfp4", **kwargs: Any) -> Tensor:
    """quantize and back, in the orientation of x."""
    transpose = kwargs.get("transpose", False)
    cols = x.shape[0] if transpose else x.shape[1]
    y = ref.dequantize(*ref.quantize(x, format, **kwargs), format, cols)
    return y.t() if transpose else y


def exponents(scale: Tensor, block: int = 32) -> Tensor:
    """The exponent of each element's E8M0 scale."""
    return (scale.to(torch.int64) - 127).repeat_interleave(block, 1)


def neighbours(u: Tensor) -> tuple[Tensor, Tensor]:
    """The E2M1 magnitudes around |u| <= 6; both are |u| where it is on the grid."""
    g = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    a = u.abs().double()
    return g[torch.searchsorted(g, a, right=True) - 1], g[torch.searchsorted(g, a)]
