"""The Llama-like example: its model, its outliers, and what a block of it keeps for backward."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mxtrain
from mxtrain.recipe import RECIPES, Fallback

for package in ("matplotlib", "sklearn", "tqdm"):
    pytest.importorskip(package, reason="the examples extra is not installed")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import harness  # noqa: E402
import llama  # noqa: E402
from train_gpt import PythonSource  # noqa: E402

pytestmark = pytest.mark.ops(
    "int8_quantize", "int8_quantize_fallback", "int8_gemm", "rms_norm_forward", "swiglu_forward"
)
BF16 = torch.bfloat16
SIZES = "--batch 32 --dim 32 --depth 1 --heads 2 --context 32 --megabytes 0.5"
SMALL = f"--arch llama --steps 4 --eval-every 2 --device cpu --threads 1 {SIZES}".split()
FALLBACK = RECIPES["int8_fallback"]
TIGHT = FALLBACK.replace(name="tight", fallback=Fallback(capacity=0.3))
DENSE = FALLBACK.replace(name="dense", fallback=Fallback(capacity=None))


# ---- the model ----


def block(dim=256, heads=4, context=256, outliers="none"):
    torch.manual_seed(0)
    made = llama.LlamaBlock(dim, heads, context, outliers)
    if made.outliers is not None:
        made.outliers.prepare(made.down)
    return made


def test_positions_are_relative():
    """A turned query and a turned key meet as their distance says."""
    b = block(64, 1, 32)
    q, k = torch.randn(1, 1, 1, 64), torch.randn(1, 1, 1, 64)
    scores = b.turned(q.expand(1, 1, 32, 64))[0, 0] @ b.turned(k.expand(1, 1, 32, 64))[0, 0].T
    for distance in (0, 1, 7):
        line = scores.diagonal(-distance)
        assert torch.allclose(line, line[:1].expand_as(line), atol=1e-4)
    assert scores[0, 0] == pytest.approx(float((q * k).sum()), rel=1e-5)


def test_a_model_is_causal_and_learns():
    torch.manual_seed(0)
    model = llama.Llama(64, 2, 2, 16)
    assert not any(p.ndim == 1 and "norm" not in n for n, p in model.named_parameters())
    text = torch.randint(0, 256, (2, 16))
    changed = text.clone()
    changed[:, 9:] = 0
    assert torch.allclose(model(text)[:, :9], model(changed)[:, :9], atol=1e-5)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(8):
        loss = F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("kind", ["channel", "isolated"])
def test_outliers_leave_the_function_alone(kind):
    x = torch.randn(2, 256, 256, requires_grad=True)
    plain, other = block(), block(outliers=kind)
    h = other.outliers(plain.act(plain.gate_up(plain.mlp_norm(x))))
    assert h.abs().max() >= 1000 and (h.abs() > 500).float().mean() < 0.01
    want = plain(x)
    if kind == "isolated":  # the places' own contribution is gone
        with torch.no_grad():
            plain.down.weight[:, llama.CHANNEL :: llama.EVERY] = 0
        want = plain(x)
        assert ((h.detach() == llama.SIZE).sum(1) <= 1).all()
    y = other(x)
    assert torch.allclose(y, want, atol=1e-4)
    y.square().sum().backward()
    frozen = other.outliers.scale != 1
    assert frozen.any() and not other.down.weight.grad[:, frozen].any()
    assert other.down.weight.grad[:, ~frozen].any()
    assert not any("outliers" in name for name in other.state_dict())


def test_contexts_are_compressed_where_the_recipe_is_int8():
    model = llama.Llama(128, 1, 2, 16)
    layers = [m for m in model.modules() if hasattr(m, "compress")]
    assert len(layers) == 3 and not any(m.compress for m in layers)
    for recipe, on in (("tetrajet", False), ("int8_fallback", True)):
        mxtrain.convert(model, recipe)
        llama.compress_contexts(model)
        assert [m.compress for m in layers] == [on] * 3


# ---- memory ----


class FusedNorm(torch.autograd.Function):
    """What torch's RMSNorm keeps where it is one kernel: its input."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return F.rms_norm(x, x.shape[-1:], weight, 1e-6)

    @staticmethod
    def backward(ctx, dy):
        raise NotImplementedError


