"""The weights that a monitor watches. Layers whose samples have one shape share their ops: they lie
below each other in one matrix, of which `groups` of mxtrain/oscillation.py tells one from another.
So a step costs a few launches for all layers, not a few for each.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from .formats import FORMATS
from .oscillation import MOST_GROUPS, MOVEMENTS, Oscillation, quantizer_sums, rate_of_change
from .recipe import Quantizer

T = TypeVar("T")


def _chunks(items: Sequence[T], q: Quantizer) -> Iterator[list[T]]:
    """As many at a time as one call takes."""
    several = q.format in FORMATS and FORMATS[q.format].scale != "e4m3"
    most = MOST_GROUPS if several else 1
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
    """Samples that are watched as one matrix, and the sums of each step, [members, 5]."""

    def __init__(self, members: list[WeightWatch]) -> None:
        before = [(m.group, m.index) for m in members if m.group is not None]
        self.members, self.moves = members, []
        self.watch = Oscillation(members[0].quantizer, len(members))
        if before:
            self.watch = Oscillation.joined([(group.watch, i) for group, i in before])
            steps = zip(*(group.moves for group, _ in before), strict=True)
            indices = [i for _, i in before]
            self.moves = [
                torch.stack([moved[i] for moved, i in zip(step, indices, strict=True)])
                for step in steps
            ]
        for i, member in enumerate(members):
            member.group, member.index = self, i

    def update(self, w: Tensor, toward: Tensor | None) -> None:
        moved = self.watch.update(w, toward)
        if moved is not None:
            self.moves.append(moved.reshape(len(self.members), -1))

    def values(self) -> Tensor | None:
        """Of each member a row: r(W), r(Q(W)), flips, the summary and the histogram of R, float64;
        None where nothing has moved. Begins a new window.
        """
        if not self.moves:
            return None
        n, watch, moves = len(self.members), self.watch, torch.stack(self.moves)
        finite = watch.ratio().isfinite().reshape(n, -1).sum(1)  # of none the share is NaN
        flips = moves[..., MOVEMENTS.index("flips")].mean(0) / finite
        ratios = [t.reshape(n, -1).double() for t in (watch.summary(), watch.histogram())]
        rates = torch.stack([*rate_of_change(moves), flips], 1)
        watch.reset()
        self.moves = []
        return torch.cat([rates, *ratios], 1)


def _grouped(watches: list[WeightWatch]) -> _Group:
    """The group of just these, which it is already where nothing has changed."""
    group = watches[0].group
    same = group is not None and len(group.members) == len(watches)
    if same and all(a is b for a, b in zip(group.members, watches, strict=True)):
        return group
    return _Group(watches)


def update(samples: Iterable[tuple[WeightWatch, Tensor, Tensor | None]]) -> None:
    """The samples of the next step, and what they round toward."""

    def key(watch: WeightWatch, w: Tensor, toward: Tensor | None) -> Hashable:
        so_far = -1 if watch.group is None else len(watch.group.moves)
        return watch.quantizer, _kind(w, toward), so_far

    for alike in _alike((key(*sample), sample) for sample in samples):
        for some in _chunks(alike, alike[0][0].quantizer):
            watches, ws, towards = zip(*some, strict=True)
            _grouped(list(watches)).update(_joined(ws, 0), _joined(towards, 0))


def values(watches: Iterable[WeightWatch]) -> dict[int, Tensor]:
    """By the id of a watch, what _Group.values says of it; the others' windows go on."""
    found: dict[int, Tensor] = {}
    for due in _alike((id(w.group), w) for w in watches if w.group is not None):
        rest = [m for m in due[0].group.members if all(m is not w for w in due)]
        for some in (*_chunks(due, due[0].quantizer), *_chunks(rest, due[0].quantizer)):
            group = _grouped(some)
            rows = group.values() if some[0] in due else None
            if rows is not None:
                found |= {id(w): row for w, row in zip(some, rows, strict=True)}
    return found


def sums(
    asked: Iterable[tuple[Hashable, Quantizer, Tensor, Tensor | None]], transpose: bool
) -> dict[Hashable, Tensor]:
    """quantizer_sums of (name, quantizer, x, toward), by name."""
    found: dict[Hashable, Tensor] = {}
    keyed = (((one[1], _kind(one[2], one[3])), one) for one in asked)
    for alike in _alike(keyed):
        q = alike[0][1]
        for some in _chunks(alike, q):
            names, _, xs, towards = zip(*some, strict=True)
            dim = 1 if transpose else 0
            options = {"transpose": transpose, "toward": _joined(towards, dim)}
            rows = quantizer_sums(_joined(xs, dim), q, groups=len(some), **options)
            found |= dict(zip(names, rows.reshape(len(some), -1), strict=True))
    return found
