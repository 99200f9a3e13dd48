"""The rows of the results table, as data: which recipe, optimizer and schedule, on which task.

A row is trained from several seeds; `ROWS` holds all by name and `PLANS` says which runs belong
together, the most wanted first. A new row is one more entry, or a `Row` that another module adds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

from mxtrain import Mix, Quantizer, Recipe, get_mix
from mxtrain.recipe import RECIPES

# Options of the tasks, as their scripts take them. The GPT has 25.7 million parameters; 1224 steps
# of 128 windows of 512 bytes are 80.2 million.
GPT = (
    "--text packages --megabytes 200 --windows 1024 --context 512 --batch 128 --steps 1224 "
    "--eval-every 102 --dim 512 --depth 8 --heads 8 --lr 1e-3 --compile"
)
# The Llama-like model has 26.0 million.
LLAMA = f"{GPT} --arch llama"
DIGITS = "--augment deit --steps 600 --eval-every 60"
MNIST = (
    "--data mnist5k --augment deit --batch 128 --steps 1000 --eval-every 100 --dim 128 --depth 6 "
    "--heads 4 --lr 1e-3"
)


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: "task/row".
        recipe: what convert takes; None where the package no longer has what it was trained with.
        script: the module of examples/ with the task, and its class.
        options: of the script, as on its command line.
        optimizer: "adamw", or "qramping", calibrated at the start of each quarter of the run.
        tail: the last share of the steps, which runs in BF16 (mxtrain.TargetPrecision).
        watch: whether the oscillation of weights is measured, in the middle and at the end.
        group: the table of the task that it is in.
    """

    name: str
    recipe: str | Recipe | Mix | None
    script: tuple[str, str] = ("train_gpt", "PythonSource")
    options: str = GPT
    optimizer: str = "adamw"
    tail: float = 0.0
    watch: bool = False
    group: str = "main"

    @property
    def task(self) -> str:
        return self.name.split("/")[0]

    @property
    def baseline(self) -> str:
        """The row that its gap is measured to."""
        return f"{self.task}/bf16"


ROWS: dict[str, Row] = {}
PLANS: dict[str, list[str]] = {}  # runs: "row@seed"


def add(row: Row) -> str:
    ROWS[row.name] = row
    return row.name


def runs(rows: Iterable[str], seeds: Iterable[int]) -> list[str]:
    return [f"{row}@{seed}" for seed in seeds for row in rows]


# ---- the published recipes ----

_MIXED = get_mix("fp4_mixed").where(attention=["*.qkv", "*.proj"])
_EMA = RECIPES["tetrajet_ema"]

MAIN = [
    add(Row("gpt/bf16", "bf16")),
    add(Row("gpt/tetrajet", "tetrajet", watch=True)),
    add(Row("gpt/tetrajet_ema", "tetrajet_ema", watch=True)),
    add(Row("gpt/mxfp4_baseline", "mxfp4_baseline", watch=True)),
    add(Row("gpt/mxfp4_backward", "mxfp4_backward")),
    add(Row("gpt/tetrajet_qramping", "tetrajet", optimizer="qramping", watch=True)),
    add(Row("gpt/fp4_mixed", _MIXED)),
    add(Row("gpt/fp4_mixed_tail", _MIXED, tail=0.1)),
    add(Row("gpt/mxfp4_backward_plain", "mxfp4_backward_plain")),
    add(Row("gpt/mxfp4_backward_rht", "mxfp4_backward_rht")),
    add(Row("gpt/mxfp4_backward_sr", "mxfp4_backward_sr")),
    add(Row("gpt/mxfp4_hadamard", "mxfp4_hadamard")),
    add(Row("gpt/nvfp4", "nvfp4")),
    add(Row("gpt/nvfp4_rht", "nvfp4_rht")),
    add(Row("gpt/quartet", "quartet")),
    add(Row("gpt/mxfp8", "mxfp8")),
]

# ---- Q-EMA: how many steps its average may remember, and from when it acts ----


def _ema(name: str, task: str = "gpt", options: str = GPT, **changes: object) -> str:
    changes = {"ema_at_half": None, **changes}
    recipe = _EMA.replace(name=name, **changes)
    return add(Row(f"{task}/{name}", recipe, options=options, watch=True, group="ema"))


def _ema_share(share: float, task: str = "gpt", options: str = GPT) -> str:
    """`tetrajet_ema` with the bound that it had first: share (t - 1) (peak / lr - 1) steps."""
    row = Row(f"{task}/ema_share_{share:g}", None, options=options, watch=True, group="ema")
    return add(row)


