"""RMSNorm and SwiGLU with int10_group contexts: bytes, errors, gradients, and what torch asks."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from common import FLOATS, all_bfloat16, assert_same_bytes, refuses
from torch import nn
from torch.utils.checkpoint import checkpoint

import mxtrain
from mxtrain import reference
from mxtrain.nn import RMSNorm, SwiGLU, rms_norm, swiglu

OPS = ("rms_norm_forward", "rms_norm_backward", "swiglu_forward", "swiglu_backward")
pytestmark = pytest.mark.ops(*OPS)
ops = torch.ops.mxtrain
BF16 = torch.bfloat16
# Rows of less than a group, of one, ragged ones, and the longest; runs of 32 rows, strips of 256.
SHAPES = [
    (1, 1),
    (3, 7),
    (5, 128),
    (33, 200),
    (70, 384),
    (300, 136),
    (34, 4096),
    (2, 4100),
    (1, 16384),
]


def error(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def numbers(shape, dtype, seed=0):
    """Rows and columns of many magnitudes."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.exp2(4 * torch.randn(shape[0], 1, generator=g))
    columns = torch.exp2(torch.randn(shape[1], generator=g))
    return (torch.randn(shape, generator=g) * rows * columns).to(dtype)


def assert_same(got, want, what):
    """Same bytes; of NaN only where they are."""
    assert got.dtype == want.dtype and torch.equal(got.isnan().cpu(), want.isnan()), what
    assert_same_bytes(got.nan_to_num(), want.nan_to_num(), what)


def assert_same_context(got, want, what=""):
    for name, a, b in zip(("high", "low", "scale"), got, want, strict=True):
        (assert_same if name == "scale" else assert_same_bytes)(a, b, f"{name} {what}")


def context_of(x):
    """By the op."""
    _, high, low, scale = ops.swiglu_forward(x, x)
    return high[0], low[0], scale[0]


# ---- int10_group ----


def test_t17_packing_is_exact():
    """T17: every code, in every place of a byte."""
    codes = torch.arange(-511, 512).repeat(8, 1)
    codes = F.pad(torch.stack([c.roll(i) for i, c in enumerate(codes)]), (0, 1))
    high, low = reference.int10_pack(codes)
    assert high.dtype == torch.int8 and low.dtype == torch.uint8
    assert torch.equal(reference.int10_unpack(high, low).long(), codes)


def test_t17_the_ops_keep_every_code(device):
    """Integers of groups that hold 511 have the scale 1."""
    x = torch.randint(-511, 512, (40, 300)).float()
    x[:, ::128] = 511
    x[1, ::128] = -511
    every = torch.arange(-511, 512).float()
    for group in range(2):
        x[8 * group : 8 * group + 8, 128 * group + 1 : 128 * group + 128] = every[:1016].view(
            8, 127
        )
    high, low, scale = context_of(x.to(device))
    assert (scale == 1).all()
    assert torch.equal(reference.int10_dequantize(high, low, scale, 300).cpu(), x)


def test_t17_error_and_bytes(device):
    """T17: 0.160% on N(0, 1), as bfloat16; ten bits an element and a scale a group."""
    x = torch.randn(1024, 1024, device=device)
    high, low, scale = context_of(x)
    assert error(reference.int10_dequantize(high, low, scale, 1024), x) == pytest.approx(
        0.0016, rel=0.02
    )
    assert error(x.bfloat16(), x) == pytest.approx(0.00165, rel=0.02)
    assert high.nbytes + low.nbytes == 1.25 * x.numel()
    assert scale.nbytes == 4 * x.numel() / 128


@pytest.mark.parametrize("order", ["natural", "shuffled", "finite"])
def test_bytes_of_every_bfloat16(order, device):
    x = all_bfloat16(order)
    assert_same_context(context_of(x.to(device)), reference.int10_quantize(x), order)


