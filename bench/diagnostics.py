"""The rows of the ops that watch a training run: quantization_statistics and oscillation_step_.

Both read a matrix and the operand that was made of it; the latter also reads and writes its state.
mxtrain.monitor calls them on samples of about 65536 elements.
"""

from __future__ import annotations

import torch
from torch import Tensor

import mxtrain
from mxtrain import Operand, reference
from mxtrain.formats import format_named

from .cases import Case, family, parse_shape
from .operands import matrix_bytes, operand_bytes, random_matrix

SUM_ERROR = 1e-9  # relative, of doubles added in another order


def _relative(got: Tensor, expected: Tensor) -> float:
    return float(((got.cpu() - expected).abs() / expected.abs().clamp(min=1)).max())


@family("quantization_statistics")
def quantization_statistics(name: str, format: str, shape: str) -> Case:
    """quantization_statistics/FORMAT/RxC of BF16."""
    fmt, (rows, cols) = format_named(format), parse_shape(shape)

    def make(device: torch.device) -> tuple:
        x = random_matrix(rows, cols, torch.bfloat16, device)
        op = mxtrain.quantize(x, format)
        return x, op.data, op.scale, op.tensor_scale

    def call(x: Tensor, data: Tensor, scale: Tensor, tensor_scale: Tensor) -> Tensor:
        op = Operand(data, scale, format, (rows, cols), tensor_scale)
        return mxtrain.quantization_statistics(x, op)

    def check(inputs: tuple, got: Tensor, elements: int) -> float:
        if rows * cols > elements:
            return 0.0 if int(got[0] + got[1]) == rows * cols else 1.0
        parts = [t if t is None else t.cpu() for t in inputs]
        return _relative(got, reference.quantization_statistics(*parts, format))

    moved = matrix_bytes(rows, cols, torch.bfloat16) + operand_bytes(fmt, rows, cols)
    op = "quantization_statistics"
    return Case(name, make, call, moved, 0, op, check, SUM_ERROR)


@family("oscillation_step")
def oscillation_step(name: str, format: str, shape: str) -> Case:
    """oscillation_step/FORMAT/RxC of BF16: the state [5, R, C] is read and written."""
    fmt, (rows, cols) = format_named(format), parse_shape(shape)

    def make(device: torch.device) -> tuple:
        w = random_matrix(rows, cols, torch.bfloat16, device)
        state = torch.zeros(5, rows, cols, device=device)
        state[:2] = 1.01 * w
        op = mxtrain.quantize(w, format)
        return w, state, op.data, op.scale, op.tensor_scale

    def call(w: Tensor, state: Tensor, data: Tensor, scale: Tensor, tensor_scale: Tensor) -> Tensor:
        op = Operand(data, scale, format, (rows, cols), tensor_scale)
        return mxtrain.oscillation_step_(state, w, op)

    def check(inputs: tuple, got: Tensor, elements: int) -> float:
        """That the state holds w and its quantized values; the tests compare the sums."""
        w, state, *parts = inputs
        op = Operand(parts[0], parts[1], format, (rows, cols), parts[2])
        held = torch.equal(state[0], w.float()) and torch.equal(state[1], op.dequantize())
        return 0.0 if held and bool(got.isfinite().all()) else 1.0

    moved = matrix_bytes(rows, cols, torch.bfloat16) + operand_bytes(fmt, rows, cols)
    moved += 2 * 5 * matrix_bytes(rows, cols, torch.float32)
    return Case(name, make, call, moved, 0, "oscillation_step_", check)
