"""The packed weight that MXLinear keeps: what it saves, that it changes no bit, and is never stale.

The reference is the same layer with `keep_packed = False`.
"""

from __future__ import annotations

import copy
import gc
import io
import pickle

import pytest
import torch
from cache_common import DataSGD, backward, equal, evaluate, in_place, inputs, network
from linear_common import ALL, OWN, ops_of
from torch import nn
from torch.optim import SGD, AdamW
from torch.utils.checkpoint import checkpoint

from mxtrain.linear import MXLinear, linear
from mxtrain.recipe import RECIPES

pytestmark = pytest.mark.ops("quantize", "quantize_dual", "requantize", "dequantize", "gemm")

recipes = pytest.mark.parametrize("recipe", ALL, ids=lambda r: r.name)
EMA = RECIPES["tetrajet_ema"].replace(ema_warmup=2, ema_beta=0.9)


# ---- what it saves ----

# Calls of quantize in three micro-steps of a layer: with the weight kept, and without. Besides
# those for the weight they hold three for X where a recipe makes one operand of it in the forward.
QUANTIZE = {
    "bf16": (0, 0), "mxfp4_baseline": (2, 6), "tetrajet": (4, 6), "tetrajet_ema": (4, 6),
    "mxfp4_backward": (6, 6), "mxfp4_backward_mxfp8": (4, 6), "mxfp8": (2, 6), "nvfp4": (2, 6),
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def no_sharded_modules():
    """Nothing is kept while FSDP2 has modules in the process: those of other tests go first."""
    gc.collect()


@pytest.mark.parametrize("name", QUANTIZE)
def test_weights_are_quantized_once_a_step(device, name):
    layer = MXLinear(128, 128, device=device, recipe=name)
    optimizer = SGD(layer.parameters(), lr=0.01)
    x = inputs(device).requires_grad_()

    def micro_steps():
        for _ in range(3):
            layer(x).sum().backward()

    kept, without = QUANTIZE[name]
    for _ in range(3):
        ops = ops_of(micro_steps)
        assert ops.count("quantize") == kept
        assert ops.count("requantize") == (6 if name.startswith("tetrajet") else 0)
        optimizer.step()
    layer.keep_packed = False
    assert ops_of(micro_steps).count("quantize") == without


@pytest.mark.parametrize("name", ["int8_block", "int8_fallback"])
def test_both_forms_of_int8_are_quantized_once_a_step(device, name):
    """W in the first forward, W^T in the first backward; else X, and dY once, in each."""
    layer = MXLinear(128, 128, device=device, recipe=name)
    optimizer = SGD(layer.parameters(), lr=0.01)
    x = inputs(device).requires_grad_()
    of_x = 1 if name == "int8_block" else 0  # the other has an op of its own
    for _ in range(2):
        counts = [ops_of(lambda: layer(x).sum().backward()).count("int8_quantize") for _ in "123"]
        assert counts == [of_x + 3, of_x + 1, of_x + 1]
        optimizer.step()
    layer(x)
    assert layer._cache._dgrad is None  # the old one does not lie beside the new one of fprop


@pytest.mark.parametrize("name", ["mxfp4_baseline", "tetrajet", "nvfp4"])
def test_an_evaluation_quantizes_the_weight_once(device, name):
    layer = MXLinear(128, 128, device=device, recipe=name).eval()
    x = inputs(device)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            ops = ops_of(lambda: [layer(x) for _ in range(4)])
            assert ops.count("quantize") in (4, 5) and ops.count("gemm") == 4
    with torch.no_grad():
        assert ops_of(lambda: layer(x)) == ["quantize", "gemm"]
    layer.eval()
    with torch.no_grad():
        assert ops_of(lambda: layer(x)) == ["quantize", "quantize", "gemm"]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["mxfp4_baseline", "tetrajet", "nvfp4"])
def test_a_checkpoint_quantizes_the_weight_once(device, name, reentrant):
    layer = MXLinear(128, 128, device=device, recipe=name)
    x = inputs(device).requires_grad_()

    def micro_step():
        checkpoint(layer, x, use_reentrant=reentrant).sum().backward()

    kept = ops_of(lambda: [micro_step() for _ in range(3)])
    layer.keep_packed = False
    without = ops_of(lambda: [micro_step() for _ in range(3)])
    dgrad = 0 if name == "tetrajet" else 2
    assert without.count("quantize") - kept.count("quantize") == 5 + dgrad
    assert without.count("requantize") == kept.count("requantize")


