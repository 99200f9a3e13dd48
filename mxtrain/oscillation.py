"""Diagnostics of quantized training: how weights oscillate, and what each quantizer loses.

The definitions, with W' the weight of the step before, Q(W) its quantized values and T the steps of
a window (arXiv 2502.20853):

    oscillation ratio    R = sum |Q(W) - Q(W')| / (sum |W - W'| + 1e-8), an element over a window;
                         a weight that drifts has about 1; above 16 the paper calls it oscillating
    rate of change       r(X) = mean over steps of |X - X'| / |X'|, Frobenius norms; of W, Q(W) and
                         layer outputs on fixed inputs
    confidence           how far W lies from the nearest rounding threshold, 0 to 1 (numerics.md)
    flips                elements whose Q(W) moved a step on its grid: by more than 1/32 of it
    SNR                  10 log10(sum x^2 / sum (x - Q(x))^2), in dB
    underflow            nonzero elements that round to 0, as a share of the nonzero ones
    clip                 elements beyond the format's largest at their scale, as a share of all

Q rounds as the recipe does; a stochastic fprop_w is watched as if it rounded to nearest, since its
flips would be those of the draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_bool, check_int, check_number, check_tensor, kind, refusal, show
from .formats import FORMATS, INT8_BLOCK
from .int8_statistics import int8_sums
from .linear import MXLinear
from .op_checks import STATISTICS_PARTS
from .operand import Operand, hadamard, quantize
from .recipe import Quantizer, fixed_signs
from .reference.statistics import (
    MOVEMENTS,
    STATISTICS,
    element_scales,
)
from .reference.statistics import confidence as _confidence

OSCILLATING = 16.0
"""The oscillation ratio above which the paper calls a weight oscillating."""


RATIO_EDGES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
"""Where the bins of `Oscillation.histogram` end; the last one has no end."""


# ---- the ops ----


MOST_GROUPS = STATISTICS_PARTS
"""The most matrices below each other whose sums one call tells apart."""


def _check_groups(what: str, groups: object, rows: int, q: Quantizer | Operand) -> None:
    """The ops make their sums in MOST_GROUPS parts, of as many consecutive elements each."""
    check_int(what, "groups", groups)
    if groups == 1:
        return
    advice = "Call it for each matrix by itself."
    if not 1 <= groups <= MOST_GROUPS or groups & (groups - 1) or rows % groups:
        condition = f"be a power of two up to {MOST_GROUPS} that divides the rows"
        raise ValueError(refusal(what, "groups", condition, groups, f"{rows} rows", advice))
    if FORMATS[q.format].scale == "e4m3":
        condition, context = "be 1 for nvfp4", "one scale would serve all of them"
        raise ValueError(refusal(what, "groups", condition, groups, context, advice))


def _by_group(parts: Tensor, groups: int) -> Tensor:
    return parts.sum(0) if groups == 1 else parts.unflatten(0, (groups, -1)).sum(1)


@torch.no_grad()
def quantization_statistics(
    x: Tensor, operand: Operand, prescale: float = 1.0, *, groups: int = 1
) -> Tensor:
    """What rounding did to x: sums by STATISTICS, float64 [8] on x's device.

    Args:
        x: `[R, K]`, bfloat16, float16 or float32; rotated, where that was rotated.
        operand: what quantize made of x.
        prescale: as quantize had it.
        groups: x is so many matrices of `[R / groups, K]` below each other, a power of two up to
            MOST_GROUPS; sums of each, `[groups, 8]`. Not for nvfp4, whose scale is the tensor's.

    Raises:
        RuntimeError: where x and the operand disagree.
    """
    check_tensor("quantization_statistics", "x", x)
    _check_operand("quantization_statistics", operand)
    check_number("quantization_statistics", "prescale", prescale)
    _check_groups("quantization_statistics", groups, len(x), operand)
    parts = (operand.data, operand.plain_scale(), operand.tensor_scale)
    code = FORMATS[operand.format].code
    sums = torch.ops.mxtrain.quantization_statistics(x, *parts, code, prescale)
    return _by_group(sums, groups)


@torch.no_grad()
def oscillation_step_(state: Tensor, w: Tensor, operand: Operand, *, groups: int = 1) -> Tensor:
    """One transition of w and its quantized q: sums by MOVEMENTS, float64 [5] on w's device.

    Args:
        state: float32 `[5, R, K]`, changed in place: w and q of the step before, and sums over the
            transitions of |w - w'|, of |q - q'| and of the flips.
        w: `[R, K]`, bfloat16, float16 or float32; rotated, where that was rotated.
        operand: what quantize made of w.
        groups: as quantization_statistics has it; sums `[groups, 5]`.

    Raises:
        RuntimeError: where shapes or dtypes disagree.
    """
    check_tensor("oscillation_step_", "state", state)
    check_tensor("oscillation_step_", "w", w)
    _check_operand("oscillation_step_", operand)
    _check_groups("oscillation_step_", groups, len(w), operand)
    return _by_group(_step_parts(state, w, operand), groups)


def _step_parts(state: Tensor, w: Tensor, operand: Operand) -> Tensor:
    """oscillation_step_, unchecked; its sums in parts, `[MOST_GROUPS, 5]`."""
    sums = w.new_empty((STATISTICS_PARTS, len(MOVEMENTS)), dtype=torch.float64)
    parts = (operand.data, operand.plain_scale(), operand.tensor_scale)
    code = FORMATS[operand.format].code
    torch.ops.mxtrain.oscillation_step_(state, sums, w, *parts, code)
    return sums


def _check_operand(what: str, operand: object) -> None:
    if not isinstance(operand, Operand):
        condition, advice = "be an Operand", "Pass what mxtrain.quantize returned."
        got = type(operand).__name__
        raise TypeError(refusal(what, "operand", condition, got, show(operand), advice))


# ---- one quantizer ----


def as_seen(
    x: Tensor, q: Quantizer, toward: Tensor | None = None, stochastic: bool = False
) -> tuple[Tensor, Operand]:  # fmt: skip
    """x as q's grid sees it, filled up and rotated along its rows, and its operand.

    Nothing is drawn: signs that a recipe draws are the fixed ones here, and stochastic rounding,
    where it is asked for, takes numbers of its own.
    """
    rounding, signs = q.rounding, None
    if (rounding == "stochastic" and not stochastic) or (rounding == "toward" and toward is None):
        rounding = "nearest"
    rng = _own_rng(x.device) if rounding == "stochastic" else None
    toward = toward.detach() if rounding == "toward" else None
    x = x.detach()
    if q.hadamard:
        fill = (0, -x.shape[1] % q.hadamard)
        x, toward = F.pad(x, fill), None if toward is None else F.pad(toward, fill)
        signs = fixed_signs(q.hadamard, x.device) if q.signs != "none" else None
    op = quantize(
        x, q.format, scale_rule=q.scale_rule, rounding=rounding, rng=rng, prescale=q.prescale,
        toward=toward, hadamard=q.hadamard, signs=signs,
    )  # fmt: skip
    return (hadamard(x.float(), q.hadamard, signs) if q.hadamard else x), op


def _own_rng(device: torch.device) -> Tensor:
    return torch.full((2,), 0x5EED, dtype=torch.int64, device=device)


def _check_quantizer(what: str, x: object, q: object, *more: str) -> None:
    """To one of FORMATS, or of more."""
    check_tensor(what, "x", x)
    if x.dim() != 2:
        condition, got, advice = "have 2 dimensions", x.dim(), "Flatten the leading axes."
        context = f"shape {list(x.shape)}"
        raise ValueError(refusal(what, "x", condition, got, context, advice))
    known = (*FORMATS, *more)
    if not isinstance(q, Quantizer) or q.format not in known:
        condition, advice = f"be a Quantizer to {', '.join(known)}", "Pass one of a recipe."
        raise ValueError(refusal(what, "quantizer", condition, show(q), kind(q), advice))


@torch.no_grad()
def quantizer_sums(
    x: Tensor, quantizer: Quantizer, *, transpose: bool = False, toward: Tensor | None = None,
    threshold: Tensor | None = None, groups: int = 1,
) -> Tensor:  # fmt: skip
    """The sums that `quantizer_rates` reads, on x's device without waiting for it: float64 [8].

    Args:
        x: `[R, K]`, bfloat16, float16 or float32.
        quantizer: with a format. Its source is not read: pass the forward operand's values.
        transpose: quantize x.T, whose blocks run along R.
        toward: like x, what a quantizer that rounds "toward" leans to; None rounds to nearest.
        threshold: float32 `[1]`, above which blocks fall back where the quantizer has a fallback;
            None: none does.
        groups: of matrices below each other, beside each other where it is transposed, sums of
            each, `[groups, 8]`; see quantization_statistics. Not for int8_block.
    """
    _check_quantizer("quantizer_sums", x, quantizer, INT8_BLOCK)
    check_bool("quantizer_sums", "transpose", transpose)
    if quantizer.square and groups != 1:
        condition, advice = "be 1 for int8_block", "Call it for each matrix by itself."
        context = "its squares have statistics of their own"
        message = refusal("quantizer_sums", "groups", condition, show(groups), context, advice)
        raise ValueError(message)
    if quantizer.square:  # its own transpose
        return int8_sums(x.detach(), quantizer, _own_rng(x.device), threshold)
    if transpose:
        x, toward = x.t(), None if toward is None else toward.t()
    x, op = as_seen(x, quantizer, toward, stochastic=True)
    return quantization_statistics(x, op, quantizer.prescale, groups=groups)


RATES = ("snr", "underflow", "clip", "confidence", "nonfinite")
"""What `quantizer_rates` says."""


def quantizer_rates(sums: Mapping[str, float]) -> dict[str, float]:
    """snr (dB), underflow, clip, confidence and nonfinite (shares) of sums by name of STATISTICS.

    What has no elements is NaN; an SNR without noise is inf.
    """
    row = torch.tensor([[sums[name] for name in STATISTICS]], dtype=torch.float64)
    return dict(zip(RATES, rates_of_sums(row)[0].tolist(), strict=True))


def rates_of_sums(sums: Tensor) -> Tensor:
    """quantizer_rates of rows of sums: float64 [N, 8] by STATISTICS to [N, 5] by RATES."""
    elements, nonfinite, nonzero, underflow, clip, signal, noise, sure = sums.unbind(1)
    snr = torch.full_like(signal, torch.inf).masked_fill_(signal == 0, torch.nan)
    snr = torch.where((noise > 0) & (signal > 0), 10 * (signal / noise).log10(), snr)
    parts = torch.stack([underflow, clip, sure, nonfinite], 1)
    wholes = torch.stack([nonzero, elements, elements, elements + nonfinite], 1)
    shares = torch.where(wholes == 0, torch.nan, parts / wholes)
    return torch.cat([snr[:, None], shares], 1)


def quantizer_statistics(
    x: Tensor, quantizer: Quantizer, *, transpose: bool = False, toward: Tensor | None = None,
    threshold: Tensor | None = None,
) -> dict[str, float]:  # fmt: skip
    """What a quantizer does to x: its snr, underflow, clip, confidence and nonfinite.

    Arguments as `quantizer_sums`. Drawn signs are the fixed ones here, and stochastic rounding
    takes numbers of its own, so torch's generator is left alone.
    """
    options = {"transpose": transpose, "toward": toward, "threshold": threshold}
    sums = quantizer_sums(x, quantizer, **options)
    return quantizer_rates(dict(zip(STATISTICS, sums.tolist(), strict=True)))


@torch.no_grad()
def confidence(w: Tensor, quantizer: Quantizer) -> Tensor:
    """Quantization confidence of each element of w `[R, K]`: float32 `[R, K]` in [0, 1].

    NaN in blocks that are not finite. For a rotated quantizer, of the rotated elements, with K
    filled up to whole groups.
    """
    _check_quantizer("confidence", w, quantizer)
    seen, op = as_seen(w, quantizer)
    scale = element_scales(op.scale, op.tensor_scale, op.format, seen.shape[1])
    # A block of zeros has no scale in nvfp4: its elements are on the grid.
    v = torch.where(seen == 0, 0.0, seen.float() * quantizer.prescale / scale)
    return torch.where(scale.isnan(), float("nan"), _confidence(v, op.format))


# ---- one weight over time ----


class Oscillation:
    """The movements of a matrix and of its quantized values, step by step.

        watch = Oscillation(layer.recipe.fprop_w)
        for step in range(31):
            watch.update(layer.weight)   # the first one only remembers
            ...
        watch.ratio()                    # R of each element over the 30 transitions

    Memory: 20 bytes an element. A quantizer that is rotated is watched on its rotated grid.

    Attributes:
        quantizer: how Q rounds.
        groups: matrices of one shape that are watched below each other, of which sums, summary and
            histogram then tell one by one, along a first axis; see quantization_statistics.
        transitions: updates since `reset`, less the first.
    """

    def __init__(self, quantizer: Quantizer, groups: int = 1) -> None:
        if not isinstance(quantizer, Quantizer) or quantizer.format not in FORMATS:
            condition, advice = (
                f"be a Quantizer to {', '.join(FORMATS)}",
                "Pass a recipe's fprop_w.",
            )
            got = show(quantizer)
            raise ValueError(
                refusal("Oscillation", "quantizer", condition, got, kind(quantizer), advice)
            )
        self.quantizer, self.groups, self.transitions = quantizer, groups, 0
        self._state: Tensor | None = None

    @classmethod
    def joined(cls, picks: Sequence[tuple[Oscillation, int]]) -> Oscillation:
        """Groups of others, (which, its group), that have one shape and as many transitions."""
        first = picks[0][0]
        watch = cls(first.quantizer, len(picks))
        watch.transitions = first.transitions
        states = [w._state.unflatten(1, (w.groups, -1))[:, group] for w, group in picks]
        watch._state = torch.cat(states, 1)
        return watch

    @torch.no_grad()
    def update(self, w: Tensor, toward: Tensor | None = None) -> Tensor | None:
        """w `[R, K]` is the matrix of the next step.

        Returns:
            Sums over this transition, float64 [5] by MOVEMENTS, on w's device; None the first time.
        """
        _check_quantizer("Oscillation.update", w, self.quantizer)
        _check_groups("Oscillation.update", self.groups, len(w), self.quantizer)
        parts = self.step(w, toward)
        return None if parts is None else _by_group(parts, self.groups)

    def step(self, w: Tensor, toward: Tensor | None) -> Tensor | None:
        """update of a checked w; its sums in parts, `[MOST_GROUPS, 5]`, which are not yet added."""
        w, op = as_seen(w, self.quantizer, toward)
        if self._state is None:
            self._state = self._begin(w, op)
            return None
        if self._state.shape[1:] != w.shape:
            condition = f"have the shape of the first, {list(self._state.shape[1:])}"
            got, context = list(w.shape), "one Oscillation watches one matrix"
            message = refusal(
                "Oscillation.update", "w", condition, got, context, "Make another Oscillation."
            )
            raise ValueError(message)
        self.transitions += 1
        return _step_parts(self._state, w, op)

    @staticmethod
    def _begin(w: Tensor, op: Operand) -> Tensor:
        state = torch.zeros((5, *w.shape), dtype=torch.float32, device=w.device)
        state[0].copy_(w)
        state[1].copy_(op.dequantize(torch.float32))
        return state

    def reset(self) -> None:
        """Begin a new window from the last update: R and flips are those since then."""
        self.transitions = 0
        if self._state is not None:
            self._state[2:].zero_()

    def _watched(self, what: str) -> Tensor:
        if self._state is None or self.transitions == 0:
            condition, advice = "have seen two matrices", "Call update after each step."
            got, context = self.transitions, "transitions"
            raise RuntimeError(refusal(what, "updates", condition, got, context, advice))
        return self._state

    def ratio(self) -> Tensor:
        """R of every element over the window, float32 of the matrix's shape.

        NaN where the element or its quantized value is not finite now.
        """
        w, q, travel_w, travel_q, _ = self._watched("Oscillation.ratio")
        finite = w.isfinite() & q.isfinite()
        return torch.where(finite, travel_q / (travel_w + 1e-8), torch.nan)

    def flips(self) -> Tensor:
        """How often Q of every element flipped in the window, int32."""
        return self._watched("Oscillation.flips")[4].to(torch.int32)

    def summary(self) -> Tensor:
        """Share of elements with R > 16, and R's mean: float32 [2]; NaN where one is."""
        return self._told(ratio_summary(self._ratios()))

    def _ratios(self) -> Tensor:
        return self.ratio().reshape(self.groups, -1)

    def _told(self, by_group: Tensor) -> Tensor:
        return by_group[0] if self.groups == 1 else by_group

    def histogram(self) -> Tensor:
        """Share of elements with R in [0, edge 0), [edge 0, edge 1), ..., edges of RATIO_EDGES.

        An element whose R is NaN is in none.
        """
        return self._told(ratio_histogram(self._ratios()))


