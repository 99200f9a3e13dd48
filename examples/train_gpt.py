"""Train a byte-level GPT on Python source that is on this machine, once for each recipe.

    python examples/train_gpt.py --recipe bf16 mxfp4_baseline tetrajet --device cuda
    python examples/train_gpt.py --recipe bf16 tetrajet --compile \\
        --depth 24 --dim 1024 --heads 16 --context 1024 --lr 3e-4  # 303 million parameters, a GPU
    python examples/train_gpt.py --recipe bf16 tetrajet nvfp4 --seed 0 1 2 --steps 2000
    python examples/train_gpt.py --text packages --megabytes 300 --compile --dim 512 --depth 8
    python examples/train_gpt.py --arch llama --outliers channel \\
        --recipe bf16 int8_block int8_fallback
    python examples/train_gpt.py --resume runs/gpt/checkpoint.pt

The text is that of the Python that runs this script, so nothing is downloaded: its standard library
or all installed packages, some files of which are held out for validation (text.py). The metric is
bits per byte: how well the model would compress them. A recipe quantizes the four linear layers of
each block; embeddings and head stay in BF16. On two CPU cores a run of the default size takes
several minutes.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from typing import ClassVar

import torch
from harness import BadInput, main, to_device
from llama import OUTLIERS, Llama
from text import read_text
from torch import Tensor, nn
from train_vit import Block, init_weights


class GPT(nn.Module):
    def __init__(self, dim: int, depth: int, heads: int, context: int) -> None:
        super().__init__()
        self.tok_embed = nn.Embedding(256, dim)
        self.pos_embed = nn.Embedding(context, dim)
        self.blocks = nn.ModuleList(Block(dim, heads, causal=True) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 256)
        self.apply(init_weights)

    def forward(self, text: Tensor) -> Tensor:
        """Bytes [N, T] -> logits of each next byte [N, T, 256]."""
        x = self.tok_embed(text) + self.pos_embed.weight[: text.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class PythonSource:
    name = "train_gpt"
    metric = "bits per byte"
    unit = "tokens"
    options: ClassVar = {
        "steps": (1000, "optimizer steps of a run"),
        "batch": (16, "windows of a step"),
        "lr": (2e-3, "peak learning rate"),
        "dim": (128, "width of the model"),
        "depth": (4, "blocks"),
        "heads": (4, "attention heads"),
        "context": (128, "bytes that the model sees at once"),
        "text": ("library", "library: the standard library; packages: all installed ones"),
        "arch": ("gpt", "gpt, or llama: RMSNorm, rotary positions, a gated MLP"),
        "outliers": ("none", "with llama, in the activations: none, channel or isolated"),
        "megabytes": (8.0, "text to read at most"),
        "cache": ("", "file that keeps the text between runs"),
        "windows": (256, "windows of held-out text, evenly spread, that a validation reads"),
        "threads": (torch.get_num_threads(), "CPU threads"),
    }

    def load(self, args: argparse.Namespace) -> list[Tensor]:
        texts = read_text(args.text, int(1e6 * args.megabytes), args.cache)
        if min(map(len, texts)) <= 10 * args.context:
            raise BadInput(
                f"--megabytes must leave text for both parts, got {len(texts[0])} and "
                f"{len(texts[1])} bytes. Use more, or a Python that has its library's source."
            )
        train_text, held_out = (torch.frombuffer(t, dtype=torch.uint8) for t in texts)
        # A window is a context and its next byte.
        offsets = torch.arange(args.context + 1)
        starts = torch.linspace(0, len(held_out) - len(offsets), args.windows).long()
        self.held_out = held_out[starts[:, None] + offsets].to(args.device)
        self.train_text, self.offsets = train_text.to(args.device), offsets.to(args.device)
        return [self.train_text, self.held_out]

    def tokens(self, args: argparse.Namespace) -> int:
        return args.context

    def units(self, args: argparse.Namespace) -> int:
        return args.context

    def build_model(self, args: argparse.Namespace) -> nn.Module:
        if args.dim % args.heads:
            raise BadInput(f"--dim must be a multiple of --heads ({args.heads}), got {args.dim}.")
        if args.arch not in ("gpt", "llama"):
            raise BadInput(f"--arch must be gpt or llama, got {args.arch}. See --help.")
        if args.outliers not in OUTLIERS[: 1 if args.arch == "gpt" else None]:
            known = f"none, or with --arch llama {' or '.join(OUTLIERS[1:])}"
            raise BadInput(f"--outliers must be {known}, got {args.outliers}. See --help.")
        sizes = args.dim, args.depth, args.heads, args.context
        if args.arch == "gpt":
            return GPT(*sizes)
        if args.dim // args.heads % 2:
            raise BadInput(f"--dim must be an even multiple of --heads, got {args.dim}.")
        return Llama(*sizes, args.outliers)

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        last = len(self.train_text) - len(self.offsets)
        starts = torch.randint(last + 1, (size, 1), generator=generator)
        window = self.train_text[to_device(starts, self.offsets.device) + self.offsets].long()
        return window[:, :-1], window[:, 1:]

    def validation(self) -> Iterator[tuple[Tensor, Tensor]]:
        for window in self.held_out.long().split(64):
            yield window[:, :-1], window[:, 1:]

    def score(self, loss: float, accuracy: float) -> float:
        return loss / math.log(2)


if __name__ == "__main__":
    sys.exit(main(PythonSource()))
