"""Draws the figures of docs/results.md that are of runs on a CPU.

vit-curves.png from vit.csv, the log of that run; q-ema.png from q-ema.json, the results of
`study.py run --plan small_ema`.
"""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

HERE = Path(__file__).parent
# Rows of q-ema.json by what bounds the memory of the average: none, ema_at_half, a share of the run
# (as it was tried first), the paper's.
BOUNDS = {
    "tetrajet": "none",
    "ema_at_half_0.01": "0.01",
    "tetrajet_ema": "0.03\ndefault",
    "ema_at_half_0.1": "0.1",
    "ema_at_half_0.3": "0.3",
    "ema_share_0.0005": "5e-4\nshare",
    "ema_share_0.001": "1e-3\nshare",
    "ema_share_0.004": "4e-3\nshare",
    "ema_0.998": "paper",
}
GROUPS = (range(5), range(5, 8), range(8, 9))  # joined by lines
HEADLINE = ("bf16", "mxfp4_baseline", "tetrajet")


def main() -> None:
    draw_vit()
    draw_q_ema()


def _steps(task: str) -> tuple[int, str]:
    return int(task.split("_")[1]), task


def draw_q_ema() -> None:
    """Loss above tetrajet's from the same seed, and oscillating weights, against the bound:
    for each kind of run a line of means, and a point for each seed.
    """
    with open(HERE / "q-ema.json") as file:
        records = {record["run"]: record for record in json.load(file)["records"]}
    figure = Figure(figsize=(13, 4), layout="constrained")
    loss, middle, end = figure.subplots(1, 3)
    names = list(BOUNDS)
    for colour, task in enumerate(sorted({run.split("/")[0] for run in records}, key=_steps)):
        points: dict = defaultdict(list)
        for run, record in records.items():
            row, _, seed = run.removeprefix(f"{task}/").partition("@")
            base = records.get(f"{task}/tetrajet@{seed}")
            if run.startswith(f"{task}/") and row in names and base is not None:
                gap = 100 * (record["rows"][-1][2] / base["rows"][-1][2] - 1)
                watched = record["oscillation"]
                shares = [100 * watched[when]["oscillating"] for when in ("middle", "end")]
                points[names.index(row)].append((gap, *shares))
        label = task.removeprefix("small_").replace("_lr_", " steps, learning rate ")
        label += "" if "rate" in label else " steps"
        for k, axes in enumerate((loss, middle, end)):
            for group in GROUPS:
                at = [i for i in group if i in points]
                mean = [np.mean([p[k] for p in points[i]]) for i in at]
                axes.plot(at, mean, f"C{colour}-", label=label if group is GROUPS[0] else None)
            for i in points:
                axes.plot([i] * len(points[i]), [p[k] for p in points[i]], f"C{colour}.", ms=5)
    loss.axhline(0, color="black", linewidth=0.5)
    loss.set(ylabel="validation loss above tetrajet's, %")
    loss.set_yscale("symlog", linthresh=0.5)
    loss.set_yticks((-0.5, -0.25, 0, 0.25, 0.5, 1, 2, 5))
    loss.yaxis.set_major_formatter("{x:g}")
    middle.set(ylabel="weights with R > 16 in the middle, %")
    end.set(ylabel="weights with R > 16 at the end, %")
    for axes in (loss, middle, end):
        axes.set_xticks(range(len(names)), BOUNDS.values(), fontsize=8)
        axes.grid(alpha=0.3)
    loss.legend(fontsize=8)
    figure.supxlabel(
        "memory at half of the peak learning rate: steps, or a share of the run", size=10
    )
    figure.savefig(HERE / "q-ema.png", dpi=90)


def draw_vit() -> None:
    """Mean over seeds of validation loss and accuracy, a line for each recipe."""
    values: dict = defaultdict(lambda: defaultdict(list))
    with open(HERE / "vit.csv", newline="") as file:
        for row in csv.DictReader(file):
            pair = float(row["val_loss"]), float(row["accuracy_percent"])
            values[row["recipe"]][int(row["step"])].append(pair)
    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    for recipe, by_step in values.items():
        mean = np.array([np.mean(by_step[step], axis=0) for step in sorted(by_step)])
        style = {"linewidth": 2.2} if recipe in HEADLINE else {"linewidth": 1.0, "alpha": 0.6}
        for k in (0, 1):
            axes[k].plot(sorted(by_step), mean[:, k], label=recipe, **style)
    axes[0].set(xlabel="step", ylabel="validation loss, mean of 3 seeds", yscale="log")
    axes[1].set(xlabel="step", ylabel="accuracy %, mean of 3 seeds", ylim=(80, 100))
    for a in axes:
        a.grid(alpha=0.3)
    axes[1].legend(fontsize=8)
    figure.savefig(HERE / "vit-curves.png", dpi=90)


if __name__ == "__main__":
    main()