def test_extreme_magnitudes(device):
    """Groups near both ends of float32; zeros of either sign; codes never beyond 511."""
    for size in (3e38, 1e-36, 1e-38, 1e-40, 1e-45):
        x = torch.randn(9, 300).clamp(-3, 3) / 3 * size
        got = context_of(x.to(device))
        assert_same_context(got, reference.int10_quantize(x), str(size))
        assert reference.int10_unpack(*got[:2]).abs().max() <= 511
    high, low, scale = context_of(-torch.zeros(3, 200, device=device))
    assert not high.any() and not low.any() and not scale.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_is_a_nan_scale(bad, device):
    x = torch.randn(4, 300)
    x[2, 130] = bad
    high, low, scale = context_of(x.to(device))
    assert scale.isnan().nonzero().tolist() == [[2, 1]]
    assert not high[2, 128:256].any() and not low[2, 32:64].any()
    w = torch.ones(300, device=device, requires_grad=True)
    for f in (lambda t: rms_norm(t, w), lambda t: swiglu(t, t.detach())):
        t = x.to(device).requires_grad_()
        f(t).sum().backward()
        assert t.grad[2].isnan().any() and t.grad[:2].isfinite().all()


# ---- bytes against the reference ----


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_rms_norm_bytes(shape, dtype, device):
    x, dy = numbers(shape, dtype), numbers(shape, dtype, 1)
    weights = [None, *(torch.randn(shape[1]).to(t) for t in FLOATS)]
    for weight, out in zip(weights, (dtype, *FLOATS), strict=True):
        what = f"{weight if weight is None else weight.dtype} {out}"
        w = None if weight is None else weight.to(device)
        y, *context, rstd = ops.rms_norm_forward(x.to(device), w, 1e-5, out)
        want_y, want_context, want_rstd = reference.rms_norm(x, weight, 1e-5, out)
        assert_same(y, want_y, f"y {what}")
        assert_same_context([t[0] for t in context], want_context, what)
        assert_same_bytes(rstd, want_rstd, f"rstd {what}")
        dx, dw = ops.rms_norm_backward(dy.to(device), *context, rstd, w, out)
        want = reference.rms_norm_backward(dy, want_context, want_rstd, weight, out)
        assert_same(dx, want[0], f"dx {what}")
        if weight is None:
            assert dw.shape == (0,)
        else:
            # a GPU's NaN has other bytes
            same = assert_same if device == "cuda" else assert_same_bytes
            same(dw, want[1], f"dw {what}")
        plain, *nothing = ops.rms_norm_forward(x.to(device), w, 1e-5, out, False)
        assert_same_bytes(plain, y, "without a context")
        assert all(t.numel() == 0 for t in nothing)
        again, none = ops.rms_norm_backward(dy.to(device), *context, rstd, w, out, False)
        assert_same_bytes(again, dx, "of a frozen weight")
        assert none.shape == (0,)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_swiglu_bytes(shape, dtype, device):
    g, u, dh = (numbers(shape, dtype, seed) for seed in range(3))
    h, *context = ops.swiglu_forward(g.to(device), u.to(device))
    want_h, gate, up = reference.swiglu(g, u)
    assert_same(h, want_h, "h")
    assert_same_context([t[0] for t in context], gate, "gate")
    assert_same_context([t[1] for t in context], up, "up")
    for out in FLOATS:
        got = ops.swiglu_backward(dh.to(device), *context, out)
        assert_same(got, reference.swiglu_backward(dh, gate, up, out), f"gradients {out}")
    plain, *nothing = ops.swiglu_forward(g.to(device), u.to(device), False)
    assert_same_bytes(plain, h, "without a context")
    assert all(t.numel() == 0 for t in nothing)


