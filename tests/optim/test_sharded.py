"""FSDP2: a step updates shards. One process holds all of each, so bits can be compared."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from optim_common import OPS, OPTIONS, gaussian
from torch import nn

import mxtrain
from mxtrain.optim import AdamW, QRamping

pytestmark = pytest.mark.ops(*OPS)


@pytest.fixture
def shard():
    """fully_shard on a mesh of this process alone."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("needs gloo")
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        yield lambda net: fsdp.fully_shard(net, mesh=mesh, reshard_after_forward=True)
    finally:
        dist.destroy_process_group()


def net(recipe: str) -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64), nn.LayerNorm(64))
    mxtrain.convert(model, recipe, include=["0", "2"])
    return model


def whole(t: torch.Tensor) -> torch.Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def compare(a: nn.Module, b: nn.Module, optimizers) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(whole(p), q)
        states = [optimizer.state[t] for optimizer, t in zip(optimizers, (p, q), strict=True)]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(whole(states[0][k]), v) for k, v in states[1].items())
    for p, q in zip(a.buffers(), b.buffers(), strict=True):
        assert torch.equal(p, q)


def test_adamw_with_averages(shard):
    plain, sharded = net("tetrajet_ema"), shard(net("tetrajet_ema"))
    optimizers = [AdamW(m.parameters(), **OPTIONS) for m in (sharded, plain)]
    for i in range(12):
        for model, optimizer in zip((sharded, plain), optimizers, strict=True):
            torch.manual_seed(i)
            optimizer.zero_grad()
            model(gaussian(16, 64, seed=i)).square().mean().backward()
            optimizer.step()
    compare(sharded, plain, optimizers)
    assert sharded[0]._ema_updates == plain[0]._ema_updates == 12
    states = mxtrain.export_weights(sharded), mxtrain.export_weights(plain)
    assert all(torch.equal(whole(states[0][k]), v) for k, v in states[1].items())
    optimizers[0].load_state_dict(optimizers[0].state_dict())
    compare(sharded, plain, optimizers)


def test_qramping(shard):
    plain, sharded = net("tetrajet"), shard(net("tetrajet"))
    optimizers = [QRamping(m.parameters(), m, max_period=50, k1=2.0, **OPTIONS)
                  for m in (sharded, plain)]  # fmt: skip
    shares = []
    for model, optimizer in zip((sharded, plain), optimizers, strict=True):
        torch.manual_seed(5)

        def forward_backward(model=model):
            model(torch.randn(16, 64)).square().mean().backward()

        for i in range(3):
            if i == 1:
                shares.append(optimizer.calibrate(forward_backward, transitions=5))
            optimizer.zero_grad()
            forward_backward()
            optimizer.step()
    assert shares[0] == shares[1] and max(shares[0].values()) > 0
    compare(sharded, plain, optimizers)
