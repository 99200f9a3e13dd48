"""The rows of whole training steps, with their BF16 twins.

train/gpt/RECIPE/LAYERSxWIDTH/SEQUENCESxCONTEXT/step is one step of a GPT: forward, backward and the
optimizer, under torch.compile, launched kernel by kernel from Python; .../graph is the same step
replayed from one CUDA graph, which no processor can hold up. 24x1024 is a GPT-2 medium, 355 million
parameters. RECIPE quantizes the four linear layers of each block; embeddings, attention
products, head and loss stay in BF16, as the whole of train/gpt/bf16/... does. Master weights and
moments are float32.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mxtrain
from mxtrain.recipe import RECIPES

from .cases import Case, Unfit, family, parse_shape

VOCABULARY = 50304  # GPT-2's 50257, up to a multiple of 128
HEAD = 64  # width of an attention head
BACKEND = "inductor"  # of torch.compile


class Block(nn.Module):
    """Pre-norm transformer block on x [N, T, width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        qkv = self.qkv(self.norm1(x)).view(*shape[:2], 3, -1, HEAD).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*qkv.unbind(0), is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(shape))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x)), approximate="tanh"))


class GPT(nn.Module):
    """Next-token loss of tokens [N, T + 1]; the head shares the embedding's weight."""

    def __init__(self, layers: int, width: int, context: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Of the last block's x [N, T, width]."""
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def forward(self, text: Tensor) -> Tensor:
        x = self.tokens(text[:, :-1]) + self.positions.weight
        for block in self.blocks:
            x = block(x)
        return self.loss(x, text[:, 1:])


class Trainer:
    """A model, its optimizer and a batch; `step` trains once and returns the loss.

    capturable: whether a CUDA graph may hold steps.
    compiled: whether blocks and loss are under torch.compile; else they run op by op.
    """

    def __init__(
        self,
        recipe: str,
        layers: int,
        width: int,
        batch: int,
        context: int,
        device: torch.device,
        capturable: bool = False,
        compiled: bool = True,
    ) -> None:
        torch.manual_seed(0)
        self.model = GPT(layers, width, context).to(device)
        if recipe != "bf16":
            mxtrain.convert(self.model, recipe, include="blocks.*", strict=True)
        if compiled:
            # Each block by itself, so that all share one graph: 24 compile as fast as one does.
            options = {"backend": BACKEND, "dynamic": False}
            for block in self.model.blocks:
                block.compile(**options)
            self.model.loss = torch.compile(self.model.loss, **options)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=3e-4, fused=True, capturable=capturable
        )
        self.text = torch.randint(VOCABULARY, (batch, context + 1), device=device)

    def step(self) -> Tensor:
        with torch.autocast(self.text.device.type, torch.bfloat16):
            loss = self.model(self.text)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


@family("train")
def train(name: str, model: str, recipe: str, size: str, batch: str, unit: str) -> Case:
    """train/gpt/RECIPE/LAYERSxWIDTH/SEQUENCESxCONTEXT/step or graph."""
    if model != "gpt" or unit not in ("step", "graph"):
        raise ValueError(f"a training row is train/gpt/.../step or .../graph, got {name!r}")
    if recipe != "bf16" and recipe not in RECIPES:
        raise ValueError(f"a recipe must be bf16, {', '.join(RECIPES)}, got {recipe!r}")
    (layers, width), (sequences, context) = parse_shape(size), parse_shape(batch)
    if width % HEAD:
        raise Unfit(f"heads of {HEAD} do not divide a width of {width}")
    graph = unit == "graph"

    def make(device: torch.device) -> tuple:
        capturable = graph and device.type == "cuda"
        return (Trainer(recipe, layers, width, sequences, context, device, capturable),)

    def check(inputs: tuple, got: Tensor, elements: int) -> float:
        """Before it has learned anything, a model's loss is about the logarithm of its classes."""
        return abs(float(got) / math.log(VOCABULARY) - 1)

    tokens = sequences * context
    flops = 6 * tokens * width * (12 * layers * width + VOCABULARY)  # of the linear layers and head
    twin = None if recipe == "bf16" else f"train/gpt/bf16/{size}/{batch}/{unit}"
    op = None if recipe == "bf16" else "gemm"
    return Case(
        name, make, Trainer.step, 0, flops, op, check, 0.05, bf16=twin, tokens=tokens, graph=graph
    )
