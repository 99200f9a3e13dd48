"""Train a vision transformer on handwritten digits, once for each recipe, and compare.

    python examples/train_vit.py --recipe bf16 mxfp4_baseline tetrajet
    python examples/train_vit.py --recipe bf16 tetrajet --seed 0 1 2 --device cuda
    python examples/train_vit.py --resume runs/vit/checkpoint.pt

The images are scikit-learn's copy of the UCI digits, 1797 of 8x8 pixels, which come with the
package. The model is a DeiT in small: patch embedding, class token, learned positions, pre-norm
blocks. A recipe quantizes the four linear layers of each block; the patch embedding and the head
stay in BF16, as in the published recipes. Whatever is cut into blocks (dim, 3 dim, 4 dim, and the
tokens of a batch, 5 an image) is a multiple of 32, so no block is padded.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import ClassVar

import numpy
import torch
import torch.nn.functional as F
from harness import BadInput, main
from sklearn.datasets import load_digits
from torch import Tensor, nn

SIZE, CLASSES = 8, 10
VALIDATION = 500  # images held out: one is 0.2 points of accuracy


class Block(nn.Module):
    """Pre-norm transformer block. A recipe quantizes its qkv, proj, fc1 and fc2."""

    def __init__(self, dim: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def attention(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.proj(y.transpose(1, 2).reshape(batch, tokens, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


def init_weights(module: nn.Module) -> None:
    """For `model.apply`. Layers this narrow learn faster from Xavier's than DeiT's std 0.02."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


class ViT(nn.Module):
    def __init__(self, dim: int, depth: int, heads: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        patches = (SIZE // patch) ** 2
        self.patch_embed = nn.Linear(patch * patch, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        # As large as the embedded patches. From DeiT's std 0.02, positions take long to count.
        self.pos_embed = nn.Parameter(0.5 * torch.randn(1, 1 + patches, dim))
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, CLASSES)
        self.apply(init_weights)

    def forward(self, images: Tensor) -> Tensor:
        """Images [N, 8, 8] -> logits [N, 10]."""
        patches = images.unfold(1, self.patch, self.patch).unfold(2, self.patch, self.patch)
        x = self.patch_embed(patches.flatten(3).flatten(1, 2))
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))


class Digits:
    name = "train_vit"
    metric = "accuracy %"
    unit = "images"
    options: ClassVar = {
        "steps": (500, "optimizer steps of a run"),
        "batch": (128, "images of a step"),
        "lr": (2e-3, "peak learning rate"),
        "dim": (64, "width of the model"),
        "depth": (3, "blocks"),
        "heads": (4, "attention heads"),
        "patch": (4, "pixels along the side of a patch"),
        "threads": (1, "CPU threads; more gain little on matrices this small"),
    }

    def load(self, args: argparse.Namespace) -> list[Tensor]:
        digits = load_digits()
        order = numpy.random.RandomState(0).permutation(len(digits.target))  # whatever the seed
        images = torch.tensor(digits.images[order] / 8 - 1, dtype=torch.float32)  # from 0..16
        labels = torch.tensor(digits.target[order], device=args.device)
        self.held_out = images[:VALIDATION].to(args.device), labels[:VALIDATION]
        # Of each training image all nine shifts by -1, 0 or 1 pixel along each axis: [N, 9, 8, 8].
        padded = F.pad(images[VALIDATION:], (1, 1, 1, 1), value=-1.0)
        shifts = padded.unfold(1, SIZE, 1).unfold(2, SIZE, 1).flatten(1, 2)
        self.images, self.labels = shifts.to(args.device), labels[VALIDATION:]
        return [self.images, self.labels, *self.held_out]

    def tokens(self, args: argparse.Namespace) -> int:
        return 1 + (SIZE // args.patch) ** 2

    def units(self, args: argparse.Namespace) -> int:
        return 1

    def build_model(self, args: argparse.Namespace) -> nn.Module:
        if args.dim % args.heads:
            raise BadInput(f"--dim must be a multiple of --heads ({args.heads}), got {args.dim}.")
        if SIZE % args.patch:
            raise BadInput(f"--patch must be 1, 2, 4 or 8, got {args.patch}. The images are 8x8.")
        return ViT(args.dim, args.depth, args.heads, args.patch)

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        image = torch.randint(len(self.labels), (size,), generator=generator)
        shift = torch.randint(9, (size,), generator=generator)
        image, shift = image.to(self.labels.device), shift.to(self.labels.device)
        return self.images[image, shift], self.labels[image]

    def validation(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield self.held_out

    def score(self, loss: float, accuracy: float) -> float:
        return 100 * accuracy


if __name__ == "__main__":
    sys.exit(main(Digits()))
