"""The weights that a monitor watches. Layers whose samples have one shape share their ops: they lie
below each other in one matrix, of which `groups` of mxtrain/oscillation.py tells one from another.
So a step costs a few launches for all layers, not a few for each; and who shares with whom is found
out once and kept (Plan), since Python for each layer costs more of a step than the launches do.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from .formats import FORMATS
from .oscillation import (
    MOST_GROUPS,
    MOVEMENTS,
    Oscillation,
    as_seen,
    quantizer_sums,
    rate_of_change,
    ratio_histogram,
    ratio_summary,
)
from .recipe import Quantizer
from .rows import Row

T = TypeVar("T")


MOST_ELEMENTS = 1 << 24
"""The most that samples below each other have in one call: it makes copies of them, in float32."""


def _chunks(
    items: Sequence[T], *quantizers: Quantizer | None, each: int = 1
) -> Iterator[list[T]]:  # fmt: skip
    """As many at a time as one call takes, of `each` elements."""
    formats = [FORMATS.get(q.format) for q in quantizers if q is not None]
    several = all(f is not None and f.scale != "e4m3" for f in formats)
    most = max(1, min(MOST_GROUPS, MOST_ELEMENTS // max(each, 1))) if several else 1
    while items:
        size = 1 << (min(len(items), most).bit_length() - 1)
        yield list(items[:size])
        items = items[size:]


def _alike(items: Iterable[tuple[Hashable, T]]) -> list[list[T]]:
    """The items of one key together, in their order."""
    found: dict[Hashable, list[T]] = {}
    for key, item in items:
        found.setdefault(key, []).append(item)
    return list(found.values())


def _kind(x: Tensor, toward: Tensor | None) -> Hashable:
    return x.shape, x.dtype, x.device, toward is None


def _joined(xs: Sequence[Tensor | None], dim: int) -> Tensor | None:
    if xs[0] is None or len(xs) == 1:
        return xs[0]
    return torch.cat(xs, dim)


class WeightWatch:
    """One layer's sample of its weight, and how it moves over its quantizer's grid."""

    def __init__(self, quantizer: Quantizer) -> None:
        self.quantizer = quantizer
        self.group: _Group | None = None
        self.index = 0  # in the group


class _Group:
    """Samples that are watched as one matrix, and the sums of each step of the window."""

    def __init__(self, members: list[WeightWatch]) -> None:
        before = [(m.group, m.index) for m in members if m.group is not None]
        self.members = members
        self.watch = Oscillation(members[0].quantizer, len(members))
        self._earlier: Tensor | None = None  # sums of steps that were made in other groups
        self._parts: list[Tensor] = []  # of those since, not yet added up
        if before:
            self.watch = Oscillation.joined([(group.watch, i) for group, i in before])
            if before[0][0].steps:
                moves = {id(group): group.moves() for group, _ in before}
                self._earlier = torch.stack([moves[id(group)][:, i] for group, i in before], 1)
        for i, member in enumerate(members):
            member.group, member.index = self, i

    @property
    def steps(self) -> int:
        """Of the window."""
        return (0 if self._earlier is None else len(self._earlier)) + len(self._parts)

    def update(self, w: Tensor, toward: Tensor | None) -> None:
        parts = self.watch.step(w, toward)
        if parts is not None:
            self._parts.append(parts)

    def moves(self) -> Tensor:
        """Sums of every step, [steps, members, 5]."""
        found = [] if self._earlier is None else [self._earlier]
        if self._parts:
            found.append(torch.stack(self._parts).unflatten(1, (len(self.members), -1)).sum(2))
        return torch.cat(found)

    def taken(self) -> tuple[Tensor, Tensor]:
        """moves(), and R [members, elements]. Begins a new window."""
        moves, ratio = self.moves(), self.watch.ratio()
        self.watch.reset()
        self._earlier, self._parts = None, []
        return moves, ratio.reshape(len(self.members), -1)

    def whole(self) -> bool:
        """Whether no member has gone to another group."""
        return all(m.group is self for m in self.members)


def _grouped(watches: list[WeightWatch]) -> _Group:
    """The group of just these, which it is already where nothing has changed."""
    group = watches[0].group
    same = group is not None and len(group.members) == len(watches)
    if same and all(a is b for a, b in zip(group.members, watches, strict=True)):
        return group
    return _Group(watches)


Sample = tuple[WeightWatch, Tensor, "Tensor | None"]  # the weight, and what it rounds toward


class Plan:
    """The samples of every step from now on: views, which show what the weights are by then."""

    def __init__(self, samples: Iterable[Sample]) -> None:
        def key(watch: WeightWatch, w: Tensor, toward: Tensor | None) -> Hashable:
            so_far = -1 if watch.group is None else watch.group.steps
            return watch.quantizer, _kind(w, toward), so_far

        self._parts: list[tuple[_Group, Sequence[Tensor], Sequence[Tensor | None]]] = []
        for alike in _alike((key(*sample), sample) for sample in samples):
            for some in _chunks(alike, alike[0][0].quantizer):
                watches, ws, towards = zip(*some, strict=True)
                self._parts.append((_grouped(list(watches)), ws, towards))
        self._lags: list[int] = []

    def _lag(self) -> list[int]:
        """How many steps a group has seen more than the first has. Those that differ in nothing
        else become one where they differ no more."""
        steps = [group.steps for group, *_ in self._parts]
        return [n - steps[0] for n in steps]

    def holds(self) -> bool:
        """Whether a new plan would be the same, the samples being so."""
        return self._lag() == self._lags and all(group.whole() for group, *_ in self._parts)

    def update(self) -> None:
        """A step has moved the weights."""
        for group, ws, towards in self._parts:
            group.update(_joined(ws, 0), _joined(towards, 0))
        self._lags = self._lag()


def values(watches: Iterable[WeightWatch]) -> dict[int, Row]:
    """By the id of a watch: r(W), r(Q(W)), flips, the summary and the histogram of R, float64. None
    of one that has not moved. Begins new windows; those of the others go on.
    """
    groups: list[_Group] = []
    for due in _alike((id(w.group), w) for w in watches if w.group is not None):
        ids = {id(w) for w in due}
        rest = [m for m in due[0].group.members if id(m) not in ids]
        for some in (*_chunks(due, due[0].quantizer), *_chunks(rest, due[0].quantizer)):
            group = _grouped(some)
            if id(some[0]) in ids and group.steps:
                groups.append(group)
    taken = [(group.members, *group.taken()) for group in groups]
    found: dict[int, Row] = {}
    # Of one length of window and one number of elements together, whatever the shapes.
    for alike in _alike(((len(m), r.shape[1], r.device), (w, m, r)) for w, m, r in taken):
        members, moves, ratios = zip(*alike, strict=True)
        table = _values(_joined(moves, 1), _joined(ratios, 0))
        found |= {id(w): Row(table, i) for i, w in enumerate(w for some in members for w in some)}
    return found


def _values(moves: Tensor, r: Tensor) -> Tensor:
    """[N, values] of sums [steps, N, 5] and R [N, elements]."""
    finite = r.isfinite().sum(1)  # of none the share is NaN
    flips = moves[..., MOVEMENTS.index("flips")].mean(0) / finite
    rates = torch.stack([*rate_of_change(moves), flips], 1)
    return torch.cat([rates, ratio_summary(r).double(), ratio_histogram(r).double()], 1)


class Asked(NamedTuple):
    """What `sums` is to tell, under a name: what q does to x, or, with a quantizer `first`, to the
    values that `first`, rounding toward `toward`, leaves of x. Without, `toward` is q's own.
    """

    name: Hashable
    q: Quantizer
    x: Tensor
    toward: Tensor | None = None
    first: Quantizer | None = None


def sums(asked: Iterable[Asked], transpose: bool) -> dict[Hashable, Row]:
    """quantizer_sums of each, by name."""
    found: dict[Hashable, Row] = {}
    for alike in _alike(((one.q, one.first, _kind(one.x, one.toward)), one) for one in asked):
        q, first = alike[0].q, alike[0].first
        for some in _chunks(alike, q, first, each=alike[0].x.numel()):
            names, _, xs, towards, _ = zip(*some, strict=True)
            n, options = len(some), {"transpose": transpose, "groups": len(some)}
            if first is None:
                dim = 1 if transpose else 0
                x = _joined(xs, dim)
                options["toward"] = _joined(towards, dim)
            else:
                x = forward_values(_joined(xs, 0), first, _joined(towards, 0))
                if transpose and n > 1:  # from below each other to beside each other
                    x = x.unflatten(0, (n, -1)).transpose(0, 1).flatten(1)
            table = quantizer_sums(x, q, **options).reshape(n, -1)
            found |= {name: Row(table, i) for i, name in enumerate(names)}
    return found


def forward_values(x: Tensor, q: Quantizer, toward: Tensor | None = None) -> Tensor:
    """The values of the forward operand, which double quantization quantizes again."""
    return as_seen(x, q, toward, stochastic=True)[1].dequantize(torch.float32)