def test_bytes_of_strided_and_misaligned_input(device):
    base = torch.randn(300, 517).bfloat16()
    for view in (base.t(), base[:, 1:], base[:, 8:264], base[::2, ::3], base[5:6].expand(40, -1)):
        moved = base.to(device).as_strided(view.shape, view.stride(), view.storage_offset())
        w = torch.randn(view.shape[1] + 1)[1:]
        y, *context, rstd = ops.rms_norm_forward(moved, w.to(device), 1e-6, BF16)
        want_y, want_context, want_rstd = reference.rms_norm(view, w, 1e-6, BF16)
        assert_same_bytes(y, want_y)
        assert_same_context([t[0] for t in context], want_context)
        dx, dw = ops.rms_norm_backward(moved, *context, rstd, w.to(device), BF16)
        want = reference.rms_norm_backward(view, want_context, want_rstd, w, BF16)
        assert_same_bytes(dx, want[0])
        assert_same_bytes(dw, want[1])
        other = torch.randn(view.shape).bfloat16()
        h, *context = ops.swiglu_forward(moved, other.to(device))
        want_h, gate, up = reference.swiglu(view, other)
        assert_same_bytes(h, want_h)
        assert_same_context([t[1] for t in context], up)
        got = ops.swiglu_backward(moved, *context, BF16)
        assert_same_bytes(got, reference.swiglu_backward(view, gate, up, BF16))


def test_the_sigmoid(device):
    """Against float64 over its range, to 2^-22 relative; the ends."""
    x = torch.cat([torch.linspace(-87, 40, 200001), torch.randn(20000)])
    got = reference.sigmoid(x).double()
    want = torch.sigmoid(x.double())
    assert ((got - want).abs() / want).max() < 2**-22
    ends = torch.tensor([[-1e30, -87.5, 1e30, 100.0, 0.0]], device=device)
    h = ops.swiglu_forward(ends, torch.ones_like(ends), False)[0]
    assert h.tolist() == [[0.0, 0.0, ends[0, 2].item(), 100.0, 0.0]]
    odd = torch.tensor([[float("nan"), -float("inf"), float("inf")]], device=device)
    h = ops.swiglu_forward(odd, torch.ones_like(odd), False)[0][0]
    assert h[:2].isnan().all() and h[2] == float("inf")


# ---- gradients ----


def norm_gradients(x, w, dy, f):
    x, w = (t.detach().clone().requires_grad_() for t in (x, w))
    y = f(x, w)
    y.backward(dy.to(y.dtype))
    return y.detach(), x.grad, w.grad


def test_rms_norm_against_float64(device):
    """Outputs err as the cast does; gradients by what ten bits cost, as much as bfloat16."""
    x = torch.randn(512, 1024, device=device) * torch.logspace(-2, 2, 512, device=device)[:, None]
    w, dy = torch.rand(1024, device=device) + 0.5, torch.randn(512, 1024, device=device)
    want = norm_gradients(x.double(), w.double(), dy, lambda x, w: F.rms_norm(x, (1024,), w, 1e-6))
    got = norm_gradients(x, w, dy, lambda x, w: rms_norm(x, w, 1e-6))
    rounded = norm_gradients(
        x.bfloat16().double(), w.double(), dy, lambda x, w: F.rms_norm(x, (1024,), w, 1e-6)
    )
    assert error(got[0], want[0]) < 1e-6
    for i in (1, 2):
        assert error(got[i], want[i]) < 1.5 * error(rounded[i], want[i]) < 0.005
    y, dx, _ = norm_gradients(x.bfloat16(), w, dy, lambda x, w: rms_norm(x, w, 1e-6))
    assert y.dtype == dx.dtype == BF16


def test_t17_swiglu_gradients_are_as_good_as_bfloat16s(device):
    """T17: within 1.3 times the error of contexts in bfloat16, on N(0, 1)."""
    g, u, dh = (torch.randn(1024, 1024, device=device) for _ in range(3))

    def gradients(g, u, f):
        g, u = g.detach().requires_grad_(), u.detach().requires_grad_()
        f(g, u).backward(dh.to(g.dtype))
        return g.grad, u.grad

    def exact(g, u):
        return F.silu(g) * u

    want = gradients(g.double(), u.double(), exact)
    rounded = gradients(g.bfloat16().double(), u.bfloat16().double(), exact)
    got = gradients(g, u, swiglu)
    for ours, theirs, true in zip(got, rounded, want, strict=True):
        assert error(ours, true) <= 1.3 * error(theirs, true) and error(ours, true) < 0.003


