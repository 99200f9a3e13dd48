"""The rows that ours are compared with: device copies, cuBLAS, and torchao's `to_mx`, all in the
same process.

Peers import lazily. One that cannot be imported, or that this GPU cannot run, is a skipped row.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mxtrain import reference
from mxtrain.formats import format_named

from .cases import Case, family, parse_shape
from .operands import byte_error, matrix_bytes, operand_bytes, random_matrix, windows
from .optimizers import PEERS as OPTIMIZERS

TO_MX_DTYPES = {
    "mxfp4": "float4_e2m1fn_x2",
    "mxfp8_e4m3": "float8_e4m3fn",
    "mxfp8_e5m2": "float8_e5m2",
}


@family("peer")
def peer(name: str, kind: str, *rest: str) -> Case:
    """peer/KIND/..., one of PEERS."""
    if kind not in PEERS:
        raise ValueError(f"no peer {kind!r} (in {name!r}); there are {', '.join(PEERS)}")
    return PEERS[kind](name, *rest)


# ---- ceilings ----


def copy(name: str, shape: str) -> Case:
    """A device copy of a BF16 matrix, as torch's copy_ does it: the ceiling of of_copy."""

    def call(x: Tensor, out: Tensor) -> Tensor:
        return out.copy_(x)

    return _copy(name, shape, call)


def copy_kernel(name: str, shape: str) -> Case:
    """The same bytes through an elementwise kernel; the faster of the two copies is the ceiling."""

    def call(x: Tensor, out: Tensor) -> Tensor:
        return torch.mul(x, 1.0, out=out)

    return _copy(name, shape, call)


def _copy(name: str, shape: str, call: Callable[[Tensor, Tensor], Tensor]) -> Case:
    rows, cols = parse_shape(shape)

    def make(device: torch.device) -> tuple:
        x = random_matrix(rows, cols, torch.bfloat16, device)
        return x, torch.zeros_like(x)

    def check(inputs: tuple, got: Tensor, elements: int) -> float:
        return byte_error((got[w], inputs[0][w]) for w in windows(rows, cols, elements, True))

    return Case(name, make, call, 2 * matrix_bytes(rows, cols, torch.bfloat16), check=check)


def empty_kernel(name: str, shape: str) -> Case:
    """A kernel that does nothing: the least time of a launch. Only on CUDA."""
    if shape != "1":
        raise ValueError(f"the empty kernel has shape 1, got {shape!r}")
    return Case(name, lambda device: (), lambda: torch.cuda._sleep(0))


def cublas_bf16(name: str, shape: str) -> Case:
    """cuBLAS BF16, [M, K] times [N, K]^T: the ceiling of vs_bf16."""
    m, n, k = parse_shape(shape, 3)

    def make(device: torch.device) -> tuple:
        return tuple(torch.randn(r, k, dtype=torch.bfloat16, device=device) for r in (m, n))

    def call(a: Tensor, b: Tensor) -> Tensor:
        return torch.mm(a, b.t())

    return Case(name, make, call, 2 * (m * k + n * k + m * n), 2 * m * n * k)


def cublas_fp8_rowwise(name: str, shape: str) -> Case:
    """FP8 E4M3 with a float32 scale a row of A and of B, fast accumulation, BF16 out
    (torch._scaled_mm).
    """
    m, n, k = parse_shape(shape, 3)

    def make(device: torch.device) -> tuple:
        a, b = (torch.randn(r, k, device=device).to(torch.float8_e4m3fn) for r in (m, n))
        scale_a, scale_b = (torch.rand(r, device=device) + 0.5 for r in (m, n))
        return a, b, scale_a[:, None], scale_b[None, :]

    def call(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor) -> Tensor:
        return torch._scaled_mm(
            a,
            b.t(),
            scale_a=scale_a,
            scale_b=scale_b,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )

    moved = m * k + n * k + 2 * m * n + 4 * (m + n)
    return Case(name, make, call, moved, 2 * m * n * k, bf16=f"peer/cublas_bf16/{shape}")


# ---- torchao ----


