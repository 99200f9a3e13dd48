"""The Llama-like example: its model, its outliers, and what a block of it keeps for backward."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mxtrain
from bench.context import saved_bytes
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
    llama.compress_contexts(model)  # not converted
    for recipe, on in (("tetrajet", False), ("int8_fallback", True), ("tetrajet", False)):
        mxtrain.convert(model, recipe)
        for layer in model.blocks[0].children():
            if isinstance(layer, mxtrain.MXLinear):
                layer.recipe = recipe
        llama.compress_contexts(model)
        assert [m.compress for m in layers] == [on] * 3
        keeping = [n for n, m in model.named_modules() if getattr(m, "keep_input", False)]
        assert keeping == (["blocks.0.proj"] if on else [])


# ---- memory ----


class FusedNorm(torch.autograd.Function):
    """What torch's RMSNorm keeps where it is one kernel: its input, and a float32 a row."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, x.float().square().mean(-1))
        return F.rms_norm(x, x.shape[-1:], weight, 1e-6)

    @staticmethod
    def backward(ctx, dy):
        raise NotImplementedError


def kept_by(recipes, dim=256, heads=4, tokens=1280):
    """Bytes a token that autograd keeps of a block, all but parameters and buffers."""
    b = block(dim, heads, tokens).to(BF16)
    if recipes is None:
        for norm in (b.attn_norm, b.mlp_norm):
            norm.forward = lambda x, norm=norm: FusedNorm.apply(x, norm.weight)
    else:
        mxtrain.convert(b, recipes, include="*" if isinstance(recipes, mxtrain.Recipe) else None)
        llama.compress_contexts(b)
    x = torch.randn(1, tokens, dim).to(BF16).requires_grad_()
    b(x)  # makes the thresholds and the packed weights
    return saved_bytes(b, x) / tokens


def attention_tally(dim, heads):
    """q, k, v and the output, which is also what proj keeps; the log-sums of the rows."""
    return 4 * 2 * dim + 4 * heads


def bf16_tally(dim, heads, hidden):
    """Both norms' inputs, of qkv and of gate_up; gate, up, silu(gate) and h."""
    return attention_tally(dim, heads) + 2 * (2 * dim + 4) + 2 * 2 * dim + 4 * 2 * hidden


def int8_tally(dim, heads, hidden, share, share_of_mlp=None):
    """10 bits and a scale of 128 for the norms, gate and up; 1 + share for what a layer gets."""
    context, share_of_mlp = 1.25 + 4 / 128, share if share_of_mlp is None else share_of_mlp
    norms, mlp = 2 * (context * dim + 4), (2 * context + 1 + share_of_mlp) * hidden
    return attention_tally(dim, heads) + norms + 2 * (1 + share) * dim + mlp


# Of the bench row block/llama/.../4x2048x4096.
WIDE = 4096, 32, llama.hidden_size(4096)


def test_a_block_keeps_a_third_less():
    """Of what torch keeps of the same block in bfloat16, attention's q, k, v and o in both.

    Counted here in a small block, whose hidden size is 3 of its width; the same sums for that of
    the bench's rows, where it is 8/3.
    """
    small = 256, 4, llama.hidden_size(256)
    bf16 = kept_by(None)
    assert bf16 == pytest.approx(bf16_tally(*small), rel=1e-3)
    recipes = {0.0: RECIPES["int8_block"], 0.3: TIGHT, 0.4: FALLBACK, 1.0: DENSE}
    for share, recipe in recipes.items():
        got = kept_by(recipe)
        assert got == pytest.approx(int8_tally(*small, share), rel=2e-3), share
        assert got <= bf16 * (2 / 3 if share < 1 else 3 / 4)
        assert int8_tally(*WIDE, share) <= bf16_tally(*WIDE) * (0.65 if share < 1 else 0.73)
    # What docs/performance.md says of 8192 tokens, in MB:
    tallies = [bf16_tally(*WIDE), *(int8_tally(*WIDE, share) for share in (0.4, 1, 0))]
    assert [round(8192 * t / 1e6) for t in tallies] == [1259, 807, 901, 744]


def test_without_attention_and_silu():
    """A compiler may make silu(gate) again, which the tally of the method takes for granted. It
    leaves attention out. A third less than that, too, where only the gated MLP falls back."""
    rest = ((n, "int8_block") for n in ("qkv", "proj", "gate_up"))
    sizes, got = (256, 4, llama.hidden_size(256)), kept_by([("down", TIGHT), *rest])
    assert got == pytest.approx(int8_tally(*sizes, 0, 0.3), rel=2e-3)
    for dim, heads, hidden in (sizes, WIDE):
        bf16 = bf16_tally(dim, heads, hidden) - 2 * hidden - attention_tally(dim, heads)
        ours = int8_tally(dim, heads, hidden, 0, 0.3) - attention_tally(dim, heads)
        assert ours <= bf16 * 2 / 3


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
