"""Values of many layers, which stay together in tables on the device until one copy takes them to
the host."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .oscillation import STATISTICS, rates_of_sums


class Row(NamedTuple):
    """Row i of a tensor [N, values], float64; the other rows are those of others."""

    table: Tensor
    i: int


def copied(rows: list[list[Row]]) -> Callable[[], list[list[list[float]]]]:
    """Start to copy rows to the host, all of one width and device at once. The function that is
    returned waits for it, and returns their values; of STATISTICS, the rates.
    """
    tables: dict[Any, dict[int, Tensor]] = {}
    for table, _ in itertools.chain(*rows):
        tables.setdefault((table.device, table.shape[1]), {})[id(table)] = table
    starts: dict[int, tuple[int, int]] = {}
    for n, some in enumerate(tables.values()):
        lengths = itertools.accumulate((len(t) for t in some.values()), initial=0)
        starts |= {key: (n, start) for key, start in zip(some, lengths, strict=False)}
    places = [[(starts[id(t)][0], starts[id(t)][1] + i) for t, i in some] for some in rows]
    joined = [torch.cat(list(some.values())) for some in tables.values()]
    copies = [t.to("cpu", non_blocking=True) for t in joined]
    streams = {t.device: torch.cuda.current_stream(t.device) for t in joined if t.is_cuda}
    events = [stream.record_event() for stream in streams.values()]

    def values() -> list[list[list[float]]]:
        for event in events:
            event.synchronize()
        told = (rates_of_sums(t) if t.shape[1] == len(STATISTICS) else t for t in copies)
        lists = [t.tolist() for t in told]
        return [[lists[n][i] for n, i in some] for some in places]

    return values
