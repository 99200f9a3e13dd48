"""Draws docs/vit-curves.png from docs/vit.csv, the log of the run in docs/results.md."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

HERE = Path(__file__).parent
HEADLINE = ("bf16", "mxfp4_baseline", "tetrajet")


def main() -> None:
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
