"""The fused AdamW: bitwise the reference and torch's, the paper in float64, Q-EMA in the pass."""

from __future__ import annotations

import pytest
import torch
from common import assert_same_bytes, refuses
from optim_common import (
    BETAS,
    DECAY,
    EPS,
    LR,
    NUMBERS,
    OPS,
    OPTIONS,
    Float64,
    assert_same_state,
    changes,
    gaussian,
    model,
    snapshot,
    train,
)
from torch import nn

import mxtrain
from mxtrain import reference
from mxtrain.optim import AdamW

pytestmark = pytest.mark.ops(*OPS)
SHAPES = [(3, 40), (64, 96), (1,), (2049,), (0,), (7, 5, 3)]


def state(shape, dtype=torch.float32, seed=0):
    p = gaussian(*shape, seed=seed).to(dtype)
    m, v = 0.1 * gaussian(*shape, seed=seed + 1), gaussian(*shape, seed=seed + 2).square() * 1e-3
    return p, gaussian(*shape, seed=seed + 3).to(dtype), m, v


def call(device, tensors, steps, *more):
    """adamw_ on copies on the device: [params, grads, exp_avgs, exp_avg_sqs] and the steps."""
    lists = [[t.clone().to(device) for t in part] for part in zip(*tensors, strict=True)]
    counts = [torch.tensor(float(s), device=device) for s in steps]
    torch.ops.mxtrain.adamw_(*lists, counts, *NUMBERS, None, *(more or (None, [], [], [], [])))
    return lists, counts


@pytest.mark.parametrize("count", [1, 6, 70])
def test_a_list_is_bitwise_the_reference(device, count):
    """More tensors than a launch takes, empty ones and tails among them."""
    tensors = [state(SHAPES[i % len(SHAPES)], seed=i) for i in range(count)]
    (got, grads, ms, vs), steps = call(device, tensors, range(count))
    for i, (p, g, m, v) in enumerate(tensors):
        f = reference.factors(i + 1, *NUMBERS)
        expected = reference.adamw(p, g, m, v, f)
        for a, b in zip((got[i], ms[i], vs[i]), expected, strict=True):
            assert_same_bytes(a, b, f"tensor {i}")
        assert_same_bytes(grads[i], g)
        assert steps[i] == i + 1


def test_views_without_alignment_are_updated(device):
    """A parameter of a flat buffer may start anywhere."""
    tensors = state((1000,))
    buffers = [torch.full((1010,), 7.0, device=device) for _ in tensors]
    views = [b[3:1003] for b in buffers]
    for view, t in zip(views, tensors, strict=True):
        view.copy_(t)
    step = torch.zeros((), device=device)
    p, g, m, v = ([view] for view in views)
    torch.ops.mxtrain.adamw_(p, g, m, v, [step], *NUMBERS, None, None, [], [], [], [])
    expected = reference.adamw(*tensors, reference.factors(1, *NUMBERS))
    for view, e in zip((views[0], *views[2:]), expected, strict=True):
        assert_same_bytes(view, e)
    assert all((b[:3] == 7).all() and (b[1003:] == 7).all() for b in buffers)


@pytest.mark.parametrize("n", [1, 2, 10, 999, 12345, 2**24 - 1])
def test_the_factors_are_those_of_float64(device, n):
    """One element each: m = 0, v = 0 and g = 1 leave the factors to be read."""
    one = [torch.zeros(1, device=device) for _ in range(3)]
    step, g = torch.tensor(n - 1.0, device=device), torch.ones(1, device=device)
    p, m, v = ([t] for t in one)
    for beta2 in (0.95, 0.999, 0.999999):
        numbers = (0.3, 0.9, beta2, 0.0, 0.0)
        torch.ops.mxtrain.adamw_(p, [g], m, v, [step], *numbers, None, None, [], [], [], [])
        zero = torch.zeros(1)
        expected = reference.adamw(zero, g.cpu(), zero, zero, reference.factors(n, *numbers))
        assert_same_bytes(p[0], expected[0])
        for t in (*one, step):
            t.fill_(0)
        step.fill_(n - 1)


