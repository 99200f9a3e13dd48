"""The rows of RMSNorm and SwiGLU with int10_group contexts, and of a whole Llama block.

rms_norm/int10/RxC/fwd|bwd and swiglu/int10/RxC/fwd|bwd are the ops on BF16 matrices [R, C];
rms_norm/bf16/... and swiglu/bf16/... are torch's, forward only (its backward has no op of its own
to time). block/llama/RECIPE/SEQUENCESxCONTEXTxDIM/fwd+bwd is a forward and a backward of a block of
examples/llama.py, heads of 128, in BF16 throughout: int8 recipes have compressed contexts, and
RECIPE may end as in `recipe_named`. saved_bytes is all that autograd keeps from the forward to the
backward but parameters and buffers, each storage once; peak_bytes the most that one call holds.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mxtrain
from mxtrain import reference

from .cases import Case, Unfit, family, parse_shape
from .operands import byte_error, matrix_bytes, random_matrix, recipe_named

ROWS = 4  # that are checked
EPS = 1e-6
HEAD = 128
BF16 = torch.bfloat16
_ops = torch.ops.mxtrain


def _check_name(name: str, kind: str, passes: str) -> None:
    known = {"int10": ("fwd", "bwd"), "bf16": ("fwd",)}
    if passes not in known.get(kind, ()):
        raise ValueError(f"{name}: rows are int10/RxC/fwd, int10/RxC/bwd and bf16/RxC/fwd")


def _context_bytes(rows: int, cols: int) -> int:
    padded = -(-cols // 128) * 128
    return rows * padded * 5 // 4 + rows * padded // 128 * 4


def _context_pairs(got: tuple, part: int, want: tuple):
    return [(t[part, :ROWS], w) for t, w in zip(got, want, strict=True)]


# ---- RMSNorm ----


def _norm_inputs(rows: int, cols: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return random_matrix(rows, cols, BF16, device), torch.rand(cols, device=device).to(BF16) + 0.5


@family("rms_norm")
def rms_norm(name: str, kind: str, shape: str, passes: str) -> Case:
    """rms_norm/int10|bf16/RxC/fwd|bwd, BF16 weights."""
    rows, cols = parse_shape(shape)
    _check_name(name, kind, passes)
    dense, context = matrix_bytes(rows, cols, BF16), _context_bytes(rows, cols) + 4 * rows
    moved = 2 * dense + 2 * cols

    def make(device: torch.device) -> tuple:
        x, w = _norm_inputs(rows, cols, device)
        if passes == "fwd":
            return x, w
        return random_matrix(rows, cols, BF16, device), w, *_ops.rms_norm_forward(x, w, EPS, BF16)

    if kind == "bf16":
        return Case(name, make, lambda x, w: F.rms_norm(x, (cols,), w, EPS), moved)

    def forward(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return _ops.rms_norm_forward(x, w, EPS, BF16)

    def check_forward(inputs: tuple, got: tuple, elements: int) -> float:
        x, w = (t.cpu() for t in (inputs[0][:ROWS], inputs[1]))
        y, context, rstd = reference.rms_norm(x, w, EPS, BF16)
        pairs = [(got[0][:ROWS], y), (got[4][:ROWS], rstd)]
        return byte_error([*pairs, *_context_pairs(got[1:4], 0, context)])

    def backward(dy: Tensor, w: Tensor, y: Tensor, *kept: Tensor) -> tuple[Tensor, Tensor]:
        return _ops.rms_norm_backward(dy, *kept, w, BF16)

    def check_backward(inputs: tuple, got: tuple, elements: int) -> float:
        dy, w, _, *context, rstd = (t.cpu() for t in inputs)
        context = tuple(t[0, :ROWS] for t in context)
        dx, _ = reference.rms_norm_backward(dy[:ROWS], context, rstd[:ROWS], w, BF16)
        return byte_error([(got[0][:ROWS], dx)])

    if passes == "fwd":
        twin = f"rms_norm/bf16/{shape}/fwd"
        moved += context
        return Case(name, make, forward, moved, 0, "rms_norm_forward", check_forward, bf16=twin)
    moved += context + 4 * cols
    return Case(name, make, backward, moved, 0, "rms_norm_backward", check_backward)


# ---- SwiGLU ----


@family("swiglu")
def swiglu(name: str, kind: str, shape: str, passes: str) -> Case:
    """swiglu/int10|bf16/RxC/fwd|bwd of the halves of one matrix [R, 2 C]."""
    rows, cols = parse_shape(shape)
    _check_name(name, kind, passes)
    dense, context = matrix_bytes(rows, cols, BF16), 2 * _context_bytes(rows, cols)

    def make(device: torch.device) -> tuple:
        x = random_matrix(rows, 2 * cols, BF16, device)
        if passes == "fwd":
            return (x,)
        kept = _ops.swiglu_forward(*x.chunk(2, 1))[1:]
        return random_matrix(rows, cols, BF16, device), *kept

    def plain(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, 1)
        return F.silu(gate) * up

    if kind == "bf16":
        return Case(name, make, plain, 3 * dense)

    def forward(x: Tensor) -> tuple[Tensor, ...]:
        return _ops.swiglu_forward(*x.chunk(2, 1))

    def check_forward(inputs: tuple, got: tuple, elements: int) -> float:
        h, gate, up = reference.swiglu(*inputs[0][:ROWS].cpu().chunk(2, 1))
        contexts = [*_context_pairs(got[1:], 0, gate), *_context_pairs(got[1:], 1, up)]
        return byte_error([(got[0][:ROWS], h), *contexts])

    def backward(dh: Tensor, *kept: Tensor) -> Tensor:
        return _ops.swiglu_backward(dh, *kept, BF16)

    def check_backward(inputs: tuple, got: Tensor, elements: int) -> float:
        dh, *kept = (t.cpu() for t in inputs)
        gate, up = (tuple(t[i, :ROWS] for t in kept) for i in (0, 1))
        return byte_error([(got[:ROWS], reference.swiglu_backward(dh[:ROWS], gate, up, BF16))])

    moved = 3 * dense + context
    if passes == "fwd":
        twin = f"swiglu/bf16/{shape}/fwd"
        return Case(name, make, forward, moved, 0, "swiglu_forward", check_forward, bf16=twin)
    return Case(name, make, backward, moved, 0, "swiglu_backward", check_backward)


# ---- a block ----


def _example() -> ModuleType:
    """examples/llama.py of this checkout."""
    path = Path(__file__).resolve().parents[1] / "examples" / "llama.py"
    spec = importlib.util.spec_from_file_location("mxtrain_example_llama", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def saved_bytes(block: nn.Module, x: Tensor) -> int:
    """What autograd keeps of block(x), in bytes: each storage once, but for parameters, buffers."""
    known = [*block.parameters(), *block.buffers()]
    skip = {t.untyped_storage().data_ptr() for t in known}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in skip:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        block(x)
    return sum(kept.values())


@family("block")
def block(name: str, arch: str, recipe: str, shape: str, passes: str) -> Case:
    """block/llama/RECIPE/SEQUENCESxCONTEXTxDIM/fwd+bwd."""
    if arch != "llama" or passes != "fwd+bwd":
        raise ValueError(f"a block row is block/llama/.../fwd+bwd, got {name!r}")
    (sequences, context, dim), chosen = parse_shape(shape, 3), recipe_named(recipe)
    if dim % HEAD:
        raise Unfit(f"heads of {HEAD} do not divide a width of {dim}")
    llama = _example()

    def make(device: torch.device) -> tuple:
        torch.manual_seed(0)
        made = llama.LlamaBlock(dim, dim // HEAD, context).to(device, BF16)
        if chosen is not None:
            mxtrain.convert(made, chosen, include="*", strict=True)
            llama.compress_contexts(made)
        x = torch.randn(sequences, context, dim, device=device, dtype=BF16)
        made(x)  # packs the weights; sets the thresholds
        return made, x, torch.randn_like(x)

    def call(made: nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        x = x.detach().requires_grad_()
        y = made(x)
        return y, *torch.autograd.grad(y, (x, *made.parameters()), dy)

    def saved(made: nn.Module, x: Tensor, dy: Tensor) -> int:
        return saved_bytes(made, x.detach().requires_grad_())

    tokens, hidden = sequences * context, llama.hidden_size(dim)
    flops = 6 * tokens * dim * (4 * dim + 3 * hidden)  # of the linear layers
    twin = None if chosen is None else f"block/llama/bf16/{shape}/{passes}"
    op = None if chosen is None else "gemm"
    return Case(name, make, call, 0, flops, op, bf16=twin, saved=saved, tokens=tokens, graph=False)