def test_a_deterministic_requantization_is_kept(device):
    """dgrad_w to nearest, from the forward operand."""
    recipe = next(r for r in OWN if r.name.startswith("nvfp4 forward"))
    layer = MXLinear(128, 128, device=device, recipe=recipe)
    x = inputs(device, 128).requires_grad_()
    counts = [ops_of(lambda: layer(x).sum().backward()).count("requantize") for _ in range(3)]
    assert counts == [2, 1, 1]


# ---- the same bits ----


@recipes
@pytest.mark.parametrize("optimizer", [SGD, AdamW, DataSGD])
def test_training_is_bitwise_the_same(device, recipe, optimizer):
    """Steps of three micro-steps, evaluations between, and a checkpoint loaded on the way."""
    recipe = EMA if recipe.ema_beta else recipe
    other = network(recipe, False, seed=9).state_dict()

    def train(keep):
        net = network(recipe, keep, device)
        step = optimizer(net.parameters(), lr=1e-3)
        out = []
        torch.manual_seed(3)
        for i in range(5):
            if i == 3:
                net.load_state_dict(other)
            for j in range(3):
                out += backward(net, inputs(device, seed=j))
            out += evaluate(net, inputs(device))
            step.step()
            net.zero_grad()
            out += evaluate(net, inputs(device))
        return out

    assert equal(train(True), train(False))


@recipes
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_is_bitwise_the_same(device, recipe, reentrant):
    def train(keep):
        net = network(recipe, keep, device)
        step = DataSGD(net.parameters(), lr=1e-3)
        out = []
        torch.manual_seed(3)
        for _ in range(2):
            for j in range(2):
                through = lambda net, x: checkpoint(net, x, use_reentrant=reentrant)  # noqa: E731
                out += backward(net, inputs(device, seed=j), through)
            step.step()
        return out

    assert equal(train(True), train(False))


@recipes
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: reload(m), copy.copy],
    ids=["deepcopy", "pickle", "torch.save", "copy"],
)
def test_copies_go_their_own_way(device, recipe, duplicate):
    layer = MXLinear(128, 128, device=device, recipe=recipe)
    x = inputs(device)
    backward(layer, x)
    twin = duplicate(layer)
    if duplicate is not copy.copy:
        assert twin._cache is not layer._cache and twin._cache._fprop is None
    with torch.no_grad():
        twin.weight.mul_(1.5)
    for m in (layer, twin, layer):
        torch.manual_seed(0)
        expected = linear(x, m.weight, m.bias, recipe)
        torch.manual_seed(0)
        assert torch.equal(m(x), expected)


def reload(layer):
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


# ---- never stale ----


def in_place_in_inference_mode(layer):
    with torch.inference_mode():
        layer.weight.mul_(1.5)


def a_view(layer):
    layer.weight.detach()[3:5].zero_()


def load(layer):
    layer.load_state_dict(MXLinear(128, 128, recipe=layer.recipe).state_dict())


def assign(layer):
    other = MXLinear(128, 128, device=layer.weight.device, recipe=layer.recipe)
    layer.load_state_dict(other.state_dict(), assign=True)


def new_parameter(layer):
    layer.weight = nn.Parameter(1.5 * layer.weight.detach())


def an_alias(layer):
    """Other memory of the same parameter, then a parameter of the same memory and version."""
    alias = nn.Parameter(layer.weight.data)
    for _ in range(layer.weight._version):
        with torch.no_grad():
            alias.mul_(1.5)
    layer.weight = alias


def new_data(layer):
    layer.weight.data = 1.5 * layer.weight.data


def new_data_twice(layer):
    """The second may lie where the first did."""
    for _ in range(2):
        layer.weight.data = layer.weight.data + 0.5


def swap(layer):
    torch.utils.swap_tensors(layer.weight, nn.Parameter(1.5 * layer.weight.detach()))


def cast(layer):
    layer.to(torch.bfloat16).to(torch.float32)


def recipe_of_the_layer(layer):
    layer.recipe = "mxfp8"


def optimizer_step(layer):
    SGD(layer.parameters(), lr=0.1).step()


def optimizer_step_through_data(layer):
    DataSGD(layer.parameters(), lr=0.1).step()


