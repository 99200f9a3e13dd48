"""The results of the study: their file, the table and the figures."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from harness import mean_and_spread
from matplotlib import colormaps
from matplotlib.figure import Figure
from study_rows import COMPARED, ROWS

from mxtrain.fallback_rule import DEFAULT

Fields = dict[str, Any]
NEAR = 10.0  # percent: gaps below it move alike from one run of a seed to the next
SAME = ("device", "torch", "compiled", "deterministic")  # for the same bits, besides the options
HEADINGS = (
    "row", "seeds", "validation loss", "metric", "gap to BF16", "units/s", "x BF16", "peak GiB",
    "R > 16, middle", "R > 16, end",
)  # fmt: skip

# ---- the file ----


def read_results(paths: Sequence[str]) -> list[Fields]:
    """The records of these files, each run once; files that do not exist hold none."""
    records: dict[str, Fields] = {}
    for path in paths:
        if os.path.exists(path):
            with open(path) as file:
                for record in json.load(file)["records"]:
                    records.setdefault(record["run"], record)
    return list(records.values())


def write_results(path: str, records: list[Fields]) -> None:
    """Whole or not at all: whenever this stops, the file holds every run that was in it before."""
    temporary = f"{path}.tmp"
    with open(temporary, "w") as file:
        file.write('{"records": [\n')
        file.write(",\n".join(json.dumps(rounded(record)) for record in records))
        file.write("\n]}\n")
    os.replace(temporary, path)


def rounded(value: Any) -> Any:
    """Floats to seven digits: more say nothing, and make the file twice as long."""
    if isinstance(value, float):
        return float(f"{value:.7g}")
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, (list, tuple)) else value


# ---- what is said of a row ----


def row_of(record: Fields) -> str:
    return record["run"].rpartition("@")[0]


def groups_of(records: list[Fields]) -> dict[tuple[str, str], dict[str, list[Fields]]]:
    """(task, group) -> row -> its records by seed, in the order of ROWS."""
    groups: dict[tuple[str, str], dict[str, list[Fields]]] = {}
    for name, row in ROWS.items():
        mine = sorted((r for r in records if row_of(r) == name), key=lambda r: r["seed"])
        if mine:
            groups.setdefault((row.task, row.group), {})[name] = mine
    return groups


def loss_gap(record: Fields, baseline: dict[int, Fields], row: int = -1) -> float | None:
    """Validation loss above that of the baseline from the same seed, in percent, in a row of the
    curve; both in a fixed order of addition, or neither."""
    other = baseline.get(record["seed"])
    if other is None or other is record or not finished(record) or not finished(other):
        return None
    if fixed(record) != fixed(other):
        return None
    return 100 * (record["rows"][row][2] / other["rows"][row][2] - 1)


def fixed(record: Fields) -> bool:
    return bool(record.get("deterministic"))


def finished(record: Fields) -> bool:
    return record["diverged"] is None and bool(record["rows"])


def speeds(records: list[Fields], bf16: list[Fields]) -> tuple[float | None, float | None]:
    """Units a second of the row and of BF16 in the last seed in which both had a GPU to themselves;
    without one, those of the row's last seed that had. No mean: it would mix kernels, since seeds
    are trained one after the other. A fixed order of addition takes its time, so both have it or
    neither.
    """
    mine, base = (
        {
            (r["seed"], fixed(r)): r["units_per_second"]
            for r in them
            if r["alone"] and r["units_per_second"] > 0
        }
        for them in (records, bf16)
    )
    seed = max(mine.keys() & base.keys() or mine.keys(), default=None)
    return mine.get(seed), base.get(seed)


def spread(values: Sequence[float | None], style: str, least: float | None = None) -> str:
    """The mean and, of several, the standard deviation; where least is known, not less than it."""
    known = [v for v in values if v is not None]
    if not known or least is None:
        return mean_and_spread(known, style) if known else "-"
    deviation = statistics.stdev(known) if len(known) > 1 else 0.0
    mean, deviation = statistics.fmean(known), max(least, deviation)
    return f"{mean:{style}} ± {deviation:{style.lstrip('+')}}"


class Repeated(NamedTuple):
    """From one run of a seed to the next: the standard deviation of a gap, in points, pooled over
    so many runs that were made more than once, with so many degrees of freedom."""

    deviation: float
    runs: int
    freedom: int

    def interval(self) -> tuple[float, float]:
        """That holds the deviation with 95%, were the gaps normal and independent."""
        return tuple(
            self.deviation * math.sqrt(self.freedom / chi_square(share, self.freedom))
            for share in (0.975, 0.025)
        )


def chi_square(share: float, freedom: int) -> float:
    """The value that chi-square with so many degrees of freedom is below with this probability."""
    low, high, half = 0.0, 100.0 + 10 * freedom, torch.tensor(freedom / 2, dtype=torch.float64)
    for _ in range(60):
        middle = (low + high) / 2
        below = torch.special.gammainc(half, torch.tensor(middle / 2, dtype=torch.float64))
        low, high = (middle, high) if below < share else (low, middle)
    return low


class Moves(NamedTuple):
    """What run_to_run finds."""

    near: Repeated | None  # of all rows whose mean gap is below NEAR
    far: dict[str, Repeated | None]  # of each other row by itself: a large gap moves by more

    def least(self, row: str) -> float | None:
        """Of the spread of this row's gap."""
        found = self.far.get(row, self.near)
        return None if found is None else found.deviation


