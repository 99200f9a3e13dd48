"""One run of the study: a row trained from one seed, and the process that makes many of them.

The worker (`python study_run.py DEVICE FOLDER`, which keeps the text in that folder) reads jobs
from its standard input, a line of JSON each, and answers on its standard output with lines that
begin with "@": {"event": "ready"}, "row" after every validation, then "done" with the record of the
run or "failed" with the error. Runs of one row reuse what was compiled for the first.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any

import torch
from fixed_order import fixed_order
from harness import Run, checksum, digest
from llama import compress_contexts
from options import make_parser
from study_rows import ROWS, Row
from torch import Tensor, nn

import mxtrain
from mxtrain.linear import MXLinear
from mxtrain.oscillation import Oscillation, rate_of_change, weight_quantizer

Fields = dict[str, Any]
WINDOW = 50  # steps over which oscillation is measured
SETTLED = 10  # steps after which the peak of memory is that of training
CALIBRATION = 30  # transitions of Q-Ramping's detection
RATES = 4  # times that the rate of fallback is read from one validation to the next


class Watch:
    """Oscillation of the quantized weights over the steps of a window."""

    def __init__(self, model: nn.Module) -> None:
        self.layers = []
        for layer in model.modules():
            if isinstance(layer, MXLinear) and (q := weight_quantizer(layer)) is not None:
                self.layers.append((layer, Oscillation(q)))
        self.sums: list[list[Tensor]] = [[] for _ in self.layers]

    def update(self) -> None:
        for (layer, oscillation), sums in zip(self.layers, self.sums, strict=True):
            toward = layer.weight_ema if layer.ema_active else None
            moved = oscillation.update(layer.weight, toward)
            if moved is not None:
                sums.append(moved)

    def result(self) -> Fields:
        """Means over the layers, each element of a weight counting once."""
        weights = torch.tensor([float(layer.weight.numel()) for layer, _ in self.layers])
        shares = torch.stack([o.summary() for _, o in self.layers]).double().cpu()
        rates = torch.stack([torch.stack(rate_of_change(torch.stack(s))) for s in self.sums])
        flips = torch.stack([o.flips().double().mean() for _, o in self.layers]).cpu()
        part = (weights / weights.sum()).double()
        oscillating, ratio = (part @ shares).tolist()
        moved, quantized_moved = rates.double().cpu().mean(0).tolist()
        return {
            "oscillating": oscillating,  # share of elements with R > 16
            "ratio": ratio,
            "flips": float(part @ flips),  # of an element, in the window
            "rate_w": moved,
            "rate_q": quantized_moved,
            "steps": self.layers[0][1].transitions,
        }


class StudyRun(Run):
    """A harness.Run with what a row asks for: optimizer, schedule, and what it measures."""

    def __init__(self, row: Row, task: Any, args: Any, seed: int, fresh: bool) -> None:
        self.row, self.fresh = row, fresh
        self.schedule: mxtrain.TargetPrecision | None = None
        self.peak = 0
        self.on_cuda = torch.device(args.device).type == "cuda"
        self.before = torch.cuda.memory_allocated() if self.on_cuda else 0
        super().__init__(task, args, row.name, seed)
        steps = args.steps
        self.window = max(2, min(WINDOW, steps // 6))
        self.windows = {steps // 2: "middle", steps - self.window: "end"} if row.watch else {}
        self.watch: tuple[str, int, Watch] | None = None  # name, last step, sums
        ramping = row.optimizer == "qramping"
        self.calibrations = {i * steps // 4 for i in range(4)} if ramping else set()
        layers = {n: m for n, m in self.model.named_modules() if isinstance(m, MXLinear)}
        self.falling = {n: m for n, m in layers.items() if m.recipe.fprop_x.fallback}
        self.rates: list[tuple[int, Tensor]] = []  # since the last validation, on the device
        self.record.update(
            oscillation={}, periods={}, fallback=[], fallback_layers=list(self.falling),
            peak_bytes=0, diverged=None, first_step=0.0,
        )  # fmt: skip

    # ---- what a row changes ----

    def convert(self, recipe: str) -> None:
        if self.row.recipe == "bf16":
            return
        mxtrain.convert(self.model, self.row.recipe)
        compress_contexts(self.model)
        if self.row.tail:
            fraction = 1 - self.row.tail
            self.schedule = mxtrain.TargetPrecision(self.model, self.args.steps, fraction)

    def compile(self) -> None:
        if self.fresh:
            torch.compiler.reset()
        for block in self.model.blocks:
            block.compile(dynamic=False)

    def make_optimizer(self, groups: list[Fields]) -> torch.optim.Optimizer:
        options = {"lr": self.args.lr, "betas": (0.9, 0.98)}
        if self.row.optimizer == "qramping":
            period = max(1, self.args.steps // 4)  # steps from one calibration to the next
            return mxtrain.optim.QRamping(groups, self.model, max_period=period, **options)
        return mxtrain.optim.AdamW(groups, **options)

    # ---- the loop ----

    def pause_clock(self) -> None:
        """What comes now is no training, and the WARM_UP steps after it are not timed either."""
        self.stop_clock()
        self.warmed = 0

    def calibrate(self) -> None:
        """Q-Ramping's detection, on batches of its own: the order of the data stays."""
        data_rng = self.data_rng
        self.data_rng = torch.Generator().manual_seed(1_000_003 * (self.step + 1))
        try:
            shares = self.optimizer.calibrate(self.gradients, transitions=CALIBRATION)
        finally:
            self.data_rng = data_rng
        self.record["periods"][self.step] = sum(shares.values()) / len(shares)

    def advance(self) -> float:
        if self.step in self.calibrations:
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate()
            self.calibrate()
        if self.step in self.windows:
            self.pause_clock()
            watch = Watch(self.model)
            if watch.layers:
                watch.update()
                self.watch = self.windows[self.step], self.step + self.window, watch
        loss = super().advance()
        if self.watch is not None:
            name, last, watch = self.watch
            watch.update()
            if self.step == last:
                self.record["oscillation"][name] = watch.result()
                self.watch = None
                self.pause_clock()
        if self.schedule is not None and self.schedule.step():
            self.pause_clock()  # the blocks are compiled again
        if self.on_cuda and self.step == SETTLED:
            torch.cuda.reset_peak_memory_stats()
        return loss

    def gradients(self) -> Tensor:
        loss = super().gradients()
        if self.falling and (self.step + 1) % max(1, self.args.eval_every // RATES) == 0:
            # Of this step, before the optimizer's makes them 0 again.
            rates = [layer.fallback_rate() for layer in self.falling.values()]
            self.rates.append((self.step + 1, torch.stack(rates)))
        return loss

    def evaluate(self) -> tuple[float, float]:
        if self.on_cuda and not self.peak:
            self.peak = torch.cuda.max_memory_allocated() - self.before
        self.record["peak_bytes"] = self.peak
        self.record["fallback"] += [[step, *rates.tolist()] for step, rates in self.rates]
        self.rates = []
        eager = contextlib.nullcontext()
        if self.args.compile:  # forward alone would be one more graph
            eager = torch.compiler.set_stance("force_eager")
        with eager:
            return super().evaluate()

    def train(self) -> Iterator[Fields]:
        """All steps; yields the record after every validation. Ends where the loss is no number."""
        started, rows = time.perf_counter(), 0
        while self.step < self.args.steps:
            loss = self.advance()
            if self.step == 1:
                self.record["first_step"] = time.perf_counter() - started
            if not self.pending and not math.isfinite(loss):
                self.record["diverged"] = self.step
                break
            if len(self.record["rows"]) > rows:
                rows = len(self.record["rows"])
                yield self.record


# ---- the worker ----


def task_of(row: Row, options: list[str], folder: str) -> tuple[Any, Any]:
    """The task of a row, without its data, and its arguments. Text is kept in the folder."""
    module, name = row.script
    task = getattr(importlib.import_module(module), name)()
    args = make_parser(task).parse_args(options)
    if "cache" in task.options and not args.cache:
        args.cache = os.path.join(folder, f"{args.text}-{args.megabytes:g}.bin")
    return task, args


def say(event: str, **fields: Any) -> None:
    sys.stdout.write("@" + json.dumps({"event": event, **fields}) + "\n")
    sys.stdout.flush()


class Worker:
    def __init__(self, device: str, folder: str) -> None:
        self.device, self.folder = device, folder
        self.loaded: tuple[Any, ...] | None = None  # key, task, args
        self.data = 0  # its checksum
        self.compiled: str | None = None  # what the graphs at hand were made for

    def task(self, row: Row, options: list[str]) -> tuple[Any, Any]:
        """The task of a row with its data, and its arguments."""
        key = (row.script, *options)
        if self.loaded is None or self.loaded[0] != key:
            self.loaded = None
            task, args = task_of(row, options, self.folder)
            args.device = self.device
            self.data = checksum(task.load(args))
            self.loaded = key, task, args
        return self.loaded[1:]

    def run(self, job: Fields) -> None:
        name, _, seed = job["run"].rpartition("@")
        row = ROWS[name]
        task, args = self.task(row, [*row.options.split(), *job["options"].split()])
        args = argparse.Namespace(**vars(args))  # the next run may compile
        args.compile = args.compile and job["compile"]
        started = time.perf_counter()
        # What was compiled for another order of the sums is not used again.
        graphs = f"{name} {args.deterministic}"
        fresh, self.compiled = self.compiled != graphs, graphs
        with fixed_order(args.deterministic):
            run = StudyRun(row, task, args, int(seed), fresh)
            record = run.record
            for _ in run.train():
                say("row", run=job["run"], row=record["rows"][-1])
        rate = run.throughput()
        record["rows"] = [row[:4] for row in record["rows"]]
        parameters = sum(p.numel() for p in run.model.parameters())
        say(
            "done",
            record={
                **record,
                "run": job["run"],
                "wall": time.perf_counter() - started,
                "units_per_second": rate,
                "unit": task.unit,
                "metric": task.metric,
                "parameters": parameters,
                "steps": args.steps,
                "units": args.steps * args.batch * task.units(args),
                "compiled": args.compile,
                "deterministic": args.deterministic,
                "weights": digest(run.model),
                "data": self.data,
                "device": device_name(args.device),
                "torch": torch.__version__,
            },
        )


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "CPU"


def main(device: str, folder: str) -> None:
    torch.set_num_threads(min(4, os.cpu_count() or 1) if device != "cpu" else 1)
    if device != "cpu":
        torch.zeros(1, device=device)
    worker = Worker(device, folder)
    say("ready")
    for line in sys.stdin:
        job = json.loads(line)
        try:
            worker.run(job)
        except Exception as error:  # the next run may work
            worker.loaded = worker.compiled = None
            traceback.print_exc()
            say("failed", run=job["run"], error=f"{type(error).__name__}: {error}"[:500])
        gc.collect()
        if device != "cpu":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main(*sys.argv[1:3])
