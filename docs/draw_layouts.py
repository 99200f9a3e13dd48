"""Draws docs/layouts-*.png from what the built library does: `python docs/draw_layouts.py`."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

import mxtrain

HERE = Path(__file__).parent


def draw_swizzle() -> None:
    """The rows and columns whose scales stand at each byte of one tile."""
    scale = torch.arange(128, dtype=torch.uint8)[:, None].expand(128, 4).contiguous()
    rows = mxtrain.swizzle_scale(scale).reshape(32, 16)
    cols = mxtrain.swizzle_scale(torch.arange(4, dtype=torch.uint8).expand(128, 4).contiguous())
    cols = cols.reshape(32, 16)
    figure, axes = plt.subplots(figsize=(10, 9))
    axes.imshow(rows // 32, cmap="Pastel1", aspect="auto", vmin=0, vmax=8)
    for i in range(32):
        for j in range(16):
            axes.text(j, i, f"{rows[i, j]},{cols[i, j]}", ha="center", va="center", fontsize=7)
    axes.set_xlabel("byte within 16")
    axes.set_ylabel("16 bytes each")
    axes.set_title("one tile of 128 x 4 scales: row, column of the scale at each byte")
    figure.tight_layout()
    figure.savefig(HERE / "layouts-swizzle.png", dpi=90)


def draw_packed() -> None:
    """Which code's bits each bit of a row holds, found by setting one element at a time."""
    formats = {"mxfp4": 8, "mxfp6_e2m3": 8, "mxfp8_e4m3": 4}
    figure, all_axes = plt.subplots(len(formats), 1, figsize=(12, 4.2))
    for axes, (name, count) in zip(all_axes, formats.items(), strict=True):
        fmt = mxtrain.FORMATS[name]
        owner = torch.full((count * fmt.bits,), -1)
        for k in range(count):
            x = torch.zeros(1, fmt.block)
            x[0, fmt.block - 1] = fmt.max  # keeps the scale at 1
            bits = set()
            for value in (-fmt.max, fmt.max):
                x[0, k] = value
                row = mxtrain.quantize(x, name).data[0]
                bits |= {b for b in range(count * fmt.bits) if row[b // 8] >> (b % 8) & 1}
            x[0, k] = 0
            empty = mxtrain.quantize(x, name).data[0]
            bits -= {b for b in range(count * fmt.bits) if empty[b // 8] >> (b % 8) & 1}
            for b in bits:
                owner[b] = k
        for k in range(count):
            start = k * fmt.bits
            axes.broken_barh([(start, fmt.bits)], (0, 1), facecolors=f"C{k % 10}", alpha=0.4)
            assert set(owner[start : start + fmt.bits].tolist()) <= {k, -1}
            axes.text(start + fmt.bits / 2, 0.5, f"k = {k}", ha="center", va="center", fontsize=8)
        for byte in range(count * fmt.bits // 8 + 1):
            axes.axvline(byte * 8, color="black", linewidth=1.5)
        axes.set_xlim(0, count * fmt.bits)
        axes.set_yticks([])
        axes.set_title(f"{name}: bits of a row; black lines are bytes", fontsize=9, loc="left")
    figure.tight_layout()
    figure.savefig(HERE / "layouts-packed.png", dpi=90)


if __name__ == "__main__":
    draw_swizzle()
    draw_packed()