def ratio_summary(r: Tensor) -> Tensor:
    """Oscillation.summary of the R of several, `[N, elements]`: float32 [N, 2]."""
    over = torch.where(r.isnan(), r, (r > OSCILLATING).float())
    return torch.stack([over.mean(1), r.mean(1)], 1)


def ratio_histogram(r: Tensor) -> Tensor:
    """Oscillation.histogram of the same: float32 [N, 10]."""
    below = torch.stack([(r < edge).float().mean(1) for edge in RATIO_EDGES], 1)
    zero, all_of_them = torch.zeros_like(below[:, :1]), (~r.isnan()).float().mean(1)[:, None]
    return torch.cat([zero, below, all_of_them], 1).diff()


def rate_of_change(sums: Tensor) -> tuple[Tensor, Tensor]:
    """r(W) and r(Q(W)), float64 scalars, of the sums by MOVEMENTS of transitions, `[T, 5]`; or of
    each group, `[T, groups, 5]`.
    """
    check_tensor("rate_of_change", "sums", sums)
    moved_w, size_w, moved_q, size_q, _ = sums.unbind(-1)
    return (moved_w / size_w).sqrt().mean(0), (moved_q / size_q).sqrt().mean(0)


def output_change(before: Tensor, after: Tensor) -> Tensor:
    """|after - before| / |before|, Frobenius norms in float32: a scalar on the device."""
    for name, t in (("before", before), ("after", after)):
        check_tensor("output_change", name, t)
    if before.shape != after.shape:
        condition, advice = "have the shape of before", "Compare outputs for the same inputs."
        got, context = list(after.shape), f"before {list(before.shape)}"
        raise ValueError(refusal("output_change", "after", condition, got, context, advice))
    before, after = before.detach().float(), after.detach().float()
    return (after - before).norm() / before.norm()