def test_bf16_weights_round_stochastically_as_stochastic_round_does(device):
    tensors = [state((64, 96), torch.bfloat16), state((131,), torch.bfloat16, seed=9)]
    rng = torch.tensor([[5, 6], [7, 8]])
    for given in (rng, None):
        on = None if given is None else given.to(device)
        (got, *_), _ = call(device, tensors, (0, 4), on, [], [], [], [])
        for i, (p, g, m, v) in enumerate(tensors):
            f = reference.factors((1, 5)[i], *NUMBERS)
            exact = reference.adamw(p.float(), g.float(), m, v, f)[0]
            expected = exact.bfloat16()
            if given is not None:
                expected = reference.stochastic_round(exact, torch.bfloat16, given[i])
            assert_same_bytes(got[i], expected)


@pytest.mark.parametrize("shape", [(5, 96), (7, 40), (3, 33), (1, 64), (2, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rounding", ["nearest", "toward"])
def test_changes_are_those_of_the_quantizer(device, shape, dtype, rounding):
    """Ragged rows too; the average moves in the same pass."""
    p, g, m, v = state(shape, dtype)
    ema = p.float() + 0.2 * gaussian(*shape, seed=8)
    before = [torch.rand(shape, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    moved, flipped = (t.clone().to(device) for t in before)
    average = ema.clone().to(device)
    rng = torch.tensor([[5, 6]], device=device)
    code = ("nearest", "stochastic", "toward").index(rounding)
    (got, *_), _ = call(
        device, [(p, g, m, v)], [0], rng, [average], [0.3], [moved], [flipped], 1, code
    )
    exact = reference.adamw(p.float(), g.float(), m, v, reference.factors(1, *NUMBERS))[0]
    after = exact if dtype == torch.float32 else reference.stochastic_round(
        exact, dtype, rng[0].cpu()
    )  # fmt: skip
    assert_same_bytes(got[0], after)
    assert_same_bytes(average, reference.lerp(ema, after.float(), 0.3))
    expected = changes(p, after, rounding=rounding, averages=(ema, average.cpu()))
    for got, old, new in zip((moved, flipped), before, expected, strict=True):
        assert_same_bytes(got, old + new)
    assert expected[1].any() or p.numel() < 8


def test_a_block_that_is_not_finite_is_no_number(device):
    p, g, m, v = state((2, 64))
    p[0, 3] = torch.inf
    sums = [torch.zeros(2, 64, device=device) for _ in range(2)]
    call(device, [(p, g, m, v)], [0], None, [], [], sums[:1], sums[1:])
    assert sums[1][0, :32].isnan().all() and sums[1].isnan().sum() == 32


def test_it_is_the_paper_in_float64_over_1000_steps(device):
    """Two roundings of the weight a step; those of its small update are far below them."""
    p = nn.Parameter(gaussian(4, 33).to(device))
    optimizer, exact = AdamW([p], **OPTIONS), Float64(p.detach().cpu().clone())
    for i in range(1000):
        g = gaussian(4, 33, seed=i) + 0.2
        p.grad = g.to(device)
        optimizer.step()
        exact.step(g)
    error = (p.detach().cpu().double() - torch.from_numpy(exact.p)).abs().max()
    assert error < 1000 * 2 * 2**-24 * abs(exact.p).max(), error
    assert abs(exact.p).max() < 5 and abs(exact.p + 1).max() > 0.5


def test_it_is_torchs_adamw(device):
    """On CUDA bitwise (foreach, the default); on the CPU torch orders two operations otherwise, and
    its square root is not rounded correctly: the first moment is bitwise, the rest to 1e-6."""
    params = [gaussian(*shape, seed=i).to(device) for i, shape in enumerate(SHAPES)]
    mine, theirs = ([nn.Parameter(p.clone()) for p in params] for _ in range(2))
    optimizers = AdamW(mine, **OPTIONS), torch.optim.AdamW(theirs, **OPTIONS)
    for i in range(300):
        for pair in zip(mine, theirs, strict=True):
            g = gaussian(*pair[0].shape, seed=i).to(device) + 0.1
            for p in pair:
                p.grad = g.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(mine, theirs, strict=True):
        x, y = optimizers[0].state[a], optimizers[1].state[b]
        assert_same_bytes(x["exp_avg"], y["exp_avg"])
        if device == "cuda":
            assert_same_bytes(x["exp_avg_sq"], y["exp_avg_sq"])
            assert_same_bytes(a.detach(), b.detach())
        assert torch.allclose(x["exp_avg_sq"], y["exp_avg_sq"], rtol=1e-6, atol=0)
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-6)


def test_cpu_and_cuda_agree(device):
    """A model in float32: the same gradients give the same bits on every device."""
    params = [nn.Parameter(gaussian(*s, seed=i).to(device)) for i, s in enumerate(SHAPES)]
    optimizer = AdamW(params, **OPTIONS)
    expected = [(p.detach().cpu(), *[torch.zeros(p.shape)] * 2) for p in params]
    for i in range(20):
        f = reference.factors(i + 1, LR, *BETAS, EPS, DECAY)
        for j, p in enumerate(params):
            g = gaussian(*p.shape, seed=i)
            p.grad = g.to(device)
            q, m, v = expected[j]
            expected[j] = reference.adamw(q, g, m, v, f)
        optimizer.step()
    for p, e in zip(params, expected, strict=True):
        assert_same_bytes(p.detach(), e[0])


def test_the_average_is_that_of_the_hook_and_counted_once(device):
    """The first update copies, later ones are torch.lerp; the forward uses it after the warm-up."""
    net = model(mxtrain.get_recipe("tetrajet_ema").replace(ema_at_half=None), device)
    optimizer = AdamW(net.parameters(), **OPTIONS)
    layers, expected = (net[0], net[3]), [None, None]
    for i in range(14):
        train(net, optimizer, 1, first=i)
        for j, layer in enumerate(layers):
            w = layer.weight.detach()
            expected[j] = w.clone() if i == 0 else expected[j].lerp_(w, 1 - 0.998)
            assert_same_bytes(layer.weight_ema, expected[j], f"step {i}, layer {j}")
            assert layer._ema_updates == i + 1 and layer.ema_active == (i >= 9)


def test_weights_that_share_freeze_or_rest_are_averaged_too():
    net = model("tetrajet_ema")
    other = mxtrain.MXLinear(64, 96, recipe="tetrajet_ema")
    other.weight = net[0].weight
    optimizer = AdamW([*net.parameters(), other.bias], **OPTIONS)
    net[3].weight.requires_grad_(False)
    train(net, optimizer, 3)
    assert (net[0]._ema_updates, other._ema_updates, net[3]._ema_updates) == (3, 3, 0)
    assert torch.equal(net[0].weight_ema, other.weight_ema)
    net[3].weight.requires_grad_(True)  # held, trained, without a gradient: averaged as by the hook
    net[3].weight.grad = None
    net[0].weight.grad = torch.ones_like(net[0].weight)
    optimizer.step()
    assert (net[0]._ema_updates, net[3]._ema_updates) == (4, 1)


def test_state_dicts_go_both_ways(device, tmp_path):
    net = model(device=device, dtype=torch.bfloat16)
    optimizer = AdamW(net.parameters(), **OPTIONS)
    train(net, optimizer, 3)
    torch.save([net.state_dict(), optimizer.state_dict()], tmp_path / "checkpoint.pt")
    states = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert_same_state(states[1], optimizer.state_dict())
    again = model(device=device, dtype=torch.bfloat16)
    resumed = AdamW(again.parameters(), lr=0.5)
    again.load_state_dict(states[0])
    resumed.load_state_dict(states[1])
    assert_same_state(resumed.state_dict(), optimizer.state_dict())
    assert all(s["exp_avg"].dtype == torch.float32 for s in resumed.state.values())
    for n, o in ((net, optimizer), (again, resumed)):
        train(n, o, 3, first=3)
    assert_same_state(snapshot(again, resumed), snapshot(net, optimizer))


def test_a_checkpoint_of_torchs_adamw_loads(device):
    mine, theirs = (nn.Parameter(gaussian(8, 40).to(device)) for _ in range(2))
    a, b = AdamW([mine], lr=0.5), torch.optim.AdamW([theirs], **OPTIONS)
    for i in range(3):
        theirs.grad = gaussian(8, 40, seed=i).to(device)
        b.step()
    with torch.no_grad():
        mine.copy_(theirs)
    a.load_state_dict(b.state_dict())
    assert a.param_groups[0]["lr"] == LR and a.state[mine]["step"].device == mine.device
    for p, optimizer in ((mine, a), (theirs, b)):
        p.grad = gaussian(8, 40, seed=9).to(device)
        optimizer.step()
    assert torch.allclose(mine, theirs, rtol=1e-6, atol=1e-7)


def test_channels_last_and_gradients_of_another_layout(device):
    """Elements go together wherever they lie in memory."""
    w = gaussian(4, 6, 3, 3).to(device)
    p, q = nn.Parameter(w.to(memory_format=torch.channels_last)), nn.Parameter(w.clone())
    optimizer = AdamW([p, q], **OPTIONS)
    for i in range(3):
        g = gaussian(4, 6, 3, 3, seed=i).to(device)
        p.grad, q.grad = g.clone(), g.to(memory_format=torch.channels_last)
        optimizer.step()
    assert not p.is_contiguous() and torch.equal(p, q)


def test_a_tensor_learning_rate_is_read_where_it_lies(device):
    a, b, c = (nn.Parameter(gaussian(40).to(device)) for _ in range(3))
    lr = torch.tensor(LR, dtype=torch.float64)
    optimizers = [AdamW([a], lr=LR), AdamW([b], lr=lr.to(device)), AdamW([c], lr=lr)]
    for p, optimizer in zip((a, b, c), optimizers, strict=True):
        p.grad = gaussian(40, seed=4).to(device)
        optimizer.step()
    assert torch.equal(a, b) and torch.equal(a, c)


def test_autograd_and_the_packed_weight_see_the_step():
    net = model()
    layer, optimizer = net[0], AdamW(net.parameters(), **OPTIONS)
    x = gaussian(4, 64)
    before = layer(x)
    version = layer.weight._version
    train(net, optimizer, 1)
    assert layer.weight._version > version
    assert not torch.equal(layer(x), before)
    assert torch.equal(layer(x), mxtrain.linear(x, layer.weight, layer.bias))


def test_changes_are_summed_over_the_steps_of_a_block(device):
    net = model(device=device)
    optimizer = AdamW(net.parameters(), **OPTIONS)
    train(net, optimizer, 2)
    weight, sums = net[3].weight, [torch.zeros(40, 96), torch.zeros(40, 96)]
    with optimizer.track_changes(net) as tracked:
        for i in range(3):
            before = weight.detach().cpu().clone()
            train(net, optimizer, 1, first=2 + i)
            for total, c in zip(sums, changes(before, weight.detach().cpu()), strict=True):
                total += c
    train(net, optimizer, 1, first=9)  # outside of it
    for got, expected in zip(tracked[weight], sums, strict=True):
        assert_same_bytes(got, expected)
    assert [name for name, _ in tracked.items()] == ["0", "3"] and net[4].weight not in tracked
    assert_same_bytes(tracked.ratio(weight), sums[1] / (sums[0] + 1e-8))


def test_a_linear_drift_has_a_ratio_near_one():
    """T21: grid steps are crossed once each, so Q moves as far as w."""
    layer = mxtrain.MXLinear(32, 1, bias=False)
    optimizer = AdamW([layer.weight], lr=0.01, betas=(0.0, 0.0), eps=1e-12, weight_decay=0.0)
    with torch.no_grad():
        layer.weight.fill_(-1.9)
        layer.weight[:, 0] = 6.0
    with optimizer.track_changes(layer) as tracked:
        for _ in range(380):  # to 1.9, by 0.01
            layer.weight.grad = torch.full_like(layer.weight, -1.0)
            layer.weight.grad[:, 0] = 0.0
            optimizer.step()
    ratio = tracked.ratio(layer.weight)[0, 1:]
    assert (ratio - 1).abs().max() < 0.06


BAD = [
    ({"lr": -1.0}, ValueError, r"AdamW: lr must lie in \[0, inf\), got -1"),
    ({"lr": float("nan")}, ValueError, "lr must lie in"),
    ({"lr": torch.ones(2)}, ValueError, "lr must be a float or a tensor of one real number"),
    ({"betas": (1.0, 0.9)}, ValueError, r"betas\[0\] must lie in \[0, 1\)"),
    ({"betas": 0.9}, ValueError, "betas must be two floats"),
    ({"eps": -1e-9}, ValueError, "eps must lie in"),
    ({"weight_decay": "x"}, ValueError, "weight_decay must lie in"),
    ({"stochastic_rounding": 1}, TypeError, "stochastic_rounding must be True or False"),
]


@pytest.mark.parametrize(("options", "error", "match"), BAD)
def test_options_out_of_range_are_refused(options, error, match):
    with refuses(error, match):
        AdamW([nn.Parameter(torch.ones(2))], **options)


def sparse_grad(p):
    p.grad = torch.ones(2, 3).to_sparse()


def set_grad(p):
    p.grad = torch.ones_like(p)


@pytest.mark.parametrize(
    ("p", "prepare", "error", "match"),
    [
        (torch.ones(2, 3).half(), set_grad, TypeError, "parameters must be float32 or bfloat16"),
        (torch.ones(2, 3).double(), set_grad, TypeError, "parameters must be float32 or bfloat16"),
        (torch.ones(2, 3), sparse_grad, TypeError, "gradients must be dense"),
        (torch.ones(2, 6)[:, ::2], set_grad, ValueError, "parameters must be dense"),
    ],
)
def test_what_cannot_be_updated_is_refused_before_anything_changes(p, prepare, error, match):
    good, bad = nn.Parameter(torch.ones(4)), nn.Parameter(p)
    optimizer = AdamW([good, bad], lr=0.1)
    good.grad = torch.ones(4)
    prepare(bad)
    with refuses(error, match):
        optimizer.step()
    assert (good == 1).all() and not optimizer.state


def test_a_group_out_of_range_is_refused_before_anything_changes():
    a, b = (nn.Parameter(torch.ones(4)) for _ in range(2))
    optimizer = AdamW([{"params": [a]}, {"params": [b]}], lr=0.1)
    a.grad = b.grad = torch.ones(4)
    optimizer.param_groups[1]["betas"] = (0.9, 1.0)
    with refuses(ValueError, r"AdamW.step: betas\[1\] must lie in \[0, 1\), got 1"):
        optimizer.step()
    assert (a == 1).all() and not optimizer.state


def test_tracking_needs_weights_to_track():
    net = model()
    optimizer = AdamW(net[4].parameters(), lr=0.1)
    with refuses(ValueError, "model must have a weight that this optimizer holds, got none"):
        optimizer.track_changes(net)
    with refuses(TypeError, "model must be a torch.nn.Module"):
        optimizer.track_changes(3)
    optimizer = AdamW(net.parameters(), lr=0.1)
    with optimizer.track_changes(net), refuses(RuntimeError, "track one set of changes at a time"):
        optimizer.track_changes(net).__enter__()
    assert optimizer.tracker is None