def kept_by(recipes, dim=256, tokens=1280):
    """Bytes an element of x that autograd keeps of a block: activations alone, without those of
    the attention product (q, k, v, its output o and the log-sums of its rows).
    """
    b = block(dim, 4, tokens).to(BF16)
    if recipes is None:
        for norm in (b.attn_norm, b.mlp_norm):
            norm.forward = lambda x, norm=norm: FusedNorm.apply(x, norm.weight)
    else:
        mxtrain.convert(b, recipes, include="*" if isinstance(recipes, mxtrain.Recipe) else None)
        llama.compress_contexts(b)
    x = torch.randn(1, tokens, dim).to(BF16).requires_grad_()
    b(x)  # makes the thresholds and the packed weights
    parameters = [*b.parameters(), *b.buffers()]
    left_out = {t.untyped_storage().data_ptr() for t in parameters}
    kept = {}

    def pack(t):
        # Of the attention product: [N, heads, T, head] and [N, heads, T].
        name = "attention" if t.dim() >= 3 and t.shape[1:3] == (b.heads, tokens) else "rest"
        place = t.untyped_storage().data_ptr()
        if place not in left_out:
            kept[place] = min(name, kept.get(place, (name,))[0]), t  # the output is proj's input
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        b(x)
    rest = [t for name, t in kept.values() if name == "rest" and tokens in t.shape]
    packed = [t for _, t in kept.values() if t.dtype == torch.int8 and t.shape[1:] == (128, 128)]
    return sum(t.untyped_storage().nbytes() for t in [*rest, *packed]) / x.numel()


def test_a_block_keeps_a_third_less():
    """Of what torch keeps of the same block in bfloat16.

    With f = 3 d (8/3, rounded) torch keeps 32 d bytes a token: 4 d for the norms, 4 d for the
    inputs of qkv and gate_up, 2 f each for gate, up, silu(gate) and h. (A compiler may make
    silu(gate) again: 26 d, which is the tally of the method.)
    """
    bf16 = kept_by(None)
    assert bf16 == pytest.approx(32, abs=0.1)
    recipes = (RECIPES["int8_block"], TIGHT, FALLBACK, DENSE)
    plain, tight, default, dense = map(kept_by, recipes)
    assert plain < tight < default < dense < bf16 * 0.7
    assert default <= bf16 * 0.61 and plain <= bf16 * 0.52
    # 1.28 each for the norms, gate and up; 1 + capacity for the input of each layer
    for share, got in ((0.3, tight), (0.5, default), (1.0, dense)):
        assert got == pytest.approx(8 * 1.28 + 6 * (1 + share), abs=0.1)
    # Two thirds of what a compiler leaves, too, where only the gated MLP falls back:
    rest = ((n, "int8_block") for n in ("qkv", "proj", "gate_up"))
    assert kept_by([("down", TIGHT), *rest]) <= 26 * 2 / 3


# ---- the program ----


@pytest.mark.parametrize("outliers", llama.OUTLIERS)
def test_the_example_runs(outliers, tmp_path, capsys):
    recipes = ["bf16", "tetrajet", "int8_block", "int8_fallback"]
    options = [*SMALL, "--outliers", outliers, "--recipe", *recipes, "--out", str(tmp_path)]
    assert harness.main(PythonSource(), options) == 0
    out = capsys.readouterr().out
    assert all(f"\n{recipe} " in out for recipe in recipes)
    assert (tmp_path / "log.csv").read_text().count("int8_fallback") == 2


@pytest.mark.parametrize(
    "options, message",
    [
        (["--arch", "rnn"], "--arch must be gpt or llama, got rnn"),
        (["--outliers", "many"], "--outliers must be none, or with --arch llama channel or"),
        (["--arch", "gpt", "--outliers", "channel"], "--outliers must be none, or with --arch"),
        (["--dim", "6"], "--dim must be an even multiple of --heads, got 6"),
    ],
)
def test_refused_options(options, message, tmp_path, capsys):
    assert harness.main(PythonSource(), [*SMALL, *options, "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"train_gpt: {message}")


def test_compiled_blocks_give_the_same_bytes():
    """Fullgraph, with every part of the method on."""
    square = mxtrain.Quantizer("int8_block")
    recipe = FALLBACK.replace(dgrad_dy=square, wgrad_dy=square)
    results = []
    for compiled in (False, True):
        b = block(128, 2, 64, "channel")
        mxtrain.convert(b, recipe, include="*")
        llama.compress_contexts(b)
        x = torch.randn(2, 64, 128, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with torch.autocast("cpu", BF16):
            b(x)
            y = (torch.compile(b, fullgraph=True, backend="aot_eager") if compiled else b)(x)
        y.float().square().sum().backward()
        results.append([y.detach(), x.grad, *(p.grad for p in b.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert isinstance(b.down, mxtrain.MXLinear) and isinstance(b.attn_norm, nn.RMSNorm)
