"""Q-EMA: the average, its updates, its state, and what it does to oscillation."""

from __future__ import annotations

import copy
import pickle
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from common import refuses
from linear_common import compose, run, tensors
from torch import nn
from torch.optim import SGD, AdamW

import mxtrain
from mxtrain.ema import _EMA_LAYERS
from mxtrain.linear import MXLinear, linear, update_weight_ema
from mxtrain.recipe import RECIPES

pytestmark = pytest.mark.ops("quantize", "quantize_dual", "requantize", "dequantize", "gemm")


# The paper's: a memory that nothing bounds but beta.
PAPER = RECIPES["tetrajet_ema"].replace(ema_fraction=None, ema_at_half=None)


def ema_layer(device="cpu", beta=0.9, warmup=2, features=64, **kwargs) -> MXLinear:
    recipe = PAPER.replace(ema_beta=beta, ema_warmup=warmup)
    return MXLinear(features, features, device=device, recipe=recipe, **kwargs)


def step(layer, optimizer, seed=0):
    g = torch.Generator().manual_seed(seed)
    for p in layer.parameters():
        p.grad = torch.randn(p.shape, generator=g).to(p)
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_rounds_toward_the_average(device, dtype):
    x, w, b, dy = tensors(40, device=device, dtype=dtype)
    recipe = RECIPES["tetrajet_ema"]
    ema = w.detach().float() + 0.05 * torch.randn(w.shape, device=device)
    got = run(lambda x, w, b: linear(x, w, b, recipe, ema), x, w, b, dy)
    expected = compose(recipe, x, w, b, dy, ema)
    assert all(torch.equal(a, e) for a, e in zip(got, expected, strict=True))
    nearest = run(lambda x, w, b: linear(x, w, b, "tetrajet"), x, w, b, dy)
    assert not torch.equal(got[0], nearest[0]) and not torch.equal(got[1], nearest[1])


def test_without_an_average_or_with_the_weight_itself_it_rounds_to_nearest(device):
    x, w, b, dy = tensors(40, device=device)
    nearest = run(lambda x, w, b: linear(x, w, b, "tetrajet"), x, w, b, dy)
    for ema in (None, w.detach()):
        got = run(lambda x, w, b: linear(x, w, b, "tetrajet_ema", ema), x, w, b, dy)  # noqa: B023
        assert all(torch.equal(a, e) for a, e in zip(got, nearest, strict=True))


def test_a_noisy_average_changes_one_code_in_twenty(device):
    """Noise of 0.02 on N(0, 1): about 5% of the codes, relative MSE 1.37e-2 instead of 1.33e-2."""
    w = torch.randn(512, 1024, device=device)
    nearest = mxtrain.quantize(w, "mxfp4")
    noisy = w + 0.02 * torch.randn_like(w)
    toward = mxtrain.quantize(w, "mxfp4", rounding="toward", toward=noisy)
    assert torch.equal(nearest.scale, toward.scale)
    a, b = nearest.dequantize(), toward.dequantize()
    assert 0.04 < (a != b).float().mean() < 0.06
    mse = [((q - w).square().sum() / w.square().sum()).item() for q in (a, b)]
    assert abs(mse[0] - 1.33e-2) < 2e-4 and abs(mse[1] - 1.37e-2) < 2e-4


def test_first_update_copies_and_later_ones_are_exact(device):
    """T20: what the weight was when the layer was built leaves no trace."""
    layer = ema_layer(device, beta=0.998, warmup=3)
    nn.init.normal_(layer.weight, std=3.0)
    optimizer = SGD(layer.parameters(), lr=0.1)
    expected = None
    for i in range(6):
        assert layer._ema_updates == i and layer.ema_active == (i >= 3)
        step(layer, optimizer, i)
        w = layer.weight.detach()
        expected = w.clone() if expected is None else expected.lerp_(w, 1 - 0.998)
        assert torch.equal(layer.weight_ema, expected)
    assert not torch.equal(layer.weight_ema, layer.weight)