@pytest.mark.parametrize("dtype", FLOATS)
def test_both_forms_of_swiglu_agree(dtype, device):
    x = torch.randn(2, 5, 400, device=device).to(dtype).requires_grad_()
    dh = torch.randn(2, 5, 200, device=device).to(dtype)
    g, u = (t.detach().clone().requires_grad_() for t in x.chunk(2, -1))
    h = swiglu(x)
    h.backward(dh)
    other = SwiGLU()(g, u)
    other.backward(dh)
    assert h.dtype == dtype and torch.equal(h, other)
    assert torch.equal(x.grad, torch.cat([g.grad, u.grad], -1))
    h = swiglu(x)
    h += 1  # what a Function returns may be changed in place
    h.sum().backward()


# ---- what is kept ----


def saved_by(f):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        f()
    return saved


def test_only_the_context_is_kept(device):
    """T18 of these operators: 1.28 bytes an element, nothing of 16 bits."""
    layer = RMSNorm(512, device=device)
    x = torch.randn(64, 512, device=device, dtype=BF16, requires_grad=True)
    saved = [t for t in saved_by(lambda: layer(x)) if t is not layer.weight]
    saved = [t for t in saved if t.data_ptr() != layer.weight.data_ptr()]
    assert sum(t.nbytes for t in saved) == x.numel() * (1.25 + 4 / 128) + 4 * 64
    assert not any(t.dtype == BF16 for t in saved)
    saved = saved_by(lambda: swiglu(x))
    assert sum(t.nbytes for t in saved) == x.numel() * (1.25 + 4 / 128)
    assert not any(t.dtype == BF16 for t in saved)
    with torch.no_grad():
        assert saved_by(lambda: layer(x)) == []


# ---- what torch asks ----


class Gated(nn.Module):
    def __init__(self, dim=128, hidden=192):
        super().__init__()
        self.norm, self.act = RMSNorm(dim, eps=1e-6), SwiGLU()
        self.gate_up = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x):
        return x + self.down(self.act(self.gate_up(self.norm(x))))


def results(model, f, x):
    model, x = copy.deepcopy(model), x.clone().requires_grad_()
    y = f(model, x)
    y.float().square().mean().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_recompute_the_same(device, reentrant):
    model, x = Gated().to(device), torch.randn(3, 40, 128, device=device)
    want = results(model, lambda m, x: m(x), x)
    got = results(model, lambda m, x: checkpoint(m, x, use_reentrant=reentrant), x)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("autocast", [False, True])
def test_under_compile(device, autocast):
    model, x = Gated().to(device), torch.randn(3, 40, 128, device=device)

    def run(m, x):
        with torch.autocast(device, BF16, enabled=autocast):
            return m(x)

    def run_compiled(m, x):
        return run(torch.compile(m, fullgraph=True, backend="aot_eager"), x)

    want = results(model, run, x)
    got = results(model, run_compiled, x)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert all(g.dtype == torch.float32 for g in got[1:])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_under_inductor():
    model, x = Gated().cuda(), torch.randn(3, 40, 128, device="cuda")
    want = results(model, lambda m, x: m(x), x)
    got = results(model, lambda m, x: torch.compile(m, fullgraph=True)(x), x)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_autocast_and_eval(device):
    layer, x = RMSNorm(200, device=device), torch.randn(4, 200, device=device)
    with torch.autocast(device, BF16):
        y = layer(x)
    assert y.dtype == BF16 and torch.equal(y, layer(x).to(BF16))
    y.sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(layer.eval()(x), layer.train()(x))
    assert torch.allclose(layer(x), F.rms_norm(x, (200,), layer.weight), atol=1e-5)


