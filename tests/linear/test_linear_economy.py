"""What a step of the linear layer computes and what it keeps for backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from linear_common import NAMES, QUANTIZED, Ops, ops_of, run, tensors

from mxtrain.linear import MXLinear, linear
from mxtrain.recipe import RECIPES

pytestmark = pytest.mark.ops("quantize", "quantize_dual", "requantize", "dequantize", "gemm")

FORWARD = {  # of a training step: X, then W, then the product; without KEEPING, of any
    "bf16": [],
    "mxfp4_baseline": ["quantize_dual", "quantize", "gemm"],
    "tetrajet": ["quantize", "quantize", "gemm"],
    "tetrajet_ema": ["quantize", "quantize", "gemm"],
    "mxfp4_backward": ["quantize"],
    "mxfp4_backward_mxfp8": ["quantize_dual", "quantize", "gemm"],
    "mxfp4_backward_rht": ["quantize"],
    "mxfp4_backward_sr": ["quantize"],
    "mxfp4_backward_plain": ["quantize"],
    "fp4_mixed_ffn": ["quantize_dual", "quantize", "gemm"],
    "mxfp4_hadamard": ["quantize_dual", "quantize", "gemm"],
    "quartet": ["quantize_dual", "quantize", "gemm"],
    "mxfp8": ["quantize_dual", "quantize", "gemm"],
    "nvfp4": ["quantize_dual", "quantize", "gemm"],
    "nvfp4_rht": ["quantize_dual", "quantize", "gemm"],
    "int8_block": ["int8_quantize", "int8_quantize", "int8_gemm"],
    "int8_fallback": ["int8_quantize_fallback", "int8_pack_residual", "int8_quantize", "int8_gemm"],
}
KEEPING = ("int8_pack_residual",)
SQUARE = ("int8_block", "int8_fallback")  # one quantization of X, and of dY, for both GEMMs
W_BACKWARD = {
    "bf16": [], "tetrajet": ["requantize"], "tetrajet_ema": ["requantize"],
    **{name: ["int8_quantize"] for name in SQUARE},
}  # fmt: skip
X_BACKWARD = {
    "tetrajet": ["requantize"], "tetrajet_ema": ["requantize"],
}  # fmt: skip


def product_and_quantize(name):
    """The ops of a GEMM and of one dY."""
    if name == "bf16":
        return [], []
    return (["int8_gemm"], ["int8_quantize"]) if name in SQUARE else (["gemm"], ["quantize"])


def forward_alone(name):
    """The ops of a forward that keeps no X."""
    ops = [op.removesuffix("_dual") for op in FORWARD[name] if op not in KEEPING]
    return ops if RECIPES[name].fprop_x.format else []


@pytest.mark.parametrize("name", NAMES)
def test_ops_of_a_step(device, name):
    x, w, b, dy = tensors(40, device=device)
    with Ops() as ops:
        y = linear(x, w, b, name)
    assert ops.names == FORWARD[name]
    gemm, quantize = product_and_quantize(name)
    dy_ops = quantize if name in SQUARE else [f"{op}_dual" for op in quantize]
    dgrad = W_BACKWARD.get(name, ["quantize"]) + gemm
    wgrad = X_BACKWARD.get(name, []) + gemm
    sums = [] if "quantize_dual" in dy_ops else ["column_sum"]  # else from the same read
    assert ops_of(lambda: y.backward(dy)) == [*dy_ops, *dgrad, *wgrad, *sums]


@pytest.mark.parametrize("name", NAMES)
def test_no_work_for_an_input_without_grad(device, name):
    x, w, b, dy = tensors(40, device=device)
    y = linear(x.detach(), w, b, name)
    gemm, quantize = product_and_quantize(name)
    assert ops_of(lambda: y.backward(dy)) == [
        *quantize,
        *X_BACKWARD.get(name, []),
        *gemm,
        "column_sum",
    ]
    assert w.grad is not None and b.grad is not None


@pytest.mark.parametrize("name", NAMES)
def test_no_work_for_a_frozen_weight(device, name):
    x, w, b, dy = tensors(40, device=device)
    forward = forward_alone(name)
    with Ops() as ops:
        y = linear(x, w.detach(), b.detach(), name)
    assert ops.names == forward
    gemm, quantize = product_and_quantize(name)
    assert ops_of(lambda: y.backward(dy)) == quantize + W_BACKWARD.get(name, ["quantize"]) + gemm
    assert x.grad is not None


@pytest.mark.parametrize("name", NAMES)
def test_bias_alone_may_require_grad(device, name):
    x, w, b, dy = tensors(40, device=device)
    y = linear(x.detach(), w.detach(), b, name)
    assert ops_of(lambda: y.backward(dy)) == ["column_sum"]
    assert torch.equal(b.grad, torch.ops.mxtrain.column_sum(dy))


def saved_by(f):
    """Tensors that autograd saves while f runs."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        f()
    return saved