def test_the_memory_grows_with_the_steps(device):
    """Update n + 1 goes max(1 - beta, 1 / (1 + fraction n)) of the way, by hook and by AdamW."""
    recipe = PAPER.replace(ema_beta=0.9, ema_fraction=0.25, ema_warmup=3)
    for kind in (SGD, mxtrain.optim.AdamW):
        layer = MXLinear(64, 64, device=device, recipe=recipe)
        optimizer = kind(layer.parameters(), lr=0.1)
        expected, amounts = None, []
        for n in range(50):
            step(layer, optimizer, seed=n)
            w = layer.weight.detach()
            amounts.append(max(1 - 0.9, 1 / (1 + 0.25 * n)))
            expected = w.clone() if n == 0 else torch.lerp(expected, w, amounts[-1])
            assert torch.equal(layer.weight_ema, expected)
        assert amounts[:2] == [1.0, 0.8] and amounts[37:] == [1 - 0.9] * 13


def test_a_mean_of_all_steps_has_the_fraction_1():
    recipe = PAPER.replace(ema_beta=0.999999, ema_fraction=1.0)
    layer = MXLinear(32, 32, recipe=recipe)
    optimizer, weights = SGD(layer.parameters(), lr=0.1), []
    for n in range(20):
        step(layer, optimizer, seed=n)
        weights.append(layer.weight.detach().clone())
    torch.testing.assert_close(layer.weight_ema, torch.stack(weights).mean(0), rtol=0, atol=1e-6)


def test_an_average_that_the_recipe_has_not_is_refused():
    plain, averaged = MXLinear(32, 32, recipe="tetrajet"), ema_layer(features=32)
    before = averaged.weight_ema.clone()
    with pytest.raises(ValueError, match=r"layers must have an average, got none .*'tetrajet'"):
        update_weight_ema([averaged, plain])
    assert averaged._ema_updates == 0 and torch.equal(averaged.weight_ema, before)
    x, w = torch.randn(4, 32), plain.weight.detach()
    with pytest.raises(ValueError, match=r"weight_ema must be None in a recipe without ema_beta"):
        linear(x, w, None, "tetrajet", w.clone())


def test_bf16_weights_are_averaged_in_float32(device):
    layer = ema_layer(device, dtype=torch.bfloat16)
    optimizer = SGD(layer.parameters(), lr=0.1)
    expected = None
    for i in range(4):
        step(layer, optimizer, i)
        w = layer.weight.detach().float()
        expected = w.clone() if expected is None else expected.lerp_(w, 1 - 0.9)
    assert layer.weight_ema.dtype == torch.float32 and torch.equal(layer.weight_ema, expected)