def to_mx_names(format: str, shape: str) -> tuple[str, ...]:
    """The torchao rows that do what `quantize/format/nearest/shape` does, the faster one first."""
    if format not in TO_MX_DTYPES:
        return ()
    middle = "" if format == "mxfp4" else f"{format}/"
    return tuple(f"peer/torchao_to_mx_{mode}/{middle}{shape}" for mode in ("compiled", "eager"))


def to_mx(compiled: bool, name: str, *rest: str) -> Case:
    """torchao's to_mx with the OCP scale rule (floor), eager or under torch.compile:
    peer/KIND[/FORMAT]/RxC.
    """
    format, shape = rest if len(rest) == 2 else ("mxfp4", *rest)
    if format not in TO_MX_DTYPES:
        raise ValueError(f"torchao rows are of {', '.join(TO_MX_DTYPES)}, got {format!r}")
    fmt, (rows, cols) = format_named(format), parse_shape(shape)

    def make(device: torch.device) -> tuple:
        return (random_matrix(rows, cols, torch.bfloat16, device),)

    def call(x: Tensor) -> Any:
        return _to_mx_function(format, compiled)(x)

    def check(inputs: tuple, got: Any, elements: int) -> float:
        def pairs() -> Iterator[tuple[Tensor, Tensor]]:
            scale, data = (t.view(torch.uint8) for t in got)
            for window in windows(rows, cols, elements, True):
                want = reference.quantize(inputs[0][window].cpu(), format, scale_rule="floor")
                yield data[window], want[0]
                yield scale[window], want[1]

        return byte_error(pairs())

    moved = matrix_bytes(rows, cols, torch.bfloat16) + operand_bytes(fmt, rows, cols)
    return Case(name, make, call, moved, check=check, requires="torchao")


@functools.cache
def _to_mx_function(format: str, compiled: bool) -> Callable[[Tensor], Any]:
    with _quiet():
        from torchao.prototype.mx_formats.config import ScaleCalculationMode
        from torchao.prototype.mx_formats.mx_tensor import to_mx
    dtype = getattr(torch, TO_MX_DTYPES[format])

    def run(x: Tensor) -> Any:
        return to_mx(x, dtype, 32, ScaleCalculationMode.FLOOR)

    return torch.compile(run, dynamic=False) if compiled else run


def fp8_rowwise(name: str, shape: str) -> Case:
    """torchao's FP8 training layer under torch.compile, its recipe "rowwise" (cuBLASLt, a scale a
    row), BF16 weight, no bias: forward and backward, peer/torchao_fp8_rowwise/TOKENSxINxOUT.
    """
    tokens, inputs, outputs = parse_shape(shape, 3)

    def make(device: torch.device) -> tuple:
        with _quiet():
            from torchao.float8 import Float8LinearConfig, convert_to_float8_training
        layer = nn.Linear(inputs, outputs, bias=False, device=device, dtype=torch.bfloat16)
        config = Float8LinearConfig.from_recipe_name("rowwise")
        layer = convert_to_float8_training(nn.Sequential(layer), config=config)
        layer.compile(dynamic=False)
        x, dy = (
            torch.randn(tokens, size, dtype=torch.bfloat16, device=device)
            for size in (inputs, outputs)
        )
        return layer, x, dy

    def call(layer: nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        x = x.detach().requires_grad_()
        y = layer(x)
        return y, *torch.autograd.grad(y, (x, *layer.parameters()), dy)

    flops, bf16 = 6 * tokens * inputs * outputs, f"linear/bf16/{shape}/fwd+bwd"
    return Case(name, make, call, 0, flops, requires="torchao", bf16=bf16, graph=False)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torchao's log lines about extensions that it could not load, and that nothing here
    needs.
    """
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


PEERS: dict[str, Callable[..., Case]] = {
    "copy": copy,
    "copy_kernel": copy_kernel,
    "empty_kernel": empty_kernel,
    "cublas_bf16": cublas_bf16,
    "cublas_fp8_rowwise": cublas_fp8_rowwise,
    "torchao_fp8_rowwise": fp8_rowwise,
    "torchao_to_mx_compiled": functools.partial(to_mx, True),
    "torchao_to_mx_eager": functools.partial(to_mx, False),
    **OPTIMIZERS,
}