@pytest.mark.parametrize("name", NAMES)
def test_without_grad_nothing_extra_happens(device, name):
    x, w, b, _ = tensors(40, device=device)
    expected = linear(x, w, b, name).detach()
    forward = forward_alone(name)
    layer = MXLinear(128, 128, device=device, recipe=name).eval()
    with torch.no_grad():
        layer.weight.copy_(w)
        layer.bias.copy_(b)
    state = torch.get_rng_state()
    for context in (torch.no_grad(), torch.inference_mode()):
        layer.drop_cache()
        with context:
            assert ops_of(lambda: layer(x)) == forward
            assert saved_by(lambda: layer(x)) == []
            y = layer(x)
        assert torch.equal(y, expected) and y.grad_fn is None
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", QUANTIZED)
def test_the_input_is_not_kept(device, name):
    x, w, b, _ = tensors(128, k=128, c=256, device=device, dtype=torch.bfloat16)
    saved = saved_by(lambda: linear(x, w, b, name))
    others = [t for t in saved if t.data_ptr() != w.data_ptr()]
    assert len(others) < len(saved) or RECIPES[name].dgrad_w.source == "forward"
    assert all(t.data_ptr() != x.data_ptr() for t in others)
    assert not any(t.dtype == x.dtype for t in others)
    residual = x.nbytes // 2 if RECIPES[name].wgrad_x.fallback else 0  # T18: dense, 2 bytes
    assert sum(t.nbytes for t in others) < 0.6 * (x.nbytes + w.nbytes) + residual


def test_saved_bytes_of_tetrajet(device):
    """Codes and scales of X and W, 4.25 bits an element, where nn.Linear keeps 16."""
    x, w, b, _ = tensors(256, k=256, c=256, device=device, dtype=torch.bfloat16)
    ours = sum(t.nbytes for t in saved_by(lambda: linear(x, w, b, "tetrajet")))
    theirs = sum(t.nbytes for t in saved_by(lambda: F.linear(x, w, b)))
    assert theirs == 2 * (x.numel() + w.numel())
    assert theirs / ours >= 3.5
    without_w = saved_by(lambda: linear(x.detach(), w, b, "tetrajet"))
    assert 2 * x.numel() / sum(t.nbytes for t in without_w) >= 3.5


@pytest.mark.parametrize("name", NAMES)
def test_saved_tensor_hooks_may_move_what_is_saved(device, name):
    x, w, b, dy = tensors(40, device=device)
    expected = run(lambda x, w, b: linear(x, w, b, name), x, w, b, dy)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        got = run(lambda x, w, b: linear(x, w, b, name), x, w, b, dy)
    assert all(torch.equal(a, e) for a, e in zip(got, expected, strict=True))


def test_changing_a_weight_that_backward_reads_is_an_error(device):
    x, w, b, dy = tensors(40, device=device)
    y = linear(x, w, b, "mxfp4_baseline")
    with torch.no_grad():
        w.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(dy)


def test_changing_a_weight_that_was_packed_is_not(device):
    x, w, b, dy = tensors(40, device=device)
    expected = run(lambda x, w, b: linear(x, w, b, "tetrajet"), x, w, b, dy)
    torch.manual_seed(1)
    y = linear(x, w, b, "tetrajet")
    with torch.no_grad():
        w.add_(1)
    y.backward(dy)
    assert torch.equal(x.grad, expected[1])


@pytest.mark.parametrize("name", NAMES)
def test_second_derivative_is_an_error(device, name):
    x, w, b, _ = tensors(40, device=device)
    loss = linear(x, w, b, name).square().sum()
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.square().sum().backward()


@pytest.mark.parametrize("name", NAMES)
def test_gradients_accumulate(device, name):
    x, w, b, dy = tensors(64, device=device)
    parts = [run(lambda x, w, b: linear(x, w, b, name), x[i : i + 32].detach().requires_grad_(), w,
                 b, dy[i : i + 32], seed=i) for i in (0, 32)]  # fmt: skip
    for i in (0, 32):
        torch.manual_seed(i)
        linear(x[i : i + 32], w, b, name).backward(dy[i : i + 32])
    assert torch.equal(w.grad, parts[0][2] + parts[1][2])
    assert torch.equal(b.grad, parts[0][3] + parts[1][3])
    assert torch.equal(x.grad, torch.cat([parts[0][1], parts[1][1]]))