# ---- samples of a layer ----


def row_sample(rows: int, cols: int, elements: int) -> slice:
    """Rows, evenly spread, that hold about that many elements: all, where there are no more."""
    for name, value in (("rows", rows), ("cols", cols), ("elements", elements)):
        check_int("row_sample", name, value, low=0)
    wanted = max(1, elements // max(cols, 1))
    return slice(None, None, max(1, rows // wanted))


def token_sample(x: Tensor, elements: int) -> Tensor:
    """A copy [N, K] of about that many elements, in whole groups of 256 tokens: all where they are
    few, else from the start, the middle and the end, or from the middle alone where K is large."""
    x = x.detach().reshape(-1, x.shape[-1])
    n, groups = len(x), elements // max(x.shape[1], 1) // 256
    runs = 3 if groups >= 3 else 1
    length = 256 * max(1, groups // runs)
    if n <= runs * length:
        return x.clone()
    # Of whole squares and of whole blocks along the tokens.
    starts = [at // 128 * 128 for at in ((n - length) // 2, 0, n - length)[:runs]]
    return torch.cat([x[start : start + length] for start in starts])


def weight_quantizer(layer: MXLinear) -> Quantizer | None:
    """What rounds the layer's weight in the forward pass, to a format of FORMATS; else None."""
    q: Any = layer.recipe.fprop_w
    return q if q.format in FORMATS else None


__all__ = [
    "MOST_GROUPS",
    "MOVEMENTS",
    "OSCILLATING",
    "RATES",
    "RATIO_EDGES",
    "STATISTICS",
    "Oscillation",
    "as_seen",
    "confidence",
    "oscillation_step_",
    "output_change",
    "quantization_statistics",
    "quantizer_rates",
    "quantizer_statistics",
    "quantizer_sums",
    "rate_of_change",
    "rates_of_sums",
    "ratio_histogram",
    "ratio_summary",
    "row_sample",
    "token_sample",
    "weight_quantizer",
]
