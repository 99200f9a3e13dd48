"""Pictures of a measurement: rooflines, and bars of the ratios that count. Needs matplotlib, and no
display.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Row = dict[str, Any]

OURS, PEER, ROOF = "#1f6f8b", "#a8a8a8", "#c0392b"
MARKERS = "osD^vP*Xh<>"
CEILINGS = ("peer/copy/", "peer/copy_kernel/", "peer/empty_kernel/")


def is_peer(row: Row) -> bool:
    """Whether a row is something to compare with."""
    return row["name"].startswith("peer/")


def families(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows by what is drawn with one marker: the first part of the name, two parts for peers."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        parts = row["name"].split("/")
        found.setdefault("/".join(parts[: 2 if is_peer(row) else 1]), []).append(row)
    return found


def scatter(axes: Axes, rows: list[Row], x: Any, y: Any) -> None:
    """One marker a family; peers are grey."""
    for index, (label, members) in enumerate(families(rows).items()):
        axes.scatter(
            [x(row) for row in members],
            [y(row) for row in members],
            s=42,
            marker=MARKERS[index % len(MARKERS)],
            color=PEER if is_peer(members[0]) else None,
            edgecolors="white",
            linewidths=0.6,
            label=label,
            zorder=3,
        )


def finish(axes: Axes, title: str, x: str, y: str) -> None:
    """Titles, grid and legend."""
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(True, which="both", color="#e6e6e6", linewidth=0.6, zorder=0)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)


def bandwidth_roofline(axes: Axes, rows: list[Row], peaks: dict[str, Any], empty_us: float) -> None:
    """Bytes of a call against the rate at which they moved. The roof is a launch, then the copy
    rate.
    """
    scatter(axes, rows, lambda row: row["bytes"] / 1e6, lambda row: row["gbps"])
    copy = peaks.get("copy_gbps")
    if copy:
        low = min(row["bytes"] for row in rows) / 2
        high = max(row["bytes"] for row in rows) * 2
        sizes = [low * (high / low) ** (i / 100) for i in range(101)]
        roof = [size / (empty_us + size / copy / 1e3) / 1e3 for size in sizes]
        label = f"copy, {copy:.4g} GB/s" + (f" after {empty_us:.1f} us" if empty_us else "")
        axes.plot([size / 1e6 for size in sizes], roof, color=ROOF, linewidth=1.5, label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    finish(axes, "Memory-bound rows", "MB read and written by one call", "GB/s")


def compute_roofline(axes: Axes, rows: list[Row], peaks: dict[str, Any]) -> None:
    """Operations for each byte against TFLOP/s, under the measured bandwidth and GEMM rates."""
    scatter(axes, rows, lambda row: row["flops"] / row["bytes"], lambda row: row["tflops"])
    copy = peaks.get("copy_gbps")
    intensities = [row["flops"] / row["bytes"] for row in rows]
    low, high = min(intensities) / 32, max(intensities) * 2
    for key, label, style in (("bf16_tflops", "BF16", "--"), ("fp8_tflops", "FP8", "-")):
        if peaks.get(key):
            xs = [low * (high / low) ** (i / 200) for i in range(201)]
            slope = [x * copy / 1e3 if copy else peaks[key] for x in xs]
            roof = [min(peaks[key], value) for value in slope]
            text = f"{label} GEMM, {peaks[key]:.0f} TFLOP/s"
            axes.plot(xs, roof, style, color=ROOF, linewidth=1.5, label=text)
    axes.set_xscale("log")
    axes.set_yscale("log")
    finish(axes, "Compute-bound rows", "operations for each byte", "TFLOP/s")


def roofline(data: dict[str, Any]) -> Figure | None:
    """Where each row lies under the ceilings of the same run; None where no row counts bytes."""
    rows = data["results"]
    memory = [row for row in rows if row.get("gbps") and row.get("bytes")]
    compute = [row for row in rows if row.get("tflops") and row.get("bytes")]
    panels = [panel for panel in (memory, compute) if panel]
    if not panels:
        return None
    empty = next((r["us"]["p50"] for r in rows if r["name"].startswith("peer/empty_kernel/")), 0.0)
    figure = Figure(figsize=(8.5 * len(panels), 5.2), layout="constrained")
    for index, panel in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), index + 1)
        if panel is memory:
            bandwidth_roofline(axes, panel, data["peaks"], empty)
        else:
            compute_roofline(axes, panel, data["peaks"])
    figure.suptitle(data["env"].get("device", ""), fontsize=11)
    return figure


BARS = (
    ("of_copy", "fraction of the copy bandwidth", "{:.2f}"),
    ("vs_bf16", "speed-up over BF16", "{:.2f}x"),
    ("vs_peer", "speed-up over the peer", "{:.1f}x"),
)


def duration(row: Row) -> str:
    """The median in the unit that suits it."""
    us = row["us"]["p50"]
    return f"{us:.4g} us" if us < 1000 else f"{us / 1000:.4g} ms"


def bars(data: dict[str, Any]) -> Figure | None:
    """A panel for each ratio that some row has, with its ceiling or break-even at 1; None without
    any.
    """
    panels = []
    for key, label, text in BARS:
        rows = [
            row for row in data["results"] if row.get(key) and not row["name"].startswith(CEILINGS)
        ]
        if rows:
            panels.append((key, label, text, rows))
    if not panels:
        return None
    heights = [len(panel[-1]) + 2 for panel in panels]  # 2 for the axis below
    figure = Figure(figsize=(9.5, 0.26 * sum(heights) + 0.6), layout="constrained")
    grid = figure.add_gridspec(len(panels), 1, height_ratios=heights)
    for index, (key, label, text, rows) in enumerate(panels):
        axes = figure.add_subplot(grid[index])
        values = [row[key] for row in rows]
        colors = [PEER if is_peer(row) else OURS for row in rows]
        drawn = axes.barh([row["name"] for row in rows], values, color=colors, zorder=3)
        labels = [
            f"{text.format(row[key])}  {duration(row)}" + (" noisy" if row["noisy"] else "")
            for row in rows
        ]
        axes.bar_label(drawn, labels, padding=3, fontsize=7)
        axes.axvline(1.0, color=ROOF, linewidth=1, zorder=2)
        axes.set_xlim(0, max(1.0, *values) * 1.25)
        axes.set_ylim(len(rows) - 0.4, -0.6)  # the first row on top
        axes.tick_params(axis="y", labelsize=7)
        axes.set_xlabel(label)
        axes.grid(True, axis="x", color="#e6e6e6", linewidth=0.6, zorder=0)
    figure.suptitle(data["env"].get("device", ""), fontsize=11)
    return figure


def draw(data: dict[str, Any], folder: Path, stem: str) -> list[Path]:
    """Write STEM-roofline.png and STEM-bars.png where the rows give something to draw; returns the
    paths.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in (("roofline", roofline(data)), ("bars", bars(data))):
        if figure is not None:
            path = folder / f"{stem}-{name}.png"
            FigureCanvasAgg(figure).print_figure(path, dpi=150)
            paths.append(path)
    return paths