def pooled(groups: list[list[float]]) -> Repeated | None:
    """Of gaps from the same seed. Runs that ended alike are one."""
    again = [found for g in groups if len(found := list(dict.fromkeys(g))) > 1]
    if not again:
        return None
    freedom = sum(len(found) - 1 for found in again)
    squares = sum(statistics.variance(found) * (len(found) - 1) for found in again)
    return Repeated(math.sqrt(squares / freedom), len(again), freedom)


def run_to_run(records: list[Fields], repeats: Sequence[list[Fields]], task: str) -> Moves:
    """By how much the gaps of a task move from one run of a seed to the next. repeats: results
    files, each with a BF16 of its own.

    The deviation over seeds has this in it already, so a gap is known to the larger of the two, not
    to both together: that of three seeds is often too small by chance.
    """
    rows: dict[str, dict[int, list[float]]] = {}  # gaps by seed
    for some in (records, *repeats):
        for record in some:
            if row_of(record).split("/")[0] == task and "%" not in record["metric"]:
                gap = gap_of(record, some)
                if gap is not None:
                    rows.setdefault(row_of(record), {}).setdefault(record["seed"], []).append(gap)
    groups = {name: list(seeds.values()) for name, seeds in rows.items()}
    means = {name: abs(statistics.fmean(chain(*found))) for name, found in groups.items()}
    near = list(chain(*(found for name, found in groups.items() if means[name] < NEAR)))
    far = {name: pooled(found) for name, found in groups.items() if means[name] >= NEAR}
    return Moves(pooled(near), far)


def line(
    name: str, records: list[Fields], bf16: list[Fields], least: float | None = None
) -> tuple[str, ...]:  # fmt: skip
    baseline = {r["seed"]: r for r in bf16}
    good = [r for r in records if finished(r)]
    diverged = len(records) - len(good)
    accuracy = "%" in records[0]["metric"]
    losses = spread([r["rows"][-1][2] for r in good], ".4f")
    if diverged:
        losses += f" ({diverged} diverged)"
    if accuracy:
        gaps = [
            r["rows"][-1][3] - baseline[r["seed"]]["rows"][-1][3]
            for r in good
            if r["seed"] in baseline
            and baseline[r["seed"]] is not r
            and fixed(r) == fixed(baseline[r["seed"]])
        ]
        gap = f"{spread(gaps, '+.2f')} points" if gaps else "-"
    else:
        gaps = [loss_gap(r, baseline) for r in good]
        gap = spread(gaps, "+.2f", least) + (" %" if any(g is not None for g in gaps) else "")
    rate, base = speeds(records, bf16)
    peak = [r["peak_bytes"] / 2**30 for r in good if r["peak_bytes"]]
    watched = [
        [100 * r["oscillation"][when]["oscillating"] for r in good if when in r["oscillation"]]
        for when in ("middle", "end")
    ]
    return (
        name.split("/")[1],
        " ".join(str(r["seed"]) for r in records),
        losses,
        spread([r["rows"][-1][3] for r in good], ".2f" if accuracy else ".4f"),
        gap,
        "-" if rate is None else f"{rate:,.0f}",
        f"{rate / base:.2f}" if rate and base else "-",
        f"{statistics.fmean(peak):.2f}" if peak else "-",
        *(f"{spread(values, '.3f')} %" if values else "-" for values in watched),
    )


