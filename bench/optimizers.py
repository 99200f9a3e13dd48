"""The rows of optimizer steps.

optim/KIND[+EXTRA...]/RxC is one call of mxtrain's op on one matrix. KIND is adamw or qramping; an
extra is ema (the average of the weights in the same pass), changes (the sums of oscillation
statistics), or bf16 (weights and gradients of bfloat16, stochastic rounding; float32 without).
Bytes are those of one read and one write of every array. The peers are torch's AdamW, and its
foreach lerp of the average where there is one, as kernels of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.optim.adamw import adamw

import mxtrain
from mxtrain import reference

from .cases import Case, family, parse_shape
from .operands import byte_error

NUMBERS = (1e-3, 0.9, 0.999, 1e-8, 0.1)  # lr, betas, eps, weight_decay
EMA_STEP = 1.0 - 0.998
EXTRAS = ("ema", "changes", "bf16")
CHECKED = 32  # rows whose state before the step is kept


def _kind(text: str, kinds: tuple[str, ...], extras: tuple[str, ...]) -> tuple[str, list[str]]:
    kind, *words = text.split("+")
    bad = [word for word in words if word not in extras]
    if kind not in kinds or bad or (kind == "qramping" and set(words) - {"bf16"}):
        raise ValueError(
            f"an optimizer row must be one of {', '.join(kinds)} with +{', +'.join(extras)}"
            f" (qramping: +bf16 only), got {text!r}"
        )
    return kind, words


def _bytes(kind: str, words: list[str], elements: int) -> int:
    """Weight, gradient and both moments; then what the extras read and write."""
    weight = 2 if "bf16" in words else 4
    each = 3 * weight + 16 + 8 * ("ema" in words) + 16 * ("changes" in words)
    return elements * (each + (8 + 2 + 1) * (kind == "qramping"))


def _arrays(
    rows: int, cols: int, words: list[str], device: torch.device
) -> tuple[Tensor | None, ...]:
    """Weight, gradient, both moments and the average."""
    dtype = torch.bfloat16 if "bf16" in words else torch.float32

    def gaussian(dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(rows, cols, dtype=dtype, device=device)

    p, g, m, v = gaussian(dtype), gaussian(dtype), 0.1 * gaussian(), gaussian().square_()
    return p, g, m, v, p.float() + 0.01 * gaussian() if "ema" in words else None


@family("optim")
def optim(name: str, text: str, shape: str) -> Case:
    """optim/adamw[+ema][+changes][+bf16]/RxC and optim/qramping[+bf16]/RxC."""
    kind, words = _kind(text, ("adamw", "qramping"), EXTRAS)
    rows, cols = parse_shape(shape)
    ema, changes, ramped = "ema" in words, "changes" in words, kind == "qramping"

    def make(device: torch.device) -> tuple:
        arrays = _arrays(rows, cols, words, device)
        step, rng = torch.ones((), device=device), mxtrain.draw_rng(device=device)
        more = [None] * 4  # two sums, count and period
        if changes or ramped:
            more[:2] = (torch.rand(rows, cols, device=device) for _ in range(2))
        if ramped:
            whole = {"size": (rows, cols), "dtype": torch.uint8, "device": device}
            more[2:] = (torch.randint(i, i + 2, **whole) for i in range(2))
        before = [t if t is None else t[:CHECKED].clone() for t in (*arrays, *more)]
        return *arrays, *more, step, rng, *before

    def call(*inputs: Tensor) -> tuple[Tensor, ...]:
        p, g, m, v, average, moved, flipped, count, period, step, rng = inputs[:11]
        base = ([p], [g], [m], [v], [step], *NUMBERS, None, rng if "bf16" in words else None)
        if ramped:
            torch.ops.mxtrain.ramped_adamw_(*base, [moved], [count], [period])
            return p, m, v, moved
        emas = ([average], [EMA_STEP]) if ema else ([], [])
        sums = ([moved], [flipped]) if changes else ([], [])
        torch.ops.mxtrain.adamw_(*base, *emas, *sums, 1, 2 if ema and changes else 0)
        return (p, m, v, *emas[0], *sums[0], *sums[1])

    def check(inputs: tuple, got: tuple, elements: int) -> float:
        rng, *before = (t if t is None else t.cpu() for t in inputs[10:])
        return byte_error(zip((t[:CHECKED] for t in got), _expected(rng, *before), strict=True))

    def _expected(rng: Tensor, *before: Tensor) -> Iterator[Tensor]:
        p, g, m, v, average, moved, flipped, count, period = before
        f = reference.factors(2, *NUMBERS)
        if ramped:
            w, m, v, total, _ = reference.ramped_adamw(
                p.float(), g.float(), m, v, moved, count.long(), period, f
            )
        else:
            w, m, v = reference.adamw(p.float(), g.float(), m, v, f)
        after = reference.stochastic_round(w, torch.bfloat16, rng[0]) if "bf16" in words else w
        yield from (after, m, v)
        if ramped:
            yield total
        near = reference.lerp(average, after.float(), EMA_STEP) if ema else None
        if ema:
            yield near
        if changes:
            yield moved + (after.float() - p.float()).abs()
            yield (
                flipped + (_quantized(after, near) - _quantized(p, average if ema else None)).abs()
            )

    peers = (f"peer/torch_adamw/{shape}",) if kind == "adamw" and not words else ()
    if kind == "adamw" and words == ["ema"]:
        peers = (f"peer/torch_adamw+ema/{shape}", f"peer/torch_adamw_foreach+ema/{shape}")
    op = "ramped_adamw_" if ramped else "adamw_"
    return Case(name, make, call, _bytes(kind, words, rows * cols), 0, op, check, peers=peers)


def _quantized(w: Tensor, average: Tensor | None) -> Tensor:
    options = {} if average is None else {"rounding": "toward", "toward": average}
    data, scale, _ = reference.quantize(w, "mxfp4", **options)
    return reference.dequantize(data, scale, None, "mxfp4", w.shape[1], torch.float32)


def torch_adamw(fused: bool, ema: bool) -> Callable[[str, str], Case]:
    """peer/torch_adamw[_foreach][+ema]/RxC: torch's own kernels, fused or foreach (its default)."""

    def build(name: str, shape: str) -> Case:
        rows, cols = parse_shape(shape)
        words = ["ema"] if ema else []

        def make(device: torch.device) -> tuple:
            return *_arrays(rows, cols, words, device), torch.ones((), device=device)

        def call(*inputs: Tensor) -> tuple[Tensor, ...]:
            p, g, m, v, average, step = inputs
            lr, beta1, beta2, eps, weight_decay = NUMBERS
            adamw(
                [p], [g], [m], [v], [], [step], foreach=not fused, fused=fused,
                capturable=p.is_cuda, amsgrad=False, lr=lr, beta1=beta1, beta2=beta2, eps=eps,
                weight_decay=weight_decay, maximize=False,
            )  # fmt: skip
            if ema:
                torch._foreach_lerp_([average], [p], EMA_STEP)
            return p, m, v, average

        return Case(name, make, call, _bytes("adamw", words, rows * cols))

    return build


PEERS = {
    "torch_adamw": torch_adamw(True, False),
    "torch_adamw+ema": torch_adamw(True, True),
    "torch_adamw_foreach+ema": torch_adamw(False, True),
}
