"""The rows of GEMMs and of whole linear layers, with their BF16 twins.

gemm/FORMAT[+BACKEND]/MxNxK is `mxtrain.gemm` of packed operands, BF16 out: everything from the
4-bit bytes to the result is timed. linear/RECIPE/TOKENSxINxOUT/fwd+bwd is a forward and a backward
of a linear layer with BF16 weights and no bias, all three GEMMs, quantizers included;
linear/bf16/... is F.linear. A recipe with a fallback has the threshold that a layer would have: a
fifth of the blocks of x fall back. saved_bytes is what such a layer keeps of x from its forward to
its backward. (What it keeps of the weight does not grow with the tokens.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import mxtrain
from mxtrain import Operand, reference
from mxtrain.fallback import initial_threshold
from mxtrain.formats import format_named

from .cases import Case, family, parse_shape
from .operands import operand_bytes, random_operand, recipe_named

CHECKED_ROWS = 16
BF16_STEP = 2.0**-8  # half a unit in the last place of the output, relative


@family("gemm")
def gemm(name: str, kind: str, shape: str) -> Case:
    """gemm/FORMAT/MxNxK, by the backend that the device takes; gemm/FORMAT+dequant/..., by that."""
    format, _, backend = kind.partition("+")
    fmt, (m, n, k) = format_named(format), parse_shape(shape, 3)

    def make(device: torch.device) -> tuple:
        return *random_operand(fmt, m, k, device), *random_operand(fmt, n, k, device)

    def call(
        a: Tensor, a_scale: Tensor, a_top: Tensor, b: Tensor, b_scale: Tensor, b_top: Tensor
    ) -> Tensor:
        with _backend(backend):
            return mxtrain.gemm(
                Operand(a, a_scale, format, (m, k), a_top),
                Operand(b, b_scale, format, (n, k), b_top),
            )

    def check(inputs: tuple, got: Tensor, elements: int) -> float:
        """Largest error of some rows against float64, over the sums of absolute products."""
        tops = [t if t is None else t.cpu() for t in (inputs[2], inputs[5])]
        rows = slice(0, min(m, CHECKED_ROWS))
        a = reference.dequantize(
            inputs[0][rows].cpu(), inputs[1][rows].cpu(), tops[0], format, k, torch.float32
        ).to(got.device, torch.float64)
        worst = 0.0
        for part in torch.arange(n).split(2048):
            cols = slice(int(part[0]), int(part[-1]) + 1)
            data, scale = (t[cols].contiguous() for t in inputs[3:5])
            b = mxtrain.dequantize(
                Operand(data, scale, format, (len(part), k), inputs[5]), torch.float32
            ).double()
            error = (got[rows, cols].double() - a @ b.T).abs()
            worst = max(worst, float((error / (a.abs() @ b.abs().T)).max()))
        return worst

    moved = operand_bytes(fmt, m, k) + operand_bytes(fmt, n, k) + 2 * m * n
    return Case(
        name, make, call, moved, 2 * m * n * k, "gemm", check, BF16_STEP,
        peers=(f"peer/cublas_fp8_rowwise/{shape}",), bf16=f"peer/cublas_bf16/{shape}",
    )  # fmt: skip


@contextlib.contextmanager
def _backend(name: str) -> Iterator[None]:
    if not name:
        yield
        return
    before = mxtrain.set_gemm_backend(name)
    try:
        yield
    finally:
        mxtrain.set_gemm_backend(before)


@family("linear")
def linear(name: str, recipe: str, shape: str, passes: str) -> Case:
    """linear/RECIPE/TOKENSxINxOUT/fwd+bwd; RECIPE as in `recipe_named`, bf16 is F.linear."""
    chosen = recipe_named(recipe)
    if passes != "fwd+bwd":
        raise ValueError(f"a linear row ends with fwd+bwd, got {passes!r}")
    tokens, inputs, outputs = parse_shape(shape, 3)

    def make(device: torch.device) -> tuple:
        def gaussian(*size: int) -> Tensor:
            return torch.randn(*size, dtype=torch.bfloat16, device=device)

        x, w = gaussian(tokens, inputs), gaussian(outputs, inputs) * inputs**-0.5
        falls_back = chosen is not None and chosen.fprop_x.fallback
        threshold = initial_threshold(x, chosen) if falls_back else None
        return x, w, gaussian(tokens, outputs), threshold

    def forward(x: Tensor, w: Tensor, threshold: Tensor | None) -> Tensor:
        if chosen is None:
            return F.linear(x, w)
        return mxtrain.linear(x, w, recipe=chosen, threshold=threshold)

    def call(x: Tensor, w: Tensor, dy: Tensor, threshold: Tensor | None) -> tuple[Tensor, ...]:
        x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
        y = forward(x, w, threshold)
        return y, *torch.autograd.grad(y, (x, w), dy)

    def saved(x: Tensor, w: Tensor, dy: Tensor, threshold: Tensor | None) -> int:
        """Where x needs no gradient, nothing of w is kept."""
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            forward(x, w.detach().requires_grad_(), threshold)
        return sum(t.nbytes for t in kept)

    flops, bf16 = 6 * tokens * inputs * outputs, f"linear/bf16/{shape}/{passes}"
    if chosen is None:
        return Case(name, make, call, 0, flops, saved=saved)
    peers = (f"peer/torchao_fp8_rowwise/{shape}",)
    return Case(name, make, call, 0, flops, "gemm", peers=peers, bf16=bf16, saved=saved)