def test_casting_the_model_leaves_the_average_in_float32(device):
    layer = ema_layer(device)
    optimizer = SGD(layer.parameters(), lr=0.1)
    for i in range(3):
        step(layer, optimizer, i)
    before = layer.weight_ema.clone()
    layer.to(torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16 and torch.equal(layer.weight_ema, before)
    assert layer(torch.randn(2, 64, device=device, dtype=torch.bfloat16)).isfinite().all()


def test_forward_uses_the_average_after_the_warmup_in_train_and_eval(device):
    layer = ema_layer(device, warmup=2)
    optimizer = SGD(layer.parameters(), lr=0.5)
    x = torch.randn(8, 64, device=device)

    def expected(ema):
        return linear(x, layer.weight, layer.bias, layer.recipe, ema)

    for i in range(4):
        ema = layer.weight_ema if i >= 2 else None
        for mode in (True, False):
            layer.train(mode)
            assert torch.equal(layer(x), expected(ema))
        step(layer, optimizer, i)
    assert not torch.equal(expected(layer.weight_ema), expected(None))


def test_warmup_of_zero_still_waits_for_a_first_update():
    layer = ema_layer(warmup=0)
    assert not layer.ema_active
    step(layer, SGD(layer.parameters(), lr=0.1))
    assert layer.ema_active and torch.equal(layer.weight_ema, layer.weight)


def test_only_what_the_optimizer_holds_and_trains_is_updated():
    held, other, frozen = ema_layer(), ema_layer(), ema_layer()
    frozen.weight.requires_grad_(False)
    optimizer = SGD([*held.parameters(), *frozen.parameters()], lr=0.1)
    step(held, optimizer)
    assert [m._ema_updates for m in (held, other, frozen)] == [1, 0, 0]
    optimizer = AdamW([{"params": [held.bias]}, {"params": [other.weight, held.weight]}], lr=0.1)
    step(held, optimizer)
    assert [m._ema_updates for m in (held, other, frozen)] == [2, 1, 0]


def test_a_shared_weight_updates_both_layers():
    a, b = ema_layer(), ema_layer(beta=0.5)
    b.weight = a.weight
    optimizer = SGD(a.parameters(), lr=0.1)
    for i in range(3):
        step(a, optimizer, i)
    assert a._ema_updates == b._ema_updates == 3
    assert not torch.equal(a.weight_ema, b.weight_ema)


def test_manual_update_for_optimizers_that_hold_a_copy():
    layer = ema_layer()
    update_weight_ema([layer])
    with torch.no_grad():
        layer.weight.add_(1)
    expected = layer.weight_ema.lerp(layer.weight.detach(), 1 - 0.9)
    update_weight_ema([layer])
    assert torch.equal(layer.weight_ema, expected) and layer._ema_updates == 2


def test_a_skipped_step_is_no_update():
    layer = ema_layer()
    optimizer = SGD(layer.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for scale, updates in ((float("inf"), 0), (1.0, 1)):
        optimizer.zero_grad()
        scaler.scale(layer(torch.randn(4, 64)).sum() * scale).backward()
        scaler.step(optimizer)
        scaler.update()
        assert layer._ema_updates == updates


def test_accumulated_gradients_are_one_update():
    """Micro-steps see the average of the last step; the step moves it once."""
    layer = ema_layer(warmup=1)
    for optimizer in (SGD(layer.parameters(), lr=0.1), mxtrain.optim.AdamW(layer.parameters())):
        step(layer, optimizer)
        updates, average = layer._ema_updates, layer.weight_ema.clone()
        for i in range(3):
            layer(torch.randn(4, 64)).square().sum().backward()
            assert layer._ema_updates == updates and torch.equal(layer.weight_ema, average)
            assert i == 0 or layer.weight.grad.any()
        optimizer.step()
        assert layer._ema_updates == updates + 1
        assert torch.equal(layer.weight_ema, average.lerp(layer.weight.detach(), 1 - 0.9))


def test_a_flattened_weight_is_refused_and_a_bias_alone_is_not():
    """As FullyShardedDataParallel keeps it between steps: a flat shard in place of the weight, or
    in a parameter of many. mxtrain's optimizer refuses it before the step."""
    layer = ema_layer()
    layer.weight = nn.Parameter(torch.ones(32 * 64))
    for kind in (SGD, mxtrain.optim.AdamW):
        layer.weight.grad = torch.ones_like(layer.weight)
        with refuses(RuntimeError, r"weight must be \[64, 64\] in the optimizer .*, got \[2048\]"):
            kind([layer.weight], lr=0.5).step()
    assert (layer.weight == 0.5).all()  # by SGD alone
    layer, flat = ema_layer(), nn.Parameter(torch.ones(99))
    for name in ("weight", "bias"):
        flat._param_infos = [SimpleNamespace(module=layer, param_name=name)]
        flat.grad = torch.ones_like(flat)
        if name == "weight":
            with refuses(RuntimeError, r"weight must be \[64, 64\] .*, got \[99\]"):
                SGD([flat], lr=0.5).step()
        else:
            SGD([flat], lr=0.5).step()


def test_dead_layers_leave():
    layer = ema_layer()
    before = len(_EMA_LAYERS)
    del layer
    assert len(_EMA_LAYERS) == before - 1


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
                         ids=["deepcopy", "pickle"])  # fmt: skip
def test_copies_keep_averaging(duplicate):
    layer = ema_layer()
    step(layer, SGD(layer.parameters(), lr=0.1))
    twin = duplicate(layer)
    assert type(twin) is MXLinear and twin.recipe == layer.recipe and twin._ema_updates == 1
    assert (
        torch.equal(twin.weight_ema, layer.weight_ema) and twin.weight_ema is not layer.weight_ema
    )
    step(twin, SGD(twin.parameters(), lr=0.1), 1)
    assert (twin._ema_updates, twin.ema_active, layer._ema_updates) == (2, True, 1)
    plain = duplicate(MXLinear(64, 64, recipe="mxfp8"))
    assert plain.recipe is not None and list(plain.state_dict()) == ["weight", "bias"]


def test_state_survives_a_checkpoint_bitwise(tmp_path, device):
    """T20: the state, the evaluation and what the next step makes of it."""
    layer = ema_layer(device)
    optimizer = SGD(layer.parameters(), lr=0.5)
    for i in range(4):
        step(layer, optimizer, i)
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    state = torch.load(tmp_path / "layer.pt", weights_only=True)
    assert set(state) == {"weight", "bias", "weight_ema", "ema_updates"}
    assert state["ema_updates"].dtype == torch.int64 and state["ema_updates"].shape == ()
    again = ema_layer(device)
    again.load_state_dict(state, strict=True)
    assert again._ema_updates == 4 and again.ema_active
    assert torch.equal(again.weight_ema, layer.weight_ema)
    x = torch.randn(8, 64, device=device)
    assert torch.equal(again.eval()(x), layer.eval()(x))
    for m in (layer, again):
        step(m, SGD(m.parameters(), lr=0.5), 9)
    assert torch.equal(again.weight_ema, layer.weight_ema)


def test_loading_a_plain_checkpoint_restarts_the_average():
    net = nn.Sequential(ema_layer(), ema_layer())
    optimizer = SGD(net.parameters(), lr=0.1)
    for i in range(3):
        step(net, optimizer, i)
    plain = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    net.load_state_dict(plain.state_dict(), strict=True)
    for layer in net:
        assert layer._ema_updates == 0 and not layer.ema_active
        assert torch.equal(layer.weight_ema, layer.weight)
    net[0]._count_ema(5)
    net.load_state_dict({"0.bias": plain[0].bias}, strict=False)  # no weight: nothing to restart
    assert net[0]._ema_updates == 5


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("ema_updates", "x", "ema_updates must be one integer of at least 0, got 'x'"),
        ("ema_updates", 3, "ema_updates must be one integer of at least 0, got 3"),
        ("ema_updates", torch.ones(3, dtype=torch.int64), "ema_updates must be one integer"),
        ("ema_updates", torch.tensor(-5), "ema_updates must be one integer .*, got -5"),
        ("weight_ema", torch.full((64, 64), torch.nan), "weight_ema must be finite, got NaN or"),
        ("weight_ema", torch.full((64, 64), -torch.inf), "weight_ema must be finite, got NaN or"),
        ("weight_ema", torch.ones(3, 3), r"weight_ema must be floats of shape \[64, 64\]"),
        ("weight_ema", torch.ones(64, 64, dtype=torch.int64), "weight_ema must be floats of"),
        ("weight_ema", None, "weight_ema must be floats of shape .*, got None"),
    ],
)
def test_a_state_that_is_none_is_refused_before_it_is_taken(key, value, match):
    """Weight, average and count stay, and belong together; other layers load."""
    net = nn.Sequential(ema_layer(), ema_layer())
    optimizer = SGD(net.parameters(), lr=0.1)
    step(net, optimizer)
    state = copy.deepcopy(net.state_dict())
    for i in range(2):
        step(net, optimizer, i + 1)
    before = copy.deepcopy(net[0].state_dict())
    with pytest.raises(RuntimeError, match=f"mxtrain::load_state_dict: {match}"):
        net.load_state_dict({**state, f"0.{key}": value})
    after = net[0].state_dict()
    assert all(torch.equal(after[name], t) for name, t in before.items())
    assert (net[0]._ema_updates, net[1]._ema_updates) == (3, 1)
    assert net[0].ema_active


