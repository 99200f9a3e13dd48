"""monitor(model, "run.csv"): what quantization does to each layer of a run, as a table.

One row for each MXLinear every `every` optimizer steps; COLUMNS says what it holds, and
mxtrain/oscillation.py how each is defined. An empty cell has no value there: a GEMM that is not
quantized, or to int8_block, a tensor that was not seen.

- Weights are watched at every step of the optimizer that holds them, on rows that are evenly spread
  over the weight; the window of a row is the steps since the row before.
- X and dY are seen at the last forward and backward before a row, on a sample of the tokens. Under
  torch.compile they are not: the traced code would have to leave the graph.
  `torch.compiler.set_stance("force_eager")` around a step that makes a row shows them.
- Nothing waits for the device: a row is copied when it is complete, and written with the next one.
- What is watched does not change what is computed: torch's generator is left alone.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .checks import check_int, kind, refusal, show
from .formats import FORMATS
from .linear import MXLinear
from .oscillation import (
    MOVEMENTS,
    RATIO_EDGES,
    STATISTICS,
    Oscillation,
    as_seen,
    output_change,
    quantizer_rates,
    quantizer_sums,
    rate_of_change,
    row_sample,
    weight_quantizer,
)
from .recipe import Quantizer

QUANTIZERS = ("fprop_x", "fprop_w", "dgrad_dy", "dgrad_w", "wgrad_dy", "wgrad_x")
RATES = ("snr", "underflow", "clip", "confidence", "nonfinite")
_WEIGHT = ("w_change", "q_change", "flips", "oscillating", "ratio")

_FALLBACK = ("fallback_rate", "fallback_threshold")
_BINS = tuple(f"ratio<{edge:g}" for edge in (*RATIO_EDGES, float("inf")))

COLUMNS = (
    "step", "layer", "recipe", *_WEIGHT, "y_change", *_FALLBACK, *_BINS,
    *(f"{q}.{r}" for q in QUANTIZERS for r in RATES),
)  # fmt: skip
"""step: optimizer steps seen. w_change, q_change: rates of change of W and Q(W), a step. flips:
share of Q(W) that changed, a step. oscillating: share of weights whose R is above 16. ratio: mean
R. y_change: of the layer's output on the probe, since the row before. fallback_rate: share of the
blocks of X that fell back in the last step, over all ranks; fallback_threshold: what that made of
their limit. ratio<E: share of weights
with R between the edge before and E. Then for each quantizer its snr (dB), underflow, clip,
confidence and nonfinite."""


class _Watched:
    """One layer, and what is known of it since the last row."""

    def __init__(self, name: str, layer: MXLinear, elements: int) -> None:
        self.name, self.layer, self.elements = name, layer, elements
        self.rows = row_sample(layer.out_features, layer.in_features, elements)
        self.sums: dict[str, Tensor] = {}
        self.output: Tensor | None = None
        self.output_moved: Tensor | None = None
        self.restart()

    def restart(self) -> None:
        """Watch the weight anew: the recipe has changed."""
        self.recipe = self.layer.recipe
        q = weight_quantizer(self.layer)
        self.oscillation = None if q is None else Oscillation(q)
        self.moves: list[Tensor] = []

    # ---- the weight ----

    def weight(self, rows: slice) -> tuple[Tensor, Tensor | None]:
        """These rows of the weight, and of what it rounds toward. Of a shard, its own rows."""
        weight, layer = self.layer.weight.detach(), self.layer
        if hasattr(weight, "to_local"):
            return weight.to_local()[rows], None
        return weight[rows], layer.weight_ema[rows] if layer.ema_active else None

    def stepped(self) -> None:
        """An optimizer step has moved the weight."""
        if self.layer.recipe is not self.recipe:
            self.restart()
        if self.oscillation is not None:
            moved = self.oscillation.update(*self.weight(self.rows))
            if moved is not None:
                self.moves.append(moved)

    # ---- X and dY ----

    def saw_x(self, x: Tensor) -> None:
        recipe, x = self.layer.recipe, _tokens(x, self.elements)
        self._quantized("fprop_x", recipe.fprop_x, x)
        wgrad = recipe.wgrad_x
        again = wgrad.format in FORMATS and wgrad.source == "forward"
        source = _forward(x, recipe.fprop_x) if again else x
        self._quantized("wgrad_x", wgrad, source, transpose=True)

    def saw_dy(self, dy: Tensor) -> None:
        recipe, dy = self.layer.recipe, _tokens(dy, self.elements)
        self._quantized("dgrad_dy", recipe.dgrad_dy, dy)
        self._quantized("wgrad_dy", recipe.wgrad_dy, dy, transpose=True)

    def _quantized(
        self, field: str, q: Quantizer, x: Tensor, transpose: bool = False, toward: Any = None
    ) -> None:  # fmt: skip
        if q.format in FORMATS and x.numel():
            self.sums[field] = quantizer_sums(x, q, transpose=transpose, toward=toward)

    # ---- the row ----

    def row(self) -> tuple[Callable[[list[float]], list[Any]], Tensor]:
        """A function that makes the cells of its values, and the values, still on the device."""
        recipe = self.layer.recipe
        w, ema = self.weight(self.rows)
        self._quantized("fprop_w", recipe.fprop_w, w, toward=ema)
        q = recipe.dgrad_w
        if q.format in FORMATS:
            # Blocks of W^T run along out_features: of whole groups of consecutive rows.
            groups = self.elements // max(self.layer.in_features, 1) // 256
            w, ema = self.weight(slice(256 * max(1, groups)))
            source = w if q.source == "original" else _forward(w, recipe.fprop_w, ema)
            self._quantized("dgrad_w", q, source, transpose=True)
        fields, values = list(self.sums), list(self.sums.values())
        weight = self.oscillation is not None and len(self.moves) > 0
        if weight:
            moves = torch.stack(self.moves)
            flips = moves[:, MOVEMENTS.index("flips")].mean() / self.oscillation.ratio().numel()
            values += [torch.stack([*rate_of_change(moves), flips])]
            values += [self.oscillation.summary().double(), self.oscillation.histogram().double()]
            self.oscillation.reset()
        probed = self.output_moved is not None
        if probed:
            values.append(self.output_moved.double().reshape(1))
        rate = self.layer.last_fallback_rate()
        if rate is not None:
            values.append(torch.cat([rate.reshape(1), self.layer.fallback_threshold]).double())
        name, recipe_name = self.name, recipe.name
        self.sums, self.moves, self.output_moved = {}, [], None

        def cells(numbers: list[float]) -> list[Any]:
            found: dict[str, Any] = {"layer": name, "recipe": recipe_name}
            for i, field in enumerate(fields):
                sums = numbers[i * len(STATISTICS) : (i + 1) * len(STATISTICS)]
                rates = quantizer_rates(dict(zip(STATISTICS, sums, strict=True)))
                found |= {f"{field}.{rate}": value for rate, value in rates.items()}
            rest = iter(numbers[len(fields) * len(STATISTICS) :])
            columns = (*_WEIGHT, *_BINS) if weight else ()
            known = ("y_change",) * probed + _FALLBACK * (rate is not None)
            for column in (*columns, *known):
                found[column] = next(rest)
            return [found.get(column, "") for column in COLUMNS[1:]]

        device = self.layer.weight.device
        return cells, torch.cat(values) if values else torch.empty(0, device=device)


def _tokens(x: Tensor, elements: int) -> Tensor:
    """[N, K] of about that many elements, in whole groups of 256 tokens: all where they are few,
    else from the start, the middle and the end, or from the middle alone where K is large."""
    x = x.detach().reshape(-1, x.shape[-1])
    n, groups = len(x), elements // max(x.shape[1], 1) // 256
    runs = 3 if groups >= 3 else 1
    length = 256 * max(1, groups // runs)
    if n <= runs * length:
        return x
    starts = ((n - length) // 2, 0, n - length)[:runs]
    return torch.cat([x[start : start + length] for start in starts])


def _forward(x: Tensor, q: Quantizer, toward: Tensor | None = None) -> Tensor:
    """The values of the forward operand, which double quantization quantizes again."""
    return as_seen(x, q, toward, stochastic=True)[1].dequantize(torch.float32)


class Monitor:
    """Watches a model's MXLinear and writes a CSV. `monitor` makes one; use it with `with`."""

    def __init__(
        self, layers: dict[str, MXLinear], path: str | os.PathLike, every: int, elements: int,
        model: nn.Module, probe: tuple[Any, ...] | None,
    ) -> None:  # fmt: skip
        self.every, self.path = every, path
        self._model, self._probe = model, probe
        self._watched = {id(m): _Watched(name, m, elements) for name, m in layers.items()}
        self._steps, self._pending = 0, None
        self._file = open(path, "w", newline="")  # noqa: SIM115 - close() closes it
        self._csv = csv.writer(self._file)
        self._csv.writerow(COLUMNS)
        self._handles = [register_optimizer_step_post_hook(torch.compiler.disable(self._stepped))]
        for module in layers.values():
            self._handles.append(module.register_forward_hook(self._forwarded))
        self._run_probe()

    # ---- hooks ----

    def _due(self) -> bool:
        return (self._steps + 1) % self.every == 0

    def _forwarded(self, layer: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
        if torch.compiler.is_compiling():
            return
        watched = self._watched.get(id(layer))
        if watched is None or not args or not layer.training or not self._due():
            return
        watched.saw_x(args[0])
        if isinstance(y, Tensor) and y.requires_grad:
            y.register_hook(watched.saw_dy)

    def _stepped(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """After a step of an optimizer that holds one of the weights."""
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        watched = [w for w in self._watched.values() if id(w.layer.weight) in held]
        if watched:
            self._advance(watched)

    def step(self) -> None:
        """One step has moved the weights. Only for optimizers that hold copies of them."""
        if self._file.closed:
            advice = "Make another monitor."
            message = refusal("Monitor.step", "monitor", "be open", "closed", self.path, advice)
            raise RuntimeError(message)
        self._advance(list(self._watched.values()))

    @torch.no_grad()
    def _advance(self, watched: list[_Watched]) -> None:
        for w in watched:
            w.stepped()
        self._steps += 1
        if self._steps % self.every == 0:
            self._run_probe()
            self._record()

    # ---- rows ----

    @torch.no_grad()
    def _run_probe(self) -> None:
        if self._probe is None:
            return
        found: dict[int, Tensor] = {}

        def keep(layer: nn.Module, args: Any, y: Tensor) -> None:
            found[id(layer)] = y.detach().clone()

        hooks = [w.layer.register_forward_hook(keep) for w in self._watched.values()]
        modes = [(m, m.training) for m in self._model.modules()]
        self._model.eval()
        try:
            self._model(*self._probe)
        finally:
            for hook in hooks:
                hook.remove()
            for m, training in modes:
                m.training = training
        for key, y in found.items():
            watched = self._watched[key]
            if watched.output is not None and watched.output.shape == y.shape:
                watched.output_moved = output_change(watched.output, y)
            watched.output = y

    def _record(self) -> None:
        rows = [w.row() for w in self._watched.values()]
        self._write()
        copies = [values.to("cpu", non_blocking=True) for _, values in rows]
        event = None
        if any(values.is_cuda for _, values in rows):
            event = torch.cuda.Event()
            event.record()
        self._pending = (self._steps, [cells for cells, _ in rows], copies, event)

    def _write(self) -> None:
        """Write the rows that were copied last."""
        if self._pending is None:
            return
        step, makers, copies, event = self._pending
        self._pending = None
        if event is not None:
            event.synchronize()
        for cells, values in zip(makers, copies, strict=True):
            self._csv.writerow([step, *cells(values.tolist())])
        self._file.flush()

    def close(self) -> None:
        """Write what is left, and stop watching. A second call does nothing."""
        if self._file.closed:
            return
        for handle in self._handles:
            handle.remove()
        self._write()
        self._file.close()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def monitor(
    model: nn.Module, path: str | os.PathLike, *, every: int = 10, elements: int = 65536,
    probe: Tensor | tuple[Any, ...] | None = None,
) -> Monitor:  # fmt: skip
    """Write what quantization does to each MXLinear of a model in training to a CSV.

        with mxtrain.monitor(model, "run.csv"):
            train(model, optimizer)

    Then `python -m mxtrain.plot run.csv` draws it. The module's docstring says what is seen when.

    Args:
        model: has at least one MXLinear. One that is converted later is not watched.
        path: of the CSV, which is overwritten.
        every: optimizer steps a row.
        elements: watched of each weight, of X and of dY, at least 256 rows of W^T, X^T and dY^T;
            more sees rarer things, and costs more. 20 bytes each of a weight.
        probe: inputs of the model, on its device; before each row the model runs on them in eval
            mode, and y_change is how far each layer's output has moved.

    Returns:
        A Monitor: a context manager; `close()` it otherwise.

    Raises:
        TypeError, ValueError: for other arguments, or a model without MXLinear.
        OSError: where path cannot be written.
    """
    what = "monitor"
    if not isinstance(model, nn.Module):
        got, advice = type(model).__name__, "Pass the converted model."
        condition = "be a torch.nn.Module"
        raise TypeError(refusal(what, "model", condition, got, show(model), advice))
    for name, value in (("every", every), ("elements", elements)):
        check_int(what, name, value)
        if value < 1:
            condition, advice = "be at least 1", "Leave it out for the default."
            raise ValueError(refusal(what, name, condition, value, kind(value), advice))
    layers = {name: m for name, m in model.named_modules() if isinstance(m, MXLinear)}
    if not layers:
        condition, advice = "have an MXLinear", "Convert it first: mxtrain.convert."
        raise ValueError(refusal(what, "model", condition, "none", "no layers", advice))
    probe = (probe,) if isinstance(probe, Tensor) else probe
    if probe is not None and not isinstance(probe, tuple):
        condition, advice = "be a tensor, a tuple or None", "Pass the model's arguments."
        raise TypeError(refusal(what, "probe", condition, show(probe), kind(probe), advice))
    return Monitor(layers, path, every, elements, model, probe)
