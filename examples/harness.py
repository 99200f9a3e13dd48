"""What the training examples share: options, the loop, checkpoints, the table and the plot.

An example is a `Task` (data, model, metric) and ends with `sys.exit(main(task))`. The recipes of a
seed start from the same weights and see the same batches, in one mixed precision: float32 master
weights under bfloat16 autocast. So the recipe is the only difference between two curves.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import itertools
import math
import os
import signal
import statistics
import sys
import time
import zlib
from collections.abc import Iterable, Iterator
from functools import partial
from types import FrameType
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from checkpoint import (
    MAGIC as MAGIC,
)
from checkpoint import (
    BadInput as BadInput,
)
from checkpoint import (
    Fields,
    check_optimizer,
    refuse,
    save_checkpoint,
)
from fixed_order import fixed_order
from llama import compress_contexts
from matplotlib.figure import Figure
from options import check_outputs, read_options
from torch import Tensor, nn
from tqdm import tqdm

import mxtrain


class Task(Protocol):
    """What an example provides. train_vit.py is one."""

    name: str  # the script, without .py
    metric: str  # heading of the metric's column
    unit: str  # what the throughput counts: images, tokens
    options: dict[str, tuple[Any, str]]  # default and help of the run's and the model's numbers

    # Read the data, keep it on args.device and return its tensors. Raises BadInput.
    def load(self, args: argparse.Namespace) -> list[Tensor]: ...
    # Tokens of an item of a batch.
    def tokens(self, args: argparse.Namespace) -> int: ...
    # Units of an item of a batch.
    def units(self, args: argparse.Namespace) -> int: ...
    # The model, on the CPU, with `blocks` alike. Raises BadInput for sizes that do not fit.
    def build_model(self, args: argparse.Namespace) -> nn.Module: ...
    # Inputs of a step and its target classes, or their probabilities [N, classes]. All that is
    # random comes from the generator.
    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]: ...
    # All validation batches, the same at every call.
    def validation(self) -> Iterator[tuple[Tensor, Tensor]]: ...
    # The metric, from the mean cross-entropy in nats and the share of right predictions.
    def score(self, loss: float, accuracy: float) -> float: ...


# ---- one run ----

WARM_UP = 20  # steps after each start that the throughput leaves out: compilation, the first of EMA
SHOW = 20  # steps after which a GPU is waited for, to show the loss


def to_device(t: Tensor, device: torch.device) -> Tensor:
    """A small tensor from the CPU, without waiting for what the device still has to do."""
    return t.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else t.to(device)


def bf16_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """layer(x) in BF16 arithmetic, forward and backward, on the float32 units of a CPU.

    Operands and results are BF16, products are exact in float32 and the sums are float32, as in a
    tensor core. On a CPU without BF16 instructions, torch's BF16 matmul is 15 to 100 times slower.
    """
    with torch.autocast("cpu", enabled=False):
        given = (x, layer.weight, layer.bias)
        x, weight, bias = (None if t is None else t.bfloat16().float() for t in given)
        return F.linear(x, weight, bias).bfloat16()


class Run:
    """One recipe trained from one seed."""

    def __init__(self, task: Task, args: argparse.Namespace, recipe: str, seed: int) -> None:
        self.task, self.args, self.device = task, args, torch.device(args.device)
        torch.manual_seed(seed)
        self.model = task.build_model(args)
        self.convert(recipe)
        if self.device.type == "cpu":
            for layer in self.model.modules():
                if type(layer) is nn.Linear:  # and not converted
                    layer.forward = partial(bf16_linear, layer)
        self.model.to(self.device)
        if args.compile:
            self.compile()
        # As usual, only matrices decay: not biases, norms and positions.
        groups = [
            {"params": [p for p in self.model.parameters() if p.ndim == 2], "weight_decay": 0.05},
            {"params": [p for p in self.model.parameters() if p.ndim != 2], "weight_decay": 0.0},
        ]
        self.optimizer = self.make_optimizer(groups)
        # Batches have their own generator: stochastic rounding draws from torch's.
        self.data_rng = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        self.step = 0
        self.recent: list[float] = []  # training losses since the last row
        self.pending: list[Tensor] = []  # those of them that the device may not have computed yet
        self.loss = math.nan  # the last known
        self.warmed = 0  # steps since this start, up to WARM_UP
        self.clock: tuple[int, float] | None = None  # step and time at which the timing began
        # A row is [step, training loss, validation loss, metric, units per second or 0].
        self.record: Fields = {"recipe": recipe, "seed": seed, "seconds": 0.0, "timed_steps": 0,
                               "timed_seconds": 0.0, "rows": []}  # fmt: skip

    def convert(self, recipe: str) -> None:
        if recipe != "bf16":
            print(f"{recipe}: {mxtrain.convert(self.model, recipe).summary}")
            compress_contexts(self.model)

    def compile(self) -> None:
        torch.compiler.reset()  # the graphs of the last run count towards the limit
        for block in self.model.blocks:  # which share one graph, so 24 take as long as 3
            block.compile(dynamic=False)

    def make_optimizer(self, groups: list[Fields]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, lr=self.args.lr, betas=(0.9, 0.98), fused=True)

    def learning_rate(self) -> float:
        """Linear warm-up over a tenth of the steps, then half a cosine down to zero."""
        warmup = max(1, self.args.steps // 10)
        done = max(0, self.step - warmup) / max(1, self.args.steps - warmup)
        return self.args.lr * min((self.step + 1) / warmup, (1 + math.cos(math.pi * done)) / 2)

    def forward(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy, and the logits [predictions, classes]."""
        with torch.autocast(self.device.type, torch.bfloat16):
            logits = self.model(inputs)
        logits = logits.float().flatten(0, -2)
        targets = targets if targets.is_floating_point() else targets.flatten()
        return F.cross_entropy(logits, targets), logits

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float]:
        """Loss and metric over the validation set, in the forward arithmetic of the recipe."""
        self.model.eval()
        loss = right = count = 0
        for inputs, targets in self.task.validation():
            mean, logits = self.forward(inputs, targets)
            loss += mean.item() * targets.numel()
            right += (logits.argmax(-1) == targets.flatten()).sum().item()
            count += targets.numel()
        self.model.train()
        return loss / count, self.task.score(loss / count, right / count)

    def synchronized(self) -> float:
        """The time when the device has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def stop_clock(self) -> None:
        """Add the training steps since the clock was started to what is timed."""
        if self.clock is not None:
            self.record["timed_seconds"] += self.synchronized() - self.clock[1]
            self.record["timed_steps"] += self.step - self.clock[0]
            self.clock = None

    def throughput(self) -> float:
        """Images or tokens per second of the steps timed so far; 0 where none are."""
        units = self.record["timed_steps"] * self.args.batch * self.task.units(self.args)
        return units / self.record["timed_seconds"] if self.record["timed_seconds"] > 0 else 0.0

    def read_losses(self) -> None:
        """Wait for the losses of the steps so far."""
        if self.pending:
            self.recent += torch.stack(self.pending).tolist()
            self.loss = self.recent[-1]
            self.pending = []

    def gradients(self) -> Tensor:
        """Those of the next batch, clipped. Returns its loss."""
        loss, _ = self.forward(*self.task.batch(self.args.batch, self.data_rng))
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        return loss

    def advance(self) -> float:
        """One step, and a row of the log where one is due. Returns the last known training loss."""
        started = time.perf_counter()
        if self.warmed == WARM_UP and self.clock is None:
            self.clock = self.step, self.synchronized()
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        loss = self.gradients()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.warmed = min(self.warmed + 1, WARM_UP)
        self.pending.append(loss.detach())
        if self.device.type == "cpu" or self.warmed == 1 or self.step % SHOW == 0:
            self.read_losses()
        if self.step % self.args.eval_every == 0 or self.step == self.args.steps:
            self.stop_clock()
            self.read_losses()
            row = [self.step, statistics.fmean(self.recent), *self.evaluate(), self.throughput()]
            self.record["rows"].append(row)
            self.recent = []
        self.record["seconds"] += time.perf_counter() - started
        return self.loss

    def state(self) -> Fields:
        """With the record, all that it takes to go on as if nothing had happened."""
        started = time.perf_counter()
        self.stop_clock()  # saving is no training
        self.read_losses()
        self.record["seconds"] += time.perf_counter() - started
        cuda = self.device.type == "cuda"
        return {
            "step": self.step,
            "recent": self.recent,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "torch_rng": torch.get_rng_state(),
            "data_rng": self.data_rng.get_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if cuda else None,
        }

    def load_state(self, state: Fields, record: Fields) -> None:
        """Go on where a checkpoint was written. BadInput where it does not fit."""
        try:
            self._load_state(state, record)
        except Exception as error:  # torch raises nearly anything
            reason = str(error).strip().splitlines()[0]
            got = f"which does not fit its own options ({reason})"
            refuse(self.task.name, self.args.resume, got)

    def _load_state(self, state: Fields, record: Fields) -> None:
        if not 0 <= state["step"] <= self.args.steps:
            raise ValueError(f"step {state['step']} of {self.args.steps}")
        self.step, self.recent, self.record = state["step"], state["recent"], record
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        check_optimizer(self.optimizer)
        torch.set_rng_state(state["torch_rng"])
        self.data_rng.set_state(state["data_rng"])
        if self.device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)


# ---- interruption ----


@contextlib.contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Collects Ctrl-C and SIGTERM: the loop stops after its step. A second one stops at once."""
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- results ----