def test_it_is_torchs_module(device):
    ours, theirs = RMSNorm(64, 1e-5, device=device), nn.RMSNorm(64, 1e-5, device=device)
    nn.init.normal_(theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(9, 64, device=device)
    plain = RMSNorm(64, 1e-5, device=device, compress=False)
    plain.load_state_dict(theirs.state_dict())
    assert torch.equal(plain(x), theirs(x)) and torch.allclose(ours(x), theirs(x), atol=1e-6)
    bare = RMSNorm(64, elementwise_affine=False)
    assert not list(bare.parameters()) and bare(x.cpu()).shape == x.shape
    assert "compress=True" in repr(ours)


def test_frozen_weights_and_inputs(device):
    x = torch.randn(40, 64, device=device)
    w = torch.rand(64, device=device)
    for need_x, need_w in ((True, False), (False, True)):
        a, b = x.clone().requires_grad_(need_x), w.clone().requires_grad_(need_w)
        rms_norm(a, b).square().sum().backward()
        c, d = x.clone().requires_grad_(), w.clone().requires_grad_()
        rms_norm(c, d).square().sum().backward()
        assert (a.grad is None) != need_x and (b.grad is None) != need_w
        assert torch.equal(a.grad, c.grad) if need_x else torch.equal(b.grad, d.grad)
    g, u = x.clone().requires_grad_(), torch.randn_like(x)
    swiglu(g, u).sum().backward()
    assert g.grad.shape == x.shape


def test_empty(device):
    x = torch.empty(0, 64, device=device, requires_grad=True)
    w = torch.ones(64, device=device, requires_grad=True)
    rms_norm(x, w).sum().backward()
    assert x.grad.shape == (0, 64) and not w.grad.any()
    assert swiglu(x).shape == (0, 32)
    y, *context, rstd = ops.rms_norm_forward(x.detach(), w.detach(), 0.0, BF16)
    dx, dw = ops.rms_norm_backward(y, *context, rstd, w.detach(), BF16)
    assert dx.shape == (0, 64) and dw.shape == (64,) and not dw.any()


def test_refusals():
    x = torch.randn(4, 64)
    with refuses(ValueError, match="normalized_shape must be one size of 1 to 16384"):
        RMSNorm((4, 64))
    with refuses(ValueError, match="normalized_shape must be one size"):
        RMSNorm(16385)
    assert RMSNorm(16385, compress=False).weight.shape == (16385,)
    for size in (64.0, "a", None, True, (4.0,)):
        with refuses(TypeError, match="normalized_shape must be a size"):
            RMSNorm(size)
    with refuses(ValueError, match="normalized_shape must be a size, got -1"):
        RMSNorm(-1)
    for make in (lambda eps: RMSNorm(64, eps), lambda eps: rms_norm(x, None, eps)):
        for eps in ("a", True, [1e-6]):
            with refuses(TypeError, match="eps must be a float"):
                make(eps)
        for eps in (-1.0, float("nan"), float("inf")):
            with refuses(ValueError, match="eps must be finite and at least 0"):
                make(eps)
    with refuses(TypeError, match="elementwise_affine must be True or False"):
        RMSNorm(64, None, "no")
    with refuses(TypeError, match="dtype must be bfloat16, float16 or float32, or None"):
        RMSNorm(64, dtype=torch.float64)
    with refuses(ValueError, match="device must name a device"):
        RMSNorm(64, device="gpu")
    for f in (RMSNorm(64), rms_norm):
        with refuses(TypeError, match="x must be a torch.Tensor, got NoneType"):
            f(None)
    with refuses(ValueError, match="x must have at least one dimension, got 0"):
        rms_norm(torch.ones(()))
    with refuses(ValueError, match="x must have 32 as its last size"):
        RMSNorm(32)(x)
    with refuses(TypeError, match="x must be bfloat16, float16 or float32"):
        rms_norm(x.double())
    with refuses(RuntimeError, match="weight must be bfloat16, float16 or float32 of shape"):
        rms_norm(x, torch.ones(5))
    with refuses(ValueError, match="x must have an even last size"):
        swiglu(x[:, :5])
    with refuses(ValueError, match="up must have the shape and dtype of x"):
        swiglu(x, x.half())
    with refuses(TypeError, match="compress must be True or False"):
        RMSNorm(4, compress=1)
    assert mxtrain.nn.RMSNorm is RMSNorm
