"""The documentation's tables, made from the code and from the committed measurement.

`python -m mxtrain.tables` rewrites them, `--check` only compares.

A table stands between `<!-- table: NAME -->` and `<!-- end -->` in README.md and docs/*.md.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from . import mix, recipe
from .formats import FORMATS, GEMM_ROWS


def formats_table() -> str:
    """One row per block format."""
    rows = [
        "| format | element | largest | block | scale | bits an element |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for f in FORMATS.values():
        scale = "E4M3, and a float32 for the tensor" if f.two_level else "E8M0"
        rows.append(
            f"| `{f.name}` | E{f.ebits}M{f.mbits} | {f.max:g} | {f.block} | {scale} | "
            f"{f.bits_per_element:g} |"
        )
    return "\n".join(rows)


def architectures_table() -> str:
    """What gemm is on each architecture, from the table that the dispatch chooses by."""
    rows = [
        "| compute capability | GPUs | build for | `mxfp4` | `nvfp4` | `mxfp8_*` | `mxfp6_*` | |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in GEMM_ROWS:
        cells = [
            f"{row['kind']} (`{row['backend']}`)" if name in row["formats"] else "dequantized"
            for name in ("mxfp4", "nvfp4", "mxfp8_e4m3", "mxfp6_e3m2")
        ]
        head = [row["capability"], row["gpus"], f"`{row['arch']}`"]
        rows.append(f"| {' | '.join([*head, *cells, row['proof']])} |")
    other = "| other 8.x | A100, A10, RTX 30 | `80` |" + 4 * " dequantized |" + " |"
    return "\n".join([*rows, other])


MEASURED = Path(__file__).parent.parent / "bench" / "results"
BIG = "16384x8192"
OF_COPY = {
    "quantize mxfp4, nearest": f"quantize/mxfp4/nearest/{BIG}",
    "quantize mxfp4, nearest, transposed": f"quantize/mxfp4/nearest+transpose/{BIG}",
    "quantize mxfp4, stochastic": f"quantize/mxfp4/stochastic/{BIG}",
    "quantize mxfp4, stochastic with Hadamard 64": f"quantize/mxfp4/stochastic+h64/{BIG}",
    "quantize_dual mxfp4, stochastic, neither rotated": f"quantize_dual/mxfp4/stochastic/{BIG}",
    "quantize_dual mxfp4, stochastic, Hadamard 64 on one": (
        f"quantize_dual/mxfp4/stochastic+h64/{BIG}"
    ),
    "requantize mxfp4, stochastic": f"requantize/mxfp4/stochastic/{BIG}",
    "dequantize mxfp4 to BF16": f"dequantize/mxfp4/bf16/{BIG}",
    "hadamard 64, BF16": f"hadamard/64/{BIG}",
    "for comparison: torch.compile'd torchao `to_mx`, nearest": (
        f"peer/torchao_to_mx_compiled/{BIG}"
    ),
}
VS_BF16 = {
    "gemm mxfp4 8192x8192x8192": "gemm/mxfp4/8192x8192x8192",
    "for comparison: cuBLASLt FP8 with row scales, its operands already in FP8": (
        "peer/cublas_fp8_rowwise/8192x8192x8192"
    ),
    "gemm mxfp4 4096x4096x4096": "gemm/mxfp4/4096x4096x4096",
    "gemm mxfp4 16384x4096x4096": "gemm/mxfp4/16384x4096x4096",
    "gemm mxfp4 8192x14336x4096": "gemm/mxfp4/8192x14336x4096",
    "linear tetrajet, 8192 tokens, 4096 to 4096": "linear/tetrajet/8192x4096x4096/fwd+bwd",
    "linear tetrajet, 8192 tokens, 8192 to 8192": "linear/tetrajet/8192x8192x8192/fwd+bwd",
    "linear tetrajet, 16384 tokens, 4096 to 14336": "linear/tetrajet/16384x4096x14336/fwd+bwd",
    "linear tetrajet, ViT-B's 12608 tokens, 768 to 3072": "linear/tetrajet/12608x768x3072/fwd+bwd",
    "linear mxfp4_baseline, 8192 tokens, 4096 to 4096": (
        "linear/mxfp4_baseline/8192x4096x4096/fwd+bwd"
    ),
    "linear mxfp4_backward, the same": "linear/mxfp4_backward/8192x4096x4096/fwd+bwd",
    "linear mxfp8, the same; it multiplies in BF16": "linear/mxfp8/8192x4096x4096/fwd+bwd",
    "linear nvfp4, the same; it multiplies in BF16": "linear/nvfp4/8192x4096x4096/fwd+bwd",
    "int8_gemm 8192x8192x8192, nothing fallen back": "int8_gemm/r0.0/8192x8192x8192",
    "linear int8_block, 8192 tokens, 4096 to 4096": "linear/int8_block/8192x4096x4096/fwd+bwd",
    "linear int8_fallback, the same": "linear/int8_fallback/8192x4096x4096/fwd+bwd",
    "a training step of a GPT of 355 million parameters, tetrajet, as a CUDA graph": (
        "train/gpt/tetrajet/24x1024/16x1024/graph"
    ),
}

SQUARE = "8192x8192"
OPTIMIZERS = {
    "AdamW": f"optim/adamw/{SQUARE}",
    "AdamW with the average": f"optim/adamw+ema/{SQUARE}",
    "AdamW with the average, BF16 weights": f"optim/adamw+ema+bf16/{SQUARE}",
    "AdamW with the average and the sums of changes": f"optim/adamw+ema+changes/{SQUARE}",
    "QRamping": f"optim/qramping/{SQUARE}",
    "for comparison: torch's AdamW, fused": f"peer/torch_adamw/{SQUARE}",
    "for comparison: torch's AdamW, fused, then a foreach lerp of the average": (
        f"peer/torch_adamw+ema/{SQUARE}"
    ),
}


# The full suite, by GPU.
RUNS = {"H200": "nvidia-h200.json", "H100": "nvidia-h100.json"}


def measured_table(title: str, column: str, rows: dict[str, str]) -> str:
    """Rows of the committed measurements, by the names that the README gives them."""
    found = [
        {row["name"]: row for row in json.loads((MEASURED / run).read_text())["results"]}
        for run in RUNS.values()
    ]
    lines = [f"| {title} | {' | '.join(RUNS)} |", f"| --- |{' --- |' * len(RUNS)}"]
    for label, name in rows.items():
        cells = [f"{of_gpu[name][column]:.2f}" for of_gpu in found]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


TABLES = {
    "formats": formats_table,
    "architectures": architectures_table,
    "recipes": recipe.table,
    "mixes": mix.table,
    "of_copy": lambda: measured_table("of copy", "of_copy", OF_COPY),
    "optimizers": lambda: measured_table("of copy", "of_copy", OPTIMIZERS),
    "vs_bf16": lambda: measured_table("times BF16", "vs_bf16", VS_BF16),
}


def filled(text: str) -> str:
    """The text of a page with every marked table made anew. Raises KeyError for an unknown name."""

    def replace(match: re.Match) -> str:
        return f"<!-- table: {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", replace, text, flags=re.DOTALL)


def main(argv: list[str] | None = None) -> int:
    """Rewrite the pages, or with --check say which are out of date and return 1."""
    parser = argparse.ArgumentParser(prog="python -m mxtrain.tables", description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit 1 if out of date"
    )
    parser.add_argument("--root", type=Path, default=Path(), help="the repository")
    options = parser.parse_args(argv)
    stale = []
    for page in [options.root / "README.md", *sorted((options.root / "docs").glob("*.md"))]:
        text = page.read_text()
        if filled(text) == text:
            continue
        stale.append(str(page))
        if not options.check:
            page.write_text(filled(text))
    if stale:
        print("out of date:" if options.check else "rewritten:", *stale)
    return 1 if stale and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