def table(
    rows: dict[str, list[Fields]], bf16: list[Fields],
    least: Callable[[str], float | None] = lambda name: None,
) -> str:  # fmt: skip
    """A markdown table; columns in which no row has anything are left out. least: of the spread of
    a row's gap."""
    first = next(iter(rows.values()))[0]
    headings = list(HEADINGS)
    headings[3], headings[5] = first["metric"], f"{first['unit']}/s"
    lines = [line(name, records, bf16, least(name)) for name, records in rows.items()]
    kept = [i for i in range(len(headings)) if any(text[i] != "-" for text in lines)]
    shown = [headings, ["---"] * len(headings), *lines]
    return "\n".join("| " + " | ".join(row[i] for i in kept) + " |" for row in shown)


def heading(task: str, group: str, rows: dict[str, list[Fields]]) -> str:
    record = next(iter(rows.values()))[0]
    size, units = record["parameters"] / 1e6, record["units"] / 1e6
    what = f"{size:.1f} million parameters, {record['steps']} steps, {units:.1f} million"
    where = f"{record['device']}, torch {record['torch']}"
    return f"## {task}, {group}\n\n{what} {record['unit']}; {where}"


def note(found: Repeated | None) -> str:
    """What the spread of a gap is. found: of gaps below NEAR."""
    if found is None:
        return ""
    runs = "one run that was" if found.runs == 1 else f"{found.runs} runs that were"
    low, high = found.interval()
    freedom = f"{found.freedom} degree{'s' * (found.freedom > 1)} of freedom"
    return (
        "\n\nThe spread of a gap is that of one run: its standard deviation over the seeds, or "
        "over repetitions of a seed where that is larger. Repetitions of rows with gaps below "
        f"{NEAR:.0f}% have {found.deviation:.2f} points, pooled over {runs} made again ({freedom}, "
        f"95% interval {low:.2f} to {high:.2f}); a row with a larger gap has its own."
    )


def between(rows: dict[str, list[Fields]]) -> str:
    """A markdown table of rows that say more beside each other, by the loss within a seed: the
    differences of their gaps have no BF16 in them."""
    lines = [("row", "compared with", "seeds", "validation loss above it"), ("---",) * 4]
    for name, other in COMPARED:
        if name in rows and other in rows:
            base = {r["seed"]: r for r in rows[other]}
            gaps = {r["seed"]: gap for r in rows[name] if (gap := loss_gap(r, base)) is not None}
            seeds = " ".join(map(str, gaps))
            short = (n.split("/")[1] for n in (name, other))
            lines.append((*short, seeds, spread(list(gaps.values()), "+.2f") + " %" * bool(gaps)))
    return "" if len(lines) == 2 else "\n\n" + "\n".join(f"| {' | '.join(r)} |" for r in lines)


def write_report(
    records: list[Fields], folder: str, figures: bool = False,
    repeats: Sequence[list[Fields]] = (),
) -> str:  # fmt: skip
    """table.md, and with `figures` TASK-GROUP.png, and TASK-ROW-rates.png of a row whose layers
    fall back. Returns the text of the table. repeats: see run_to_run.
    """
    parts = []
    for (task, group), rows in groups_of(records).items():
        bf16 = [r for r in records if row_of(r) == f"{task}/bf16"]
        moves = run_to_run(records, repeats, task)
        shown = table(rows, bf16, moves.least) + note(moves.near) + between(rows)
        parts.append(f"{heading(task, group, rows)}\n\n{shown}")
        if figures:
            everything = {f"{task}/bf16": bf16, **rows} if bf16 else rows
            write_figure(everything, os.path.join(folder, f"{task}-{group}.png"))
            for name, mine in rows.items():
                if any(r.get("fallback") for r in mine):
                    path = os.path.join(folder, f"{name.replace('/', '-')}-rates.png")
                    write_rates(mine, path)
    text = "\n\n".join(parts) + "\n"
    with open(os.path.join(folder, "table.md"), "w") as file:
        file.write(text)
    return text


