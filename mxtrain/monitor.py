"""monitor(model, "run.csv"): what quantization does to each layer of a run, as a table.

One row for each MXLinear every `every` optimizer steps; COLUMNS says what it holds, and
mxtrain/oscillation.py how each is defined. An empty cell has no value there: a GEMM that is not
quantized, a tensor that was not seen, a rate of no blocks. NaN is a value: something is not finite.

- Weights are watched at every step of the optimizer that holds them, on rows that are evenly spread
  over the weight; the window of a row is the steps since the row before. How a weight moves over
  the grid (w_change to ratio, and the bins) is not watched in int8_block: its grid is as fine as
  the steps are, so that R tells nothing.
- A layer's steps are those of the optimizer that holds its weight, so several optimizers each have
  their own rows. Layers whose weight is frozen go with the one that has stepped most. The steps of
  QRamping.calibrate, which are undone, are not seen.
- X and dY are seen at the last forward and backward before a row, on a sample of the tokens, which
  is copied there and quantized when the row is made, those of layers of one shape together. Under
  torch.compile they are not: the traced code would have to leave the graph.
  `torch.compiler.set_stance("force_eager")` around a step that makes a row shows them.
- The layers have hooks only while the next step makes a row. A graph that is compiled just then is
  compiled once more; one that was compiled before or after runs at every step. A copy of the model,
  pickled or not, is not watched.
- Nothing waits for the device: a row is copied when it is complete, and written with the next one.
- What is watched does not change what is computed: torch's generators are left alone. The probe's
  forward draws the same numbers every time, so that y_change is the weights' doing.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from . import weight_watch
from .checks import check_int, kind, refusal, show
from .formats import FORMATS
from .linear import MXLinear
from .monitor_hooks import BackwardHook, ForwardHook
from .oscillation import (
    RATES,
    RATIO_EDGES,
    quantizer_sums,
    row_sample,
    token_sample,
    weight_quantizer,
)
from .probe import Moves, cuda_devices, named_outputs, probed
from .recipe import Quantizer
from .rows import Row, copied
from .weight_watch import Asked, Plan

QUANTIZERS = ("fprop_x", "fprop_w", "dgrad_dy", "dgrad_w", "wgrad_dy", "wgrad_x")
_WEIGHT = ("w_change", "q_change", "flips", "oscillating", "ratio")

_FALLBACK = ("fallback_rate", "fallback_threshold", "fallback_nonfinite")
_BINS = tuple(f"ratio<{edge:g}" for edge in (*RATIO_EDGES, float("inf")))

COLUMNS = (
    "step", "layer", "recipe", *_WEIGHT, "y_change", *_FALLBACK, *_BINS,
    *(f"{q}.{r}" for q in QUANTIZERS for r in RATES),
)  # fmt: skip
"""step: steps of the layer's optimizer. w_change, q_change: rates of change of W and Q(W), a step.
flips: share of Q(W) that changed, a step. oscillating: share of weights whose R is above 16. ratio:
mean R. y_change: of the layer's output on the probe, since the row before; of the modules that
`outputs` names it is all. fallback_rate: share of
the finite blocks of X, not all zero, that fell back in the last step, over all ranks;
fallback_threshold: what that made of their limit; fallback_nonfinite: share of X's blocks with NaN
or Inf in that step. ratio<E: share of weights with R between the edge before and E. Then for each
quantizer its snr (dB), underflow, clip, confidence and nonfinite."""

_AT = {column: i for i, column in enumerate(COLUMNS)}
_FIELDS = ("fprop_w", "fprop_x", "dgrad_dy"), ("dgrad_w", "wgrad_x", "wgrad_dy")  # turned: by W^T
MOST_HELD = 1 << 28  # elements of X and dY that are kept for rows, half a GiB in BF16


class _Watched:
    """One layer, and what is known of it since the last row."""

    def __init__(self, name: str, layer: MXLinear, elements: int) -> None:
        self.name, self.layer, self.elements = name, layer, elements
        self.rows = row_sample(layer.out_features, layer.in_features, elements)
        self.sums: dict[str, Row] = {}
        self.asked: dict[str, Asked] = {}  # of X and dY, until the row
        self.held: dict[str, int] = {}  # elements of X and of dY that are in `asked`
        self.seen_by: Any = None  # the recipe by which sums and asked are
        self.moves = Moves(layer)
        self.seen: tuple[Any, ...] | None = None  # the view of which `views` has rows
        self.views: dict[Any, tuple[Tensor, Tensor | None]] = {}
        self.hook: RemovableHandle | None = None  # on the layer, for X and dY
        self.steps = 0
        self.trained = False  # an optimizer has stepped it
        self.restart()

    def restart(self) -> None:
        """Watch the weight anew: the recipe has changed."""
        self.recipe = self.layer.recipe
        q = weight_quantizer(self.layer)
        self.watch = None if q is None else weight_watch.WeightWatch(q)

    # ---- the weight ----

    def view(self) -> tuple[Any, ...] | None:
        """Differs where `weight` would not be the views of memory that it was; None: it may."""
        weight, ema = self.layer._parameters.get("weight"), None
        if type(weight) is not nn.Parameter:  # a shard, or made anew at every access
            return None
        if self.layer.ema_active:
            ema = self.layer.weight_ema.data_ptr()
        memory = weight.data_ptr(), weight.shape, weight.stride(), weight.dtype
        return self.watch, memory, ema

    def weight(self, rows: slice) -> tuple[Tensor, Tensor | None]:
        """These rows of the weight, and of what it rounds toward. Of a shard, its own rows."""
        view, key = self.view(), (rows.stop, rows.step)
        if view is None or view != self.seen:
            self.seen, self.views = view, {}
        if key not in self.views:
            self.views[key] = self._viewed(rows)
        return self.views[key]

    def _viewed(self, rows: slice) -> tuple[Tensor, Tensor | None]:
        weight, layer = self.layer.weight.detach(), self.layer
        if hasattr(weight, "to_local"):
            return weight.to_local()[rows], None
        return weight[rows], layer.weight_ema[rows] if layer.ema_active else None

    def stepped(self) -> int:
        """An optimizer step has moved the weight. Returns by how much more is held."""
        self.steps += 1
        if self.layer._recipe is not self.recipe:
            self.restart()
        before = self.holds()
        self.forget_others()
        return self.holds() - before

    def together(self) -> slice:
        """Rows for blocks of W^T, which run along out_features: whole groups of consecutive ones.
        Squares too."""
        return slice(256 * max(1, self.elements // max(self.layer.in_features, 1) // 256))

    def squares(self) -> None:
        """What int8_block does to the weight."""
        for field in ("fprop_w", "dgrad_w"):
            q = getattr(self.layer.recipe, field)
            if q.square:
                self._square(field, q, self.weight(self.together())[0])

    def ask_weight(self) -> None:
        """What the other formats do to it, and to W^T."""
        recipe, again = self.layer._recipe, self.layer._recipe.dgrad_w
        if recipe.fprop_w.format in FORMATS:
            sample = self.weight(self.rows)
            self.asked["fprop_w"] = Asked((self, "fprop_w"), recipe.fprop_w, *sample)
        if again.format in FORMATS:
            w, ema = self.weight(self.together())
            more = (ema, recipe.fprop_w) if again.source == "forward" else ()
            self.asked["dgrad_w"] = Asked((self, "dgrad_w"), again, w, *more)

    # ---- X and dY ----

    def holds(self) -> int:
        return sum(self.held.values())

    def forget_others(self) -> None:
        """What was seen by another recipe."""
        if self.layer._recipe is not self.seen_by:
            self.seen_by = self.layer._recipe
            self.sums, self.asked, self.held = {}, {}, {}

    def saw_x(self, x: Tensor) -> int:
        recipe = self.layer._recipe
        first = recipe.fprop_x if recipe.wgrad_x.source == "forward" else None
        return self._saw(x, ("fprop_x", recipe.fprop_x, None), ("wgrad_x", recipe.wgrad_x, first))

    def saw_dy(self, dy: Tensor) -> int:
        recipe = self.layer._recipe
        return self._saw(
            dy, ("dgrad_dy", recipe.dgrad_dy, None), ("wgrad_dy", recipe.wgrad_dy, None)
        )

    def _saw(self, x: Tensor, *fields: tuple[str, Quantizer, Quantizer | None]) -> int:
        """Keep a sample for the quantizers of these fields, each of which reads what another leaves
        of it, if that is not None. It replaces the one before. Returns by how much more is held."""
        before = self.holds()
        self.forget_others()
        if x.numel() and any(q.format is not None for _, q, _ in fields):
            x = token_sample(x, self.elements)
            for field, q, first in fields:
                if q.square:  # now, by the threshold that the forward had; X^T has the codes of X
                    self._square(field, q, x)
                elif q.format is not None:
                    self.asked[field] = Asked((self, field), q, x, None, first)
                    self.held[fields[0][0]] = x.numel()
        return self.holds() - before

    def _square(self, field: str, q: Quantizer, x: Tensor) -> None:
        if x.numel():
            limit = self.layer.fallback_threshold if q.fallback and self.layer.training else None
            self.sums[field] = Row(quantizer_sums(x, q, threshold=limit)[None], 0)

    def released(self) -> int:
        """All that is asked was taken. Returns how much was held."""
        held, self.held = self.holds(), {}
        return held

    def taken(self, *fields: str) -> list[Asked]:
        """What is asked in these fields, once."""
        return [one for field in fields if (one := self.asked.pop(field, None)) is not None]

    # ---- the row ----

    def row(self, moved: Row | None) -> tuple[Callable[[list[Any]], list[Any]], list[Row]]:
        """A function that makes the cells of its values, and the values, still on the device.
        moved: how the weight moved, as weight_watch.values has it."""
        at = [_AT[f"{field}.{RATES[0]}"] for field in self.sums]
        rows = list(self.sums.values())
        if moved is not None:
            at.append(-1)
            rows.append(moved)
        if output := self.moves.take():
            at.append(_AT["y_change"])
            rows.extend(output)
        rate = self.layer.last_fallback_rate()
        if rate is not None:
            rates = rate, self.layer.fallback_threshold, self.layer.last_nonfinite_rate()
            at.append(_AT[_FALLBACK[0]])
            rows.append(Row(torch.cat([t.reshape(1) for t in rates]).double()[None], 0))
        self.sums = {}
        return _cells_of(self.name, self.layer.recipe.name, at), rows


def _cells_of(name: str, recipe: str, at: list[int]) -> Callable[[list[Any]], list[Any]]:
    """What makes a row, but for its step, of values that start in these columns; -1: of the weight,
    in two places."""

    def cells(values: list[list[float]]) -> list[Any]:
        found: list[Any] = [""] * len(COLUMNS)
        found[_AT["layer"]], found[_AT["recipe"]] = name, recipe

        def put(start: int, values: list[Any]) -> None:
            found[start : start + len(values)] = values

        for start, some in zip(at, values, strict=True):
            if start < 0:
                put(_AT[_WEIGHT[0]], some[: len(_WEIGHT)])
                put(_AT[_BINS[0]], some[len(_WEIGHT) :])
            elif start == _AT[_FALLBACK[0]]:  # NaN: no block was counted
                put(start, ["" if math.isnan(v) else v for v in some])
            else:
                put(start, some)
        return found[1:]

    return cells


class Monitor:
    """Watches a model's MXLinear and writes a CSV. `monitor` makes one; use it with `with`."""

    def __init__(
        self, layers: dict[str, MXLinear], path: str | os.PathLike, every: int, elements: int,
        model: nn.Module, probe: tuple[Any, ...] | None, outputs: dict[str, Moves],
    ) -> None:  # fmt: skip
        self.every, self.path = every, path
        self._model, self._probe, self._outputs = model, probe, outputs
        self._watched = {id(m): _Watched(name, m, elements) for name, m in layers.items()}
        self._lead = 0  # steps of the layer that has made most
        self._held = 0  # elements, of all layers
        self._pending: list[tuple[Any, ...]] = []
        self._plans: dict[int, tuple[list[Any], Plan]] = {}  # by the first layer's id
        self._devices = cuda_devices(model, probe)
        self._run_probe(list(self._watched.values()))  # it may raise: nothing is open or hooked yet
        self._file = open(path, "w", newline="")  # noqa: SIM115 - close() closes it
        self._csv = csv.writer(self._file)
        self._csv.writerow(COLUMNS)
        self._handle = register_optimizer_step_post_hook(torch.compiler.disable(self._stepped))
        self._listen(self._watched.values())

    # ---- hooks ----

    def _listen(self, watched: Iterable[_Watched]) -> None:
        """Have hooks on the layers whose next step makes a row, and on no others: torch.compile
        checks every hook that it saw when it traced, at each call."""
        for w in watched:
            due = (w.steps + 1) % self.every == 0
            if due and w.hook is None:
                w.hook = w.layer.register_forward_hook(ForwardHook(self))
            elif not due and w.hook is not None:
                w.hook.remove()
                w.hook = None

    def saw_forward(self, layer: nn.Module, args: tuple[Any, ...], y: Any) -> None:
        watched = self._watched.get(id(layer))
        if watched is None or not args or not layer.training:
            return
        if (watched.steps + 1) % self.every != 0:
            return
        self._hold(watched.saw_x(args[0]))
        if isinstance(y, Tensor) and y.requires_grad:
            y.register_hook(BackwardHook(self, id(layer)))

    def saw_backward(self, layer: int, dy: Tensor) -> None:
        watched = self._watched.get(layer)  # none once it is closed
        if watched is not None:
            self._hold(watched.saw_dy(dy))

    def _stepped(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """After a step of an optimizer that holds one of the weights."""
        if getattr(optimizer, "_calibrating", False):
            return
        params = {id(p) for group in optimizer.param_groups for p in group["params"]}
        held = []
        for w in self._watched.values():
            weight = w.layer._parameters.get("weight")  # quicker than the attribute
            weight = w.layer.weight if weight is None else weight
            if id(weight) in params:
                w.trained |= weight.requires_grad
                held.append(w)
        moved = [w for w in held if w.trained] or held
        if moved:
            self._advance(moved)

    def step(self) -> None:
        """One step has moved the weights. Only for optimizers that hold copies of them."""
        if self._file.closed:
            advice = "Make another monitor."
            message = refusal("Monitor.step", "monitor", "be open", "closed", self.path, advice)
            raise RuntimeError(message)
        self._advance(list(self._watched.values()))

    @torch.no_grad()
    def _advance(self, moved: list[_Watched]) -> None:
        for w in moved:
            self._held += w.stepped()
        most = max(w.steps for w in moved)
        if most > self._lead:
            self._lead = most
            if len(moved) < len(self._watched):
                moved = self._with_frozen(moved)
        self._watch([w for w in moved if w.watch is not None])
        due = [w for w in moved if w.steps % self.every == 0]
        if due:
            self._run_probe(due)
            self._record(due)
        self._listen(moved)

    def _with_frozen(self, moved: list[_Watched]) -> list[_Watched]:
        """And the layers that go with the ones that have stepped most."""
        known = set(moved)
        for w in self._watched.values():
            if not (w in known or w.trained or w.layer.weight.requires_grad):
                self._held += w.stepped()
                known.add(w)
        return [w for w in self._watched.values() if w in known]

    def _watch(self, moved: list[_Watched]) -> None:
        """See the weights as they are now. Their views are made anew only where one is another."""
        if not moved:
            return
        views = [w.view() for w in moved]
        known, plan = self._plans.get(id(moved[0]), (None, None))
        if plan is None or known != views or not plan.holds():
            plan = Plan((w.watch, *w.weight(w.rows)) for w in moved)
            if None not in views:
                self._plans[id(moved[0])] = views, plan
        plan.update()

    # ---- rows ----

    @torch.no_grad()
    def _run_probe(self, watched: list[_Watched]) -> None:
        if self._probe is None:
            return
        moves = [w.moves for w in watched] + list(self._outputs_of(watched).values())
        found = probed(self._model, self._probe, (m.module for m in moves), self._devices)
        for one in moves:
            if id(one.module) in found:
                one.see(found[id(one.module)])

    def _outputs_of(self, watched: list[_Watched]) -> dict[str, Moves]:
        """Those that have a row with these layers': all, where one has stepped most."""
        return self._outputs if any(w.steps == self._lead for w in watched) else {}

    def _hold(self, elements: int) -> None:
        """So many more wait for their row, unless they are too many."""
        self._held += elements
        if self._held > MOST_HELD:
            self._settle(self._watched.values())

    def _settle(self, watched: Collection[_Watched]) -> None:
        """Quantize what is asked, that of one shape together."""
        for turned, fields in enumerate(_FIELDS):
            asked = [one for w in watched for one in w.taken(*fields)]
            for (w, field), row in weight_watch.sums(asked, bool(turned)).items():
                w.sums[field] = row
        self._held -= sum(w.released() for w in watched)

    def _record(self, due: list[_Watched]) -> None:
        for w in due:
            w.squares()
            w.ask_weight()
        self._settle(due)
        moved = weight_watch.values([w.watch for w in due if w.watch is not None])
        rows = [w.row(moved.get(id(w.watch))) for w in due]
        steps = [w.steps for w in due]
        for name, moves in self._outputs_of(due).items():
            values = moves.take()
            rows.append((_cells_of(name, "", [_AT["y_change"]] * len(values)), values))
            steps.append(self._lead)
        self._write(before=self._lead)
        makers = [(step, cells) for step, (cells, _) in zip(steps, rows, strict=True)]
        self._pending.append((self._lead, makers, copied([some for _, some in rows])))

    def _write(self, before: float = math.inf) -> None:
        """Write the rows that were copied before that step of the leading layer."""
        while self._pending and self._pending[0][0] < before:
            _, makers, arrived = self._pending.pop(0)
            for (step, cells), values in zip(makers, arrived(), strict=True):
                self._csv.writerow([step, *cells(values)])
            self._file.flush()

    def close(self) -> None:
        """Write what is left, and stop watching. A second call does nothing."""
        if self._file.closed:
            return
        self._handle.remove()
        for w in self._watched.values():
            if w.hook is not None:
                w.hook.remove()
        try:
            self._write()
        finally:
            self._file.close()
            self._plans.clear()  # they hold the weights' memory
            self._watched.clear()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def monitor(
    model: nn.Module, path: str | os.PathLike, *, every: int = 10, elements: int = 65536,
    probe: Tensor | tuple[Any, ...] | None = None, outputs: Iterable[str] = (),
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
        outputs: names of other modules, as the model's blocks, whose outputs on the probe are
            followed too: a row each, with a layer and a y_change.

    Returns:
        A Monitor: a context manager; `close()` it otherwise.

    Raises:
        TypeError, ValueError: for other arguments, or a model without MXLinear.
        OSError: where path cannot be written. What the model raises for the probe is passed on.
            A file that is there is then as it was.
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
    if not isinstance(path, (str, os.PathLike)):
        condition, advice = "be a path", "Pass a file name."
        raise TypeError(refusal(what, "path", condition, show(path), kind(path), advice))
    layers = {name: m for name, m in model.named_modules() if isinstance(m, MXLinear)}
    if not layers:
        condition, advice = "have an MXLinear", "Convert it first: mxtrain.convert."
        raise ValueError(refusal(what, "model", condition, "none", "no layers", advice))
    probe = (probe,) if isinstance(probe, Tensor) else probe
    if probe is not None and not isinstance(probe, tuple):
        condition, advice = "be a tensor, a tuple or None", "Pass the model's arguments."
        raise TypeError(refusal(what, "probe", condition, show(probe), kind(probe), advice))
    followed = named_outputs(what, model, outputs, probe)
    return Monitor(layers, path, every, elements, model, probe, followed)