def test_an_average_of_another_float_type_becomes_float32():
    layer = ema_layer()
    state = layer.state_dict()
    state["weight_ema"] = state["weight_ema"].to(torch.bfloat16)
    layer.load_state_dict(state, assign=True)
    assert layer.weight_ema.dtype == torch.float32
    assert torch.equal(layer.weight_ema, state["weight_ema"].float())


def test_reset_parameters_restarts_the_average():
    layer = ema_layer()
    step(layer, SGD(layer.parameters(), lr=0.1))
    layer.reset_parameters()
    assert layer._ema_updates == 0 and torch.equal(layer.weight_ema, layer.weight)


def test_a_model_built_on_meta_averages_once_it_is_real():
    plain = nn.Linear(64, 64)
    assigned = ema_layer("meta")
    assert assigned(torch.empty(2, 64, device="meta")).shape == (2, 64)
    assigned.load_state_dict(plain.state_dict(), assign=True)
    emptied = ema_layer("meta").to_empty(device="cpu")
    emptied.load_state_dict(plain.state_dict())
    for layer in (assigned, emptied):
        for i in range(3):
            step(layer, SGD(layer.parameters(), lr=0.1), i)
        assert layer.ema_active and layer.weight_ema.isfinite().all()
        assert layer(torch.randn(2, 64)).isfinite().all()