# The recipe `tetrajet_ema` has ema_at_half = 0.03.
_AT_HALF = (0.01, 0.1, 0.3)
EMA = [
    *(_ema(f"ema_at_half_{steps:g}", ema_at_half=steps) for steps in _AT_HALF),
    _ema("ema_0.9_late", ema_beta=0.9, ema_warmup=1224 * 9 // 10),
    _ema("ema_0.998"),  # the paper's, for 100 times the steps
]
# Trained once and found to harm (docs/results.md): in no plan, but the report knows them.
HARMFUL_EMA = [
    _ema("ema_of_10%", ema_fraction=0.1),
    _ema("ema_of_3%", ema_fraction=0.03),
    _ema("ema_of_1%", ema_fraction=0.01),
    _ema("ema_0.97", ema_beta=0.97),
    _ema_share(0.0005),
]
# The same on a CPU, on a small model in runs of several lengths: seconds to minutes each.
SMALL_GPT = (
    "--text library --megabytes 3 --windows 512 --context 32 --batch 16 --dim 64 --depth 2 "
    "--heads 2"
)


def _small_ema(steps: int, lr: float) -> list[str]:
    """Rows of a run of that many steps."""
    task = f"small_{steps}" if lr == 2e-3 else f"small_{steps}_lr_{lr:g}"
    options = f"{SMALL_GPT} --steps {steps} --eval-every {steps // 3} --lr {lr:g}"
    names = [add(Row(f"{task}/bf16", "bf16", options=options, group="ema"))]
    for name in ("tetrajet", "tetrajet_ema"):
        names.append(add(Row(f"{task}/{name}", name, options=options, watch=True, group="ema")))
    ema = partial(_ema, task=task, options=options)
    for share in (0.0005, 0.001, 0.004):
        _ema_share(share, task, options)
    return [
        *names,
        ema("ema_0.998"),
        *(ema(f"ema_at_half_{bound:g}", ema_at_half=bound) for bound in _AT_HALF),
        ema("ema_0.9_late", ema_beta=0.9, ema_warmup=steps * 9 // 10),
    ]


SMALL_EMA = {
    (steps, lr): _small_ema(steps, lr)
    for steps, lr in ((150, 2e-3), (600, 2e-3), (600, 5e-4), (1500, 2e-3))
}

# ---- candidates for the 4-bit recipe with the smallest gap ----

_TETRAJET = RECIPES["tetrajet"]
_CEIL = Quantizer("mxfp4", "ceil")
_EVEN = Quantizer("mxfp4", "even")
_CEIL_SR = Quantizer("mxfp4", "ceil", "stochastic")
_NV = Quantizer("nvfp4", "even")
_NV_SR = Quantizer("nvfp4", "even", "stochastic")


def _rotated(q: Quantizer, g: int, signs: str = "none") -> Quantizer:
    return dataclasses.replace(q, hadamard=g, signs=signs)


def _backward(dy: Quantizer, other: Quantizer) -> dict[str, Quantizer]:
    """dY by one quantizer, W and X by the other, from the originals."""
    return {"dgrad_dy": dy, "wgrad_dy": dy, "dgrad_w": other, "wgrad_x": other}


# Unbiased where it matters: gradients are rounded stochastically, W and X to nearest, and both are
# rotated by signs that are drawn anew. Or all to nearest, with half the noise: the rotation leaves
# a shrinkage of one or two hundredths.
_RHT, _NV_RHT = _rotated(_CEIL, 64, "drawn"), _rotated(_NV, 16, "drawn")
_RHT_DY = _backward(_rotated(_CEIL_SR, 64, "drawn"), _RHT)
_NV_RHT_DY = _backward(_rotated(_NV_SR, 16, "drawn"), _NV_RHT)
_RHT_NEAR, _NV_RHT_NEAR = _backward(_RHT, _RHT), _backward(_NV_RHT, _NV_RHT)
_H128, _NV_H16 = _rotated(_CEIL, 128), _rotated(_NV, 16)


def _backward_of(recipe: str) -> dict[str, Quantizer]:
    names = ("dgrad_dy", "dgrad_w", "wgrad_dy", "wgrad_x")
    return {name: getattr(RECIPES[recipe], name) for name in names}


def _forward(q: Quantizer) -> dict[str, Quantizer]:
    return {"fprop_x": q, "fprop_w": q}


def _candidate(name: str, **quantizers: Quantizer) -> str:
    return add(Row(f"gpt/{name}", Recipe(name, **quantizers), group="candidates"))


# One half quantized at a time: what each costs.
HALVES = [
    _candidate("only_forward_ceil", **_forward(_CEIL)),
    _candidate("only_forward_h128", **_forward(_H128)),
    _candidate("only_forward_nv_h16", **_forward(_NV_H16)),
    _candidate("only_backward_rht_dy", **_RHT_DY),
    _candidate("only_backward_rht_near", **_RHT_NEAR),
    _candidate("only_forward_nv", **_forward(_NV)),
    _candidate("only_forward_h32", **_forward(_rotated(_CEIL, 32))),
    _candidate("only_forward_even", **_forward(_EVEN)),
    _candidate("only_backward_nv_rht_dy", **_NV_RHT_DY),
]
_NV_SR_AGAIN = dataclasses.replace(_NV_SR, source="forward")
WHOLE = [
    _candidate("h128+rht_dy", **_forward(_H128), **_RHT_DY),
    _candidate("nv+rht_dy", **_forward(_NV), **_RHT_DY),  # the recipe nvfp4_rht
    _candidate("nv_h16+nv_rht_dy", **_forward(_NV_H16), **_NV_RHT_DY),
    _candidate("h128+rht_near", **_forward(_H128), **_RHT_NEAR),
    _candidate("nv_h16+nv_rht_near", **_forward(_NV_H16), **_NV_RHT_NEAR),
    _candidate("ceil+rht_dy", **_forward(_CEIL), **_RHT_DY),
    _candidate("nv_h16+rht_dy", **_forward(_NV_H16), **_RHT_DY),
    _candidate("nv+double", **_forward(_NV), **_backward(_NV_SR, _NV_SR_AGAIN)),
    _candidate("even+rht_dy", **_forward(_EVEN), **_RHT_DY),
    _candidate("ceil+rht", **_forward(_CEIL), **_backward_of("mxfp4_backward")),
    _candidate("nv_h16+nvidia", **_forward(_NV_H16), **_backward_of("nvfp4")),
]

# ---- images ----

_VIT = ("bf16", "mxfp4_baseline", "tetrajet", "tetrajet_ema", "tetrajet_qramping", "mxfp4_backward")


def _vit(task: str, options: str) -> list[str]:
    script = ("train_vit", "ImageClasses")
    names = []
    for name in _VIT:
        recipe, optimizer = (name, "adamw")
        if name == "tetrajet_qramping":
            recipe, optimizer = "tetrajet", "qramping"
        watch = "tetrajet" in name
        names.append(add(Row(f"{task}/{name}", recipe, script, options, optimizer, watch=watch)))
    return names


VIT = [*_vit("mnist5k", MNIST), *_vit("digits", DIGITS)]

# ---- a GLU model in INT8, as it is and with outliers in what its `down` layers multiply ----


def _llama(task: str, outliers: str) -> list[str]:
    options = f"{LLAMA} --outliers {outliers}"
    names = ("bf16", "int8_block", "int8_fallback")
    return [add(Row(f"{task}/{name}", name, options=options)) for name in names]


LLAMAS = [
    *_llama("llama", "none"),
    *_llama("llama_channel", "channel"),
    *_llama("llama_isolated", "isolated"),
]

# ---- plans ----

_FIRST = [*MAIN[:5], *EMA[:4], *HALVES[:5], *WHOLE[:5], MAIN[5], EMA[4], *WHOLE[5:], *MAIN[6:9],
          *HALVES[5:], *MAIN[9:]]  # fmt: skip
PLANS["explore"] = runs(_FIRST, [0])
PLANS["main"] = runs(MAIN, [0, 1, 2])
PLANS["ema"] = runs([*MAIN[:3], *EMA], [0, 1, 2])
PLANS["small_ema"] = [run for rows in SMALL_EMA.values() for run in runs(rows, [0, 1, 2])]
PLANS["vit"] = runs(VIT, [0, 1, 2])
PLANS["llama"] = runs(LLAMAS, [0, 1, 2])
# Rows that the report sets beside each other, the second of which is the base.
COMPARED = [
    ("gpt/nvfp4_rht", "gpt/tetrajet"), ("gpt/mxfp4_backward", "gpt/mxfp4_backward_rht"),
    ("gpt/fp4_mixed_tail", "gpt/fp4_mixed"), ("gpt/tetrajet_ema", "gpt/tetrajet"),
]  # fmt: skip
# One seed of three rows: to repeat the table by.
DETERMINISTIC = {"repeat"}  # plans whose runs are made with --deterministic
PLANS["repeat"] = runs(["gpt/bf16", "gpt/tetrajet", "gpt/mxfp4_backward"], [0])
