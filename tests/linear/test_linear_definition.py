"""The linear layer against the composition of its parts: recipes, dtypes, shapes and layouts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from linear_common import ALL, NAMES, QUANTIZED, compose, relative, run, tensors

import mxtrain
from mxtrain import reference
from mxtrain.fallback import initial_threshold
from mxtrain.linear import linear
from mxtrain.recipe import Quantizer, Recipe, get_recipe

pytestmark = pytest.mark.ops("quantize", "quantize_dual", "requantize", "dequantize", "gemm")


@pytest.mark.parametrize("recipe", ALL, ids=lambda r: r.name)
@pytest.mark.parametrize("lead", [(64,), (3, 13), (1,), (2, 4, 50)], ids=str)
def test_equals_the_composition_of_its_parts(device, recipe, lead):
    x, w, b, dy = tensors(*lead, device=device)
    got = run(lambda x, w, b: linear(x, w, b, recipe), x, w, b, dy)
    for name, a, e in zip(("y", "dx", "dw", "db"), got, compose(recipe, x, w, b, dy), strict=True):
        assert torch.equal(a, e), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_composition_in_half_precision(device, name, dtype):
    x, w, b, dy = tensors(5, 17, device=device, dtype=dtype)
    got = run(lambda x, w, b: linear(x, w, b, name), x, w, b, dy)
    assert all(t.dtype == dtype for t in got)
    for a, e in zip(got, compose(get_recipe(name), x, w, b, dy), strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("name", ["mxfp4_baseline", "tetrajet", "mxfp8", "nvfp4"])
def test_ragged_features(device, name):
    x, w, b, dy = tensors(37, k=45, c=71, device=device)
    got = run(lambda x, w, b: linear(x, w, b, name), x, w, b, dy)
    for a, e in zip(got, compose(get_recipe(name), x, w, b, dy), strict=True):
        assert torch.equal(a, e)


def forward_operands(recipe, x, w):
    """X and W as the forward of a recipe without a draw quantizes them."""
    x, w, q = x.detach(), w.detach(), recipe.fprop_x
    if not q.square:
        options = {"scale_rule": q.scale_rule, "hadamard": q.hadamard}
        return tuple(mxtrain.quantize(t, q.format, **options) for t in (x, w))
    if not q.fallback:
        return mxtrain.int8_quantize(x), mxtrain.int8_quantize(w)
    a, _ = mxtrain.int8_quantize_fallback(x, initial_threshold(x, recipe))
    return a, mxtrain.int8_quantize(w)


@pytest.mark.parametrize("name", QUANTIZED)
def test_forward_is_the_product_of_the_dequantized_operands(device, name):
    """Within the accumulation bound of the backend, elementwise against float64."""
    recipe = get_recipe(name)
    x, w, b, _ = tensors(40, device=device)
    a, bt = x.detach().double(), w.detach().double()
    if recipe.fprop_x.format:
        a, bt = (t.dequantize().double() for t in forward_operands(recipe, x, w))
    exact = a @ bt.t() + b.double()
    c = x.shape[1] * 2**-24 if device == "cpu" else 2**-11  # Hopper's FP8 accumulator is shorter
    bound = c * (a.abs() @ bt.abs().t() + b.double().abs()) + 1e-6 * exact.abs()
    assert ((linear(x, w, b, name).double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("name", QUANTIZED)
def test_gradients_are_near_those_of_nn_linear(device, name):
    x, w, b, dy = tensors(200, k=256, c=128, device=device)
    exact = run(F.linear, x, w, b, dy)
    got = run(lambda x, w, b: linear(x, w, b, name), x, w, b, dy)
    limit = 0.05 if name == "mxfp8" else 0.3  # FP8 errs by about 4%, FP4 by up to 25%
    assert all(relative(a, e) < limit for a, e in zip(got, exact, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bf16_recipe_is_nn_linear(device, dtype):
    x, w, b, dy = tensors(3, 17, device=device, dtype=dtype)
    exact = run(F.linear, x, w, b, dy)
    got = run(lambda x, w, b: linear(x, w, b, "bf16"), x, w, b, dy)
    assert all(torch.equal(a, e) for a, e in zip(got[:3], exact[:3], strict=True))
    assert torch.equal(got[3], reference.column_sum(dy.flatten(0, 1)).to(dtype))


@pytest.mark.parametrize(
    "field", ["fprop_x", "fprop_w", "dgrad_dy", "dgrad_w", "wgrad_dy", "wgrad_x"]
)
def test_one_quantizer_alone(device, field):
    """An ablation: one operand is quantized, all other factors stay as they are."""
    recipe = Recipe(f"only {field}", **{field: Quantizer("mxfp4")})
    x, w, b, dy = tensors(40, device=device)
    y, dx, dw, _ = run(lambda x, w, b: linear(x, w, b, recipe), x, w, b, dy)
    x, w, b = x.detach(), w.detach(), b.detach()

    def q(t, f, transpose=False):
        if f != field:
            return t.t() if transpose else t
        return mxtrain.quantize(t, "mxfp4", transpose=transpose).dequantize()

    assert torch.equal(y, F.linear(q(x, "fprop_x"), q(w, "fprop_w"), b))
    assert torch.equal(dx, q(dy, "dgrad_dy") @ q(w, "dgrad_w", True).t())
    assert torch.equal(dw, q(dy, "wgrad_dy", True) @ q(x, "wgrad_x", True).t())


@pytest.mark.parametrize("source", ["original", "forward"])
@pytest.mark.parametrize("tokens", [1, 40, 64, 100])
def test_token_padding_for_the_hadamard_is_exact(device, source, tokens):
    """With 8-bit operands dW is near the exact one whether or not the groups of 256 fill up."""
    forward = Quantizer("mxfp8_e4m3")
    q = Quantizer("mxfp8_e4m3", hadamard=256, signs="fixed")
    x_t = Quantizer("mxfp8_e4m3", hadamard=256, signs="fixed", source=source)
    recipe = Recipe("padded", fprop_x=forward, fprop_w=forward, wgrad_dy=q, wgrad_x=x_t)
    x, w, b, dy = tensors(tokens, device=device)
    _, dx, dw, _ = run(lambda x, w, b: linear(x, w, b, recipe), x, w, b, dy)
    assert relative(dw, dy.t() @ x.detach()) < 0.07
    assert torch.equal(dx, dy @ w.detach())


# ---- dtypes, shapes, layouts ----


@pytest.mark.parametrize("name", NAMES)
def test_bias_gradient_is_the_plain_sum(device, name):
    x, w, b, dy = tensors(50, device=device, dtype=torch.bfloat16)
    db = run(lambda x, w, b: linear(x, w, b, name), x, w, b, dy)[3]
    assert torch.equal(db, reference.column_sum(dy).to(torch.bfloat16))


@pytest.mark.parametrize("name", NAMES)
def test_without_bias(device, name):
    x, w, _, dy = tensors(50, device=device)
    y, dx, dw, db = run(lambda x, w, b: linear(x, w, b, name), x, w, None, dy)
    expected = compose(get_recipe(name), x, w, None, dy)
    assert torch.equal(y, expected[0]) and torch.equal(dx, expected[1])
    assert torch.equal(dw, expected[2]) and db is None


@pytest.mark.parametrize("name", NAMES)
def test_mixed_dtypes_keep_their_own(device, name):
    x, w, b, dy = tensors(50, device=device)
    x = x.detach().bfloat16().requires_grad_()
    w16 = w.detach().half().requires_grad_()
    y, dx, dw, db = run(lambda x, w, b: linear(x, w, b, name), x, w16, b, dy.bfloat16())
    dtypes = [t.dtype for t in (y, dx, dw, db)]
    assert dtypes == [torch.bfloat16, torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_autocast_casts_the_input_and_sets_the_output(device, name, amp):
    """As F.linear has it; the weight is quantized from its own dtype."""
    recipe = get_recipe(name)
    x, w, b, dy = tensors(50, device=device)

    def f(x, w, b):
        with torch.autocast(device, dtype=amp):
            return linear(x, w, b, name)

    y, dx, dw, db = run(f, x, w, b, dy.to(amp))
    dtypes = [t.dtype for t in (y, dx, dw, db)]
    assert dtypes == [amp, torch.float32, torch.float32, torch.float32]
    assert torch.equal(db, reference.column_sum(dy.to(amp)))
    x = x.to(amp)
    if recipe.fprop_x.format is None:
        expected = F.linear(x.to(amp), w.to(amp), b.to(amp))
    else:
        gemm = mxtrain.int8_gemm if recipe.fprop_x.square else mxtrain.gemm
        expected = gemm(*forward_operands(recipe, x, w), b.detach(), out_dtype=amp)
    assert torch.equal(y, expected)
    if recipe.dgrad_dy.format:
        torch.manual_seed(1)
        expected = compose(recipe, x.float(), w, b, dy.to(amp).float())
        assert torch.equal(dx, expected[1].to(amp).float()) and torch.equal(dw, expected[2])


def test_bf16_recipe_under_autocast_is_nn_linear(device):
    x, w, b, dy = tensors(50, device=device)

    def amp(f):
        with torch.autocast(device, dtype=torch.bfloat16):
            return f(x, w, b)

    dy = dy.bfloat16()
    exact = run(lambda *_: amp(F.linear), x, w, b, dy)
    got = run(lambda *_: amp(lambda x, w, b: linear(x, w, b, "bf16")), x, w, b, dy)
    assert all(torch.equal(a, e) for a, e in zip(got[:3], exact[:3], strict=True))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("lead", [(), (2, 3, 4)], ids=str)
def test_leading_shapes(device, name, lead):
    x, w, b, dy = tensors(*lead, device=device)
    flat = run(
        lambda x, w, b: linear(x.reshape(-1, 128), w, b, name).reshape(dy.shape), x, w, b, dy
    )
    got = run(lambda x, w, b: linear(x, w, b, name), x, w, b, dy)
    assert got[0].shape == (*lead, 128) and got[1].shape == x.shape
    assert all(torch.equal(a, e) for a, e in zip(got, flat, strict=True))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("lead", [(0,), (3, 0), (0, 5)], ids=str)
def test_no_tokens(device, name, lead):
    x, w, b, dy = tensors(*lead, device=device)
    y, dx, dw, db = run(lambda x, w, b: linear(x, w, b, name), x, w, b, dy)
    assert y.shape == dy.shape and dx.shape == x.shape
    assert dw.shape == w.shape and not dw.any() and db.shape == b.shape and not db.any()
    with torch.no_grad(), torch.autocast(device, dtype=torch.bfloat16):
        assert linear(x, w, b, name).dtype == torch.bfloat16


@pytest.mark.parametrize("k, c", [(0, 32), (32, 0)])
def test_no_features(device, k, c):
    x, w, b, dy = tensors(5, k=k, c=c, device=device)
    y, dx, dw, db = run(lambda x, w, b: linear(x, w, b), x, w, b, dy)
    assert torch.equal(y, b.detach().expand(5, c)) and not dx.any() and not dw.any()
    # torch adds the rows here, on a GPU in its own order: 4 roundings of sums at most this large
    bound = 4 * 2.0**-24 * dy.abs().sum(0) if device == "cuda" else 0
    assert ((db - reference.column_sum(dy)).abs() <= 2 * bound).all()


def same(got, expected, name):
    """Bitwise; near, where the recipe leaves a product to torch, whose kernel (and so the order of
    its sums) depends on the strides and the threads."""
    if get_recipe(name).fprop_x.format is None:
        return torch.allclose(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    return torch.equal(got, expected)


@pytest.mark.parametrize("name", NAMES)
def test_strided_input(device, name):
    x, w, b, dy = tensors(6, 10, device=device)
    reference = run(lambda x, w, b: linear(x.transpose(0, 1).contiguous(), w, b, name),
                    x, w, b, dy.transpose(0, 1))  # fmt: skip
    wide = torch.randn(10, 256, device=device)
    for f in (
        lambda x, w, b: linear(x.transpose(0, 1), w, b, name),
        lambda x, w, b: linear(x.transpose(0, 1), w.t().contiguous().t(), b, name),
    ):
        got = run(f, x, w, b, dy.transpose(0, 1))
        assert all(same(a, e, name) for a, e in zip(got, reference, strict=True))
    with torch.no_grad():
        sliced = linear(wide[:, 3:131], w, b, name)
        assert same(sliced, linear(wide[:, 3:131].contiguous(), w, b, name), name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("lead", [(40,), (4, 10)], ids=str)
def test_expanded_gradient(device, name, lead):
    """sum().backward() hands a gradient with strides of 0."""
    x, w, b, dy = tensors(*lead, device=device)
    expected = run(lambda x, w, b: linear(x, w, b, name), x, w, b, torch.ones_like(dy))
    torch.manual_seed(1)
    linear(x, w, b, name).sum().backward()
    assert all(same(t.grad, e, name) for t, e in zip((x, w, b), expected[1:], strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_output_may_be_changed_in_place(device, name):
    x, w, b, dy = tensors(3, 10, device=device)
    expected = run(lambda x, w, b: F.relu(linear(x, w, b, name)), x, w, b, dy)
    got = run(lambda x, w, b: linear(x, w, b, name).relu_(), x, w, b, dy)
    assert all(torch.equal(a, e) for a, e in zip(got, expected, strict=True))


def test_nan_stays_in_its_token(device):
    x, w, b, _ = tensors(40, device=device)
    with torch.no_grad():
        clean = linear(x, w, b)
        x[7, 3] = float("nan")
        y = linear(x, w, b)
    assert y[7].isnan().all()
    y[7] = clean[7]
    assert torch.equal(y, clean)
