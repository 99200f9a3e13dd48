"""The results of the study: their file, the table and the figures."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Sequence
from typing import Any

from harness import mean_and_spread
from matplotlib import colormaps
from matplotlib.figure import Figure
from study_rows import ROWS

from mxtrain.fallback_rule import DEFAULT

Fields = dict[str, Any]
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
    """Validation loss above that of BF16 from the same seed, in percent, in a row of the curve."""
    other = baseline.get(record["seed"])
    if other is None or other is record or not finished(record) or not finished(other):
        return None
    return 100 * (record["rows"][row][2] / other["rows"][row][2] - 1)


def finished(record: Fields) -> bool:
    return record["diverged"] is None and bool(record["rows"])


def speeds(records: list[Fields], bf16: list[Fields]) -> tuple[float | None, float | None]:
    """Units a second of the row and of BF16 in the last seed in which both had a GPU to themselves;
    without one, those of the row's last seed that had. No mean: it would mix kernels, since seeds
    are trained one after the other.
    """
    mine, base = (
        {r["seed"]: r["units_per_second"] for r in them if r["alone"] and r["units_per_second"] > 0}
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


def run_to_run(
    records: list[Fields], repeats: Sequence[list[Fields]], task: str
) -> tuple[float | None, int]:  # fmt: skip
    """The standard deviation of a gap, in points, from one run of a seed to the next, pooled over
    the runs of the task that were made more than once; None without one. And how many those are.

    The deviation over seeds has this in it already, so a gap is known to the larger of the two, not
    to both together: that of three seeds is often too small by chance. repeats: results files, each
    with a BF16 of its own. Runs that ended alike are one.
    """
    gaps: dict[str, list[float | None]] = {}
    for some in (records, *repeats):
        for record in some:
            if row_of(record).split("/")[0] == task and "%" not in record["metric"]:
                gaps.setdefault(record["run"], []).append(gap_of(record, some))
    groups = [list(dict.fromkeys(g for g in found if g is not None)) for found in gaps.values()]
    again = [found for found in groups if len(found) > 1]
    if not again:
        return None, 0
    squares = sum(statistics.variance(found) * (len(found) - 1) for found in again)
    return math.sqrt(squares / sum(len(found) - 1 for found in again)), len(again)


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
            if r["seed"] in baseline and baseline[r["seed"]] is not r
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
    rows: dict[str, list[Fields]], bf16: list[Fields], least: float | None = None
) -> str:  # fmt: skip
    """A markdown table; columns in which no row has anything are left out. least: of a gap's
    spread."""
    first = next(iter(rows.values()))[0]
    headings = list(HEADINGS)
    headings[3], headings[5] = first["metric"], f"{first['unit']}/s"
    lines = [line(name, records, bf16, least) for name, records in rows.items()]
    kept = [i for i in range(len(headings)) if any(text[i] != "-" for text in lines)]
    shown = [headings, ["---"] * len(headings), *lines]
    return "\n".join("| " + " | ".join(row[i] for i in kept) + " |" for row in shown)


def heading(task: str, group: str, rows: dict[str, list[Fields]]) -> str:
    record = next(iter(rows.values()))[0]
    size, units = record["parameters"] / 1e6, record["units"] / 1e6
    what = f"{size:.1f} million parameters, {record['steps']} steps, {units:.1f} million"
    where = f"{record['device']}, torch {record['torch']}"
    return f"## {task}, {group}\n\n{what} {record['unit']}; {where}"


def note(least: float | None, count: int) -> str:
    """What the spread of a gap is."""
    if least is None:
        return ""
    runs = "one run that was" if count == 1 else f"{count} runs that were"
    return (
        "\n\nThe spread of a gap is that of one run: its standard deviation over the seeds, or "
        f"over repetitions of a seed where that is larger, {least:.2f} points, pooled over {runs} "
        "made again."
    )


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
        again = run_to_run(records, repeats, task)
        parts.append(f"{heading(task, group, rows)}\n\n{table(rows, bf16, again[0])}{note(*again)}")
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
    Same weights: whether both ended in the same bits, as runs with --deterministic do.
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
        least = run_to_run(others, repeats, row_of(mine).split("/")[0])[0]
        told = ([gaps[0]], None), ([gaps[1]], None), (seeds, least)
        gaps = [spread(gap, "+.2f", floor) + " %" * any(g is not None for g in gap)
                for gap, floor in told]  # fmt: skip
        same = (same_field(mine, other, name) for name in ("data", "weights"))
        rows.append((mine["run"], *losses, *gaps, *same))
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