def comparison(
    records: list[Fields], others: list[Fields], repeats: Sequence[list[Fields]] = ()
) -> str:  # fmt: skip
    """A markdown table of the runs that others hold too: for results that were made again.

    Seeds there: the gap's mean and spread over all of theirs, within which it should be. Losses
    themselves are comparable where the data are the same: another environment has another text.
    Same weights: whether both ended in the same bits, as runs with --deterministic do on one kind
    of device with the same software.
    """
    theirs = {r["run"]: r for r in others}
    rows = [("run", "validation loss", "there", "above BF16", "there", "seeds there", "same data",
             "same weights")]  # fmt: skip
    rows.append(("---",) * len(rows[0]))
    for mine in records:
        if (other := theirs.get(mine["run"])) is None:
            continue
        losses = [f"{r['rows'][-1][2]:.4f}" if finished(r) else "-" for r in (mine, other)]
        gaps = [gap_of(mine, records), gap_of(other, others)]
        seeds = [gap_of(r, others) for r in others if row_of(r) == row_of(mine)]
        least = run_to_run(others, repeats, row_of(mine).split("/")[0]).least(row_of(mine))
        told = ([gaps[0]], None), ([gaps[1]], None), (seeds, least)
        gaps = [spread(gap, "+.2f", floor) + " %" * any(g is not None for g in gap)
                for gap, floor in told]  # fmt: skip
        data, weights = (same_field(mine, other, name) for name in ("data", "weights"))
        if weights == "no" and any(mine.get(name) != other.get(name) for name in SAME):
            weights = "not comparable"
        rows.append((mine["run"], *losses, *gaps, data, weights))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def same_field(mine: Fields, other: Fields, name: str) -> str:
    """yes, no, or unknown: older records have no such field."""
    found = mine.get(name), other.get(name)
    return "unknown" if None in found else "yes" if found[0] == found[1] else "no"


def gap_of(record: Fields, records: list[Fields]) -> float | None:
    """loss_gap to the BF16 among the records."""
    baseline = ROWS[row_of(record)].baseline
    return loss_gap(record, {r["seed"]: r for r in records if row_of(r) == baseline})


# ---- the figures ----


def write_figure(rows: dict[str, list[Fields]], path: str) -> None:
    """Validation loss, and its gap to BF16 from the same seed: a colour a row, the seeds' mean."""
    figure = Figure(figsize=(13, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    baseline = {r["seed"]: r for r in next(iter(rows.values()))}
    scale = "linear"
    for i, (name, records) in enumerate(rows.items()):
        good = [r for r in records if finished(r)]
        if not good:
            continue
        colour = ("C" + str(i % 10), ("-", "--", ":")[i // 10 % 3])
        steps = [row[0] for row in good[0]["rows"]]
        means = [statistics.fmean(r["rows"][j][2] for r in good) for j in range(len(steps))]
        left.plot(steps, means, colour[1], color=colour[0], label=name.split("/")[1])
        gaps = []
        for j in range(len(steps)):
            known = [g for r in good if (g := loss_gap(r, baseline, j)) is not None]
            gaps.append(statistics.fmean(known) if known else None)
        if all(gap is not None for gap in gaps):
            right.plot(steps, gaps, colour[1], color=colour[0])
            if max(map(abs, gaps)) > 5:
                scale = "symlog"
    left.set(xlabel="step", ylabel="validation loss", yscale="log")
    right.set(xlabel="step", ylabel="validation loss above BF16, %", yscale=scale)
    right.axhline(0, color="black", linewidth=0.5)
    left.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def write_rates(records: list[Fields], path: str) -> None:
    """The share of blocks that fell back against the step, the seeds' mean: a line a layer, a panel
    for each layer of a block, from the first block (dark) to the last. Shaded: the band of the
    default threshold.
    """
    good = [r for r in records if r["fallback"]]
    names, low, high = good[0]["fallback_layers"], DEFAULT.low, DEFAULT.high
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    figure = Figure(figsize=(3.6 * len(kinds), 3.4), layout="constrained")
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    steps = [row[0] for row in good[0]["fallback"]]
    for kind, axes in zip(kinds, panels, strict=True):
        mine = [i for i, name in enumerate(names) if name.rpartition(".")[2] == kind]
        axes.axhspan(100 * low, 100 * high, color="0.92")
        for depth, i in enumerate(mine):
            rates = [statistics.fmean(r["fallback"][j][1 + i] for r in good)
                     for j in range(min(len(r["fallback"]) for r in good))]  # fmt: skip
            shade = colormaps["viridis"](depth / max(1, len(mine) - 1))
            axes.plot(steps[: len(rates)], [100 * rate for rate in rates], color=shade, lw=1)
        axes.set(title=kind, xlabel="step")
    panels[0].set(ylabel="blocks that fell back, %", ylim=(0, 100))
    figure.savefig(path, dpi=110)
