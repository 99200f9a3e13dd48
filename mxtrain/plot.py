"""`python -m mxtrain.plot run.csv`: draws what `mxtrain.monitor` wrote, and names the layers.

Writes run.png: curves over the steps of the columns asked for, with the worst layers in colour and
the others in grey, and the histogram of the oscillation ratio in the last row of each layer. Prints
for each column the layers that are worst in it at the end, so that a user sees which layer hurts:
NaN is worse than any number. Of the columns `*nonfinite` it takes by itself those that are not 0.
Needs matplotlib (`pip install mxtrain[plot]`).
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from pathlib import Path
from typing import Any

from .checks import refusal
from .monitor import COLUMNS
from .oscillation import RATIO_EDGES

DEFAULT = (
    "oscillating", "ratio", "flips", "w_change", "q_change", "fprop_x.snr", "fprop_w.snr",
    "fprop_w.confidence", "dgrad_dy.underflow", "dgrad_dy.clip", "wgrad_dy.underflow", "y_change",
    "fallback_rate", "fallback_threshold",
)  # fmt: skip
_NUMBERS = [c for c in COLUMNS if c not in ("step", "layer", "recipe")]
_NONFINITE = [c for c in _NUMBERS if c.endswith("nonfinite")]

Rows = dict[str, list[dict[str, Any]]]


class _BadFile(ValueError):
    """Input that cannot be drawn."""


def read(path: Path) -> Rows:
    """The rows of each layer, in order; a number is a float, an empty cell None."""
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError) as error:
        rows, reason = [], str(error)
    else:
        reason = "no rows of a monitor in it"
    layers: Rows = {}
    try:
        for row in rows:
            numbers = {c: float(row[c]) if row[c] != "" else None for c in _NUMBERS}
            numbers["step"] = int(row["step"])
            layers.setdefault(row["layer"], []).append({**numbers, "recipe": row["recipe"]})
    except (KeyError, TypeError, ValueError) as error:
        layers, reason = {}, f"it is not as mxtrain.monitor writes it: {error!r}"
    if not layers:
        condition, advice = "be what mxtrain.monitor wrote", "Pass the CSV of a monitor."
        message = refusal("plot", "csv", condition, str(path), " ".join(reason.split()), advice)
        raise _BadFile(message)
    return layers


def badness(column: str, value: float) -> float:
    """By which layers are ordered: an SNR and a confidence are bad where small, NaN is worst."""
    small = column.endswith((".snr", ".confidence"))
    return math.inf if math.isnan(value) else -value if small else value


def worst(layers: Rows, column: str, top: int) -> list[tuple[str, float]]:
    """(layer, its last value), the worst first."""
    last = {}
    for name, rows in layers.items():
        values = [row[column] for row in rows if row[column] is not None]
        if values:
            last[name] = values[-1]
    ordered = sorted(last.items(), key=lambda item: badness(column, item[1]), reverse=True)
    return ordered[:top]


def report(layers: Rows, columns: list[str], top: int) -> str:
    """One line a column: its worst layers, and their values in the last row."""
    width = max(map(len, columns))
    lines = []
    for column in columns:
        named = ", ".join(f"{name} {value:.4g}" for name, value in worst(layers, column, top))
        if named:
            lines.append(f"{column:<{width}}  {named}")
    return "\n".join(lines) or "nothing was quantized"


def draw(layers: Rows, columns: list[str], top: int, path: Path) -> None:
    """The picture. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = [c for c in columns if worst(layers, c, 1)]
    panels = len(columns) + 1
    across = min(3, panels)
    down = -(-panels // across)
    figure, axes = plt.subplots(down, across, figsize=(5 * across, 3.2 * down), squeeze=False)
    flat = list(axes.flat)
    for axis, column in zip(flat, columns, strict=False):
        bad = [name for name, _ in worst(layers, column, top)]
        for name in [*(n for n in layers if n not in bad), *reversed(bad)]:
            steps = [row["step"] for row in layers[name]]
            values = [math.nan if row[column] is None else row[column] for row in layers[name]]
            if name in bad:
                axis.plot(steps, values, linewidth=1.4, label=name)
            else:
                axis.plot(steps, values, linewidth=0.6, color="0.75", zorder=0)
        axis.set_title(column)
        axis.set_xlabel("step")
        axis.legend(fontsize=6)
    _histogram(flat[len(columns)], layers, top)
    for axis in flat[panels:]:
        axis.set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _histogram(axis: Any, layers: Rows, top: int) -> None:
    """Shares of the weights by oscillation ratio, of the layers that oscillate most."""
    names = [f"ratio<{edge:g}" for edge in (*RATIO_EDGES, math.inf)]
    shown = worst(layers, "oscillating", top)
    for i, (name, _) in enumerate(shown):
        row = next(r for r in reversed(layers[name]) if r["oscillating"] is not None)
        width = 0.8 / len(shown)
        places = [k + i * width for k in range(len(names))]
        axis.bar(places, [row[n] for n in names], width, label=name)
    axis.set_title("oscillation ratio R, last row")
    axis.set_ylabel("share of weights")
    axis.set_yscale("log")
    axis.set_xticks(range(len(names)), [n.removeprefix("ratio") for n in names], fontsize=6)
    if shown:
        axis.legend(fontsize=6)


def _check(ok: bool, option: str, condition: str, got: object) -> None:
    if not ok:
        message = refusal("plot", option, condition, got, "an option", "See --help.")
        raise _BadFile(message)


def main(argv: list[str] | None = None) -> int:
    """The program: 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m mxtrain.plot", description=__doc__)
    parser.add_argument("csv", type=Path, help="what mxtrain.monitor wrote")
    parser.add_argument("--out", type=Path, help="the picture (without: beside the CSV, as .png)")
    parser.add_argument("--columns", nargs="+", metavar="NAME", default=None)
    parser.add_argument("--top", type=int, default=4, help="layers named a column")
    options = parser.parse_args(argv)
    columns = options.columns
    unknown = [c for c in columns or () if c not in _NUMBERS]
    try:
        _check(not unknown, "--columns", f"be among {', '.join(_NUMBERS)}", unknown)
        _check(options.top >= 1, "--top", "be at least 1", options.top)
        layers = read(options.csv)
    except _BadFile as error:
        print(error, file=sys.stderr)
        return 2
    if columns is None:
        bad = [c for c in _NONFINITE if any(value != 0 for _, value in worst(layers, c, 1))]
        columns = [*bad, *DEFAULT]
    print(report(layers, columns, options.top))
    out = options.out or options.csv.with_suffix(".png")
    try:
        draw(layers, columns, options.top, out)
    except (ImportError, OSError) as error:
        print(f"mxtrain::plot: no picture: {error}", file=sys.stderr)
        return 2
    print(f"drawn: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