def test_changing_the_recipe_adds_and_removes_the_state():
    layer = MXLinear(64, 64)
    layer.recipe = "tetrajet_ema"
    names = ["weight", "bias", "weight_ema", "ema_updates", "ema_peak_lr"]
    assert list(layer.state_dict()) == names
    optimizer = SGD(layer.parameters(), lr=0.1)
    for i in range(10):
        assert not layer.ema_active
        step(layer, optimizer, i)
    assert layer.ema_active
    before = layer.weight_ema.clone()
    layer.recipe = PAPER.replace(ema_beta=0.5, ema_warmup=20)
    assert list(layer.state_dict()) == names[:-1]
    assert torch.equal(layer.weight_ema, before) and not layer.ema_active
    layer.recipe = "tetrajet"
    assert list(layer.state_dict()) == ["weight", "bias"] and not layer.ema_active
    step(layer, optimizer)
    assert layer._ema_updates == 0


def test_q_ema_stops_an_oscillation():
    """T19: a weight that steps back and forth over a threshold: nearest flips it each time."""
    threshold, offset, size, steps = 0.25, 0.002, 0.01, 400
    layer = ema_layer(beta=0.998, warmup=1, features=32)
    optimizer = SGD([layer.weight], lr=1.0)
    with torch.no_grad():
        layer.weight.fill_(0.5)
        layer.weight[:, 0] = 6.0  # S = 1
        layer.weight[0, 1] = threshold + offset - size
    eye = torch.eye(32)
    codes = {True: [], False: []}
    for i in range(steps):
        layer.weight.grad = torch.zeros_like(layer.weight)
        layer.weight.grad[0, 1] = -2 * size if i % 2 == 0 else 2 * size
        optimizer.step()
        with torch.no_grad():
            for active in codes:
                layer.ema_active = active
                codes[active].append((layer(eye) - layer.bias)[1, 0].item())

    def flips(values):
        return sum(a != b for a, b in pairwise(values))

    assert flips(codes[False]) == steps - 1 and set(codes[False]) == {0.0, 0.5}
    assert flips(codes[True]) == 0 and set(codes[True]) == {0.5}


def test_q_ema_has_no_hysteresis():
    """T19: an average exactly at the threshold follows every step of the weight."""
    threshold, size = 0.25, 0.01
    w = torch.full((1, 32), 6.0)
    ema = w.clone()
    ema[0, 1] = threshold
    codes = []
    for i in range(50):
        w[0, 1] = threshold + (size if i % 2 == 0 else -size)
        ema.lerp_(w, 0.5 if i == 0 else 0.9)
        q = mxtrain.quantize(w, "mxfp4", rounding="toward", toward=ema)
        codes.append(q.dequantize()[0, 1].item())
    assert codes == [0.5, 0.0] * 25