def optimizer_of_masters(layer):
    """Of which the layer knows nothing, and a copy back through data."""
    master = nn.Parameter(layer.weight.detach().clone())
    master.grad = torch.ones_like(master)
    DataSGD([master], lr=0.1).step()
    layer.weight.data.copy_(master)


def data_and_eval(layer):
    layer.weight.data.mul_(1.5)
    layer.eval()


def data_and_train(layer):
    layer.eval()
    layer(inputs(layer.weight.device))
    layer.weight.data.mul_(1.5)
    layer.train()


def data_by_hand(layer):
    layer.weight.data.mul_(1.5)
    layer.drop_cache()


def reset(layer):
    layer.reset_parameters()


CHANGES = [
    in_place, in_place_in_inference_mode, a_view, load, assign, new_parameter, an_alias, new_data,
    new_data_twice, swap, cast, recipe_of_the_layer, optimizer_step, optimizer_step_through_data,
    optimizer_of_masters, data_and_eval, data_and_train, data_by_hand, reset,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("recipe", [RECIPES["mxfp4_baseline"], RECIPES["nvfp4"], EMA],
                         ids=lambda r: r.name)  # fmt: skip
def test_a_change_is_seen(device, recipe, change):
    """Forward and backward after it equal those of the function, which keeps nothing."""
    layer = MXLinear(128, 128, device=device, recipe=recipe)
    x = inputs(device)
    for p in layer.parameters():
        p.grad = torch.randn_like(p)
    if recipe is EMA:
        for _ in range(3):
            SGD(layer.parameters(), lr=0.01).step()
        assert layer.ema_active
    backward(layer, x)
    before = layer(x).detach()
    change(layer)
    for _ in range(2):
        y, w = x.detach().requires_grad_(), layer.weight
        ema = layer.weight_ema if layer.ema_active else None
        torch.manual_seed(0)
        expected = linear(y, w, layer.bias, layer.recipe, ema)
        grads = torch.autograd.grad(expected.sum(), (y, w))
        torch.manual_seed(0)
        got = layer(y)
        assert torch.equal(got, expected)
        assert equal(torch.autograd.grad(got.sum(), (y, w)), grads)
    assert change is cast or not torch.equal(got.to(before), before)


def test_a_change_of_the_average_is_seen(device):
    layer = MXLinear(128, 128, device=device, recipe=EMA)
    x = inputs(device)
    for p in layer.parameters():
        p.grad = torch.randn_like(p)
    for _ in range(3):
        SGD(layer.parameters(), lr=0.1).step()

    def check():
        ema = layer.weight_ema if layer.ema_active else None
        expected = linear(x, layer.weight, layer.bias, EMA, ema)
        for _ in range(2):
            assert torch.equal(layer(x), expected)
        return expected

    first = check()
    layer.weight_ema.add_(0.05 * torch.randn_like(layer.weight_ema))
    second = check()
    layer.weight_ema = layer.weight_ema + 0.05 * torch.randn_like(layer.weight_ema)
    third = check()
    layer.ema_active = False
    fourth = check()
    assert not any(
        torch.equal(a, b) for a, b in ((first, second), (second, third), (third, fourth))
    )


def test_a_closure_that_calls_the_layer_inside_a_step(device):
    layer = MXLinear(128, 128, device=device, recipe="mxfp8")
    x = inputs(device)

    class Searching(DataSGD):
        def step(self, closure=None):
            for _ in range(3):
                closure()
                super().step()

    def closure():
        layer.zero_grad()
        y = layer(x)
        assert torch.equal(y, linear(x, layer.weight, layer.bias, "mxfp8"))
        y.square().sum().backward()

    layer(x)
    Searching(layer.parameters(), lr=1e-3).step(closure)
    closure()


def test_it_keeps_no_memory_of_the_weight_alive(device):
    layer = MXLinear(128, 128, device=device, recipe="mxfp8")
    backward(layer, inputs(device))
    storage = torch.multiprocessing.reductions.StorageWeakRef(layer.weight.untyped_storage())
    layer.zero_grad()
    layer.weight.data = layer.weight.data.clone()
    assert storage.expired()


def test_it_is_in_no_state_dict(device):
    layer = MXLinear(128, 128, device=device, recipe="mxfp8")
    backward(layer, inputs(device))
    assert layer._cache._fprop is not None and layer._cache._dgrad is not None
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert [name for name, _ in layer.named_buffers()] == []