def mean_and_spread(values: list[float], style: str) -> str:
    """The mean; for several seeds, plus or minus the standard deviation."""
    text = format(statistics.fmean(values), style)
    spread = format(statistics.stdev(values), style.lstrip("+")) if len(values) > 1 else None
    return f"{text} ± {spread}" if spread else text


def table(task: Task, records: list[Fields]) -> str:
    """A line for each recipe, with what the last row of its runs says.

    The speed is that of the training steps without validation, its first WARM_UP left out.
    """
    baseline = {r["seed"]: r["rows"][-1][3] for r in records if r["recipe"] == "bf16"}
    speed = f"{task.unit}/s"
    lines = [("recipe", "validation loss", task.metric, "gap to bf16", "seconds", speed, "x bf16")]
    for recipe in dict.fromkeys(r["recipe"] for r in records):
        runs = [r for r in records if r["recipe"] == recipe]
        _, _, loss, metric, rates = zip(*(r["rows"][-1] for r in runs), strict=True)
        gap = []
        if baseline and recipe != "bf16":
            gap = [r["rows"][-1][3] - baseline[r["seed"]] for r in runs]
        seconds = [r["seconds"] for r in runs]
        rates = rates if all(rates) else ()
        ratios = speedups(records, recipe)
        columns = (
            (loss, ".4f"), (metric, ".3f"), (gap, "+.3f"), (seconds, ".1f"), (rates, ",.0f"),
            (ratios if all(ratios) else (), ".2f"),
        )  # fmt: skip
        lines.append((recipe, *(mean_and_spread(v, style) if v else "-" for v, style in columns)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, tuple("-" * width for width in widths))
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def speedups(records: list[Fields], recipe: str) -> list[float]:
    """For each run of the recipe its speed over that of bf16 from the same seed; 0 if unknown."""
    bf16 = {r["seed"]: r["rows"][-1][4] for r in records if r["recipe"] == "bf16" and r["rows"]}
    runs = [r for r in records if r["recipe"] == recipe and recipe != "bf16" and r["rows"]]
    return [r["rows"][-1][4] / bf16[r["seed"]] if bf16.get(r["seed"]) else 0.0 for r in runs]


def write_csv(task: Task, records: list[Fields], path: str) -> None:
    metric = task.metric.replace(" ", "_").replace("%", "percent")
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        speed = [f"{task.unit}_per_second", "times_bf16"]  # up to the row, and of the whole run
        writer.writerow(["recipe", "seed", "step", "train_loss", "val_loss", metric, *speed])
        for record in records:
            same_seed = [r for r in records if r["seed"] == record["seed"]]
            ratio = (speedups(same_seed, record["recipe"]) or [0.0])[0]
            for *row, rate in record["rows"]:
                speed = [rate or "", ratio or ""]
                writer.writerow([record["recipe"], record["seed"], *row, *speed])


def write_plot(task: Task, records: list[Fields], path: str) -> None:
    """Losses and metric against the step: a colour for each recipe, a line for each seed."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    colours: dict[str, str] = {}
    for record in records:
        recipe = record["recipe"]
        label = None if recipe in colours else recipe  # once in the legend
        colour = colours.setdefault(recipe, f"C{len(colours)}")
        step, train_loss, val_loss, metric, _ = zip(*record["rows"], strict=True)
        left.plot(step, train_loss, ":", color=colour)
        left.plot(step, val_loss, color=colour)
        right.plot(step, metric, color=colour, label=label)
    left.set(xlabel="step", ylabel="loss (dotted: training, solid: validation)", yscale="log")
    right.set(xlabel="step", ylabel=task.metric)
    right.legend()
    figure.savefig(path, dpi=120)


# ---- a run of everything ----


def checksum(data: Iterable[Tensor]) -> int:
    """Of what a task loaded: another Python has another text for train_gpt.py."""
    found = 0
    for tensor in data:
        found = zlib.crc32(tensor.cpu().contiguous().numpy(), found)
    return found


def digest(model: nn.Module) -> str:
    """sha256 of all parameters and buffers: two runs that ended in the same bits have the same."""
    found = hashlib.sha256()
    for tensor in model.state_dict().values():
        if isinstance(tensor, Tensor):
            found.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def train(task: Task, args: argparse.Namespace, checkpoint: Fields | None) -> int:
    """All runs, one after another. Returns the exit status."""
    torch.set_num_threads(args.threads)
    check_outputs(args)
    data = checksum(task.load(args))
    if checkpoint is not None and checkpoint["data"] != data:
        must = "--resume must name a checkpoint that was trained on the same data"
        raise BadInput(f"{must}, got {args.resume}. Use the Python and the packages of that run.")
    records = [] if checkpoint is None else checkpoint["records"][:-1]  # of the finished runs
    recipes = sorted(dict.fromkeys(args.recipe), key=lambda name: name != "bf16")  # bf16 first
    runs = list(itertools.product(dict.fromkeys(args.seed), recipes))
    if checkpoint is not None:
        done = [(record["seed"], record["recipe"]) for record in checkpoint["records"]]
        if done != runs[: len(done)] or not all(record["rows"] for record in records):
            refuse(task.name, args.resume, "whose records are not those of its options")
    header = {"example": task.name, "options": vars(args), "data": data}

    def save(run: Run) -> None:
        state = run.state()  # which completes the record
        content = {**header, "records": [*records, run.record], "run": state}
        save_checkpoint(args.save, content)

    with stop_requests() as stop:
        for seed, recipe in runs[len(records) :]:
            run = Run(task, args, recipe, seed)
            if checkpoint is not None:
                run.load_state(checkpoint["run"], checkpoint["records"][-1])
                checkpoint = None
            title = f"{recipe}, seed {seed}"
            with tqdm(total=args.steps, initial=run.step, desc=title, dynamic_ncols=True) as bar:
                while run.step < args.steps and not stop:
                    bar.set_postfix(loss=f"{run.advance():.3f}", refresh=False)
                    bar.update()
                    if run.step % args.save_every == 0:
                        save(run)
            save(run)
            records.append(run.record)
            write_csv(task, records, os.path.join(args.out, "log.csv"))
            if stop:
                print(f"{task.name}: stopped after step {run.step} of {args.steps} of {title}.")
                print(f"Go on with: python {sys.argv[0]} --resume {args.save}")
                return 128 + stop[0]
    write_plot(task, records, os.path.join(args.out, "curves.png"))
    print(f"\n{table(task, records)}\n\nlog.csv and curves.png are in {args.out}.")
    return 0


def main(task: Task, argv: list[str] | None = None) -> int:
    """The program. Returns 0, 2 for bad input, or 128 + the signal that stopped it."""
    try:
        args, checkpoint = read_options(task, argv)
        if args.list:
            for recipe in [*mxtrain.RECIPES.values(), *mxtrain.MIXES.values()]:
                print(f"{recipe.name:22} {recipe.reference}")
            return 0
        with fixed_order(args.deterministic):
            return train(task, args, checkpoint)
    except (BadInput, OSError) as error:
        print(f"{task.name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
