"""What two ranks must agree on: run by test_two_ranks.py as `python two_ranks.py RANK STORE`."""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from optim_common import OPTIONS, gaussian
from test_sharded import compare, net
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import mxtrain
from mxtrain.optim import AdamW, QRamping


def everyones(t: Tensor) -> list[Tensor]:
    found = [torch.empty_like(t) for _ in range(dist.get_world_size())]
    dist.all_gather(found, t)
    return found


def shards_of_one_step(make) -> None:
    """FSDP2 on both ranks, which see the same batch: gradients are its own, the bits those of one
    process, parameters, state and averages."""
    plain, sharded = net("tetrajet_ema"), net("tetrajet_ema")
    fully_shard(sharded, mesh=dist.init_device_mesh("cpu", (2,)), reshard_after_forward=True)
    optimizers = [make(model) for model in (sharded, plain)]
    for i in range(6):
        for model, optimizer in zip((sharded, plain), optimizers, strict=True):
            torch.manual_seed(i)
            optimizer.zero_grad()
            model(gaussian(16, 64, seed=i)).square().mean().backward()
            optimizer.param_groups[0]["lr"] *= 0.7  # so that the average lags
            optimizer.step()
    assert sharded[0].weight.to_local().shape[0] == 48, "a rank holds half"
    assert not torch.equal(plain[0].weight_ema, plain[0].weight)
    compare(sharded, plain, optimizers)


def ramped_shards() -> None:
    def run(model: nn.Module) -> tuple[QRamping, dict]:
        optimizer = QRamping(model.parameters(), model, max_period=50, k1=2.0, **OPTIONS)
        torch.manual_seed(5)

        def forward_backward() -> None:
            optimizer.zero_grad()
            model(torch.randn(16, 64)).square().mean().backward()

        shares = optimizer.calibrate(forward_backward, transitions=5)
        for _ in range(4):
            forward_backward()
            optimizer.step()
        return optimizer, shares

    plain, sharded = net("tetrajet"), net("tetrajet")
    fully_shard(sharded, mesh=dist.init_device_mesh("cpu", (2,)), reshard_after_forward=True)
    (a, of_shards), (b, of_whole) = run(sharded), run(plain)
    compare(sharded, plain, (a, b))
    mine = torch.tensor([float(of_shards[name]) for name in sorted(of_shards)])
    both = torch.stack(everyones(mine)).mean(0)  # each rank's share is of its half
    expected = torch.tensor([float(of_whole[name]) for name in sorted(of_whole)])
    assert torch.allclose(mine, expected) or torch.allclose(both, expected), (mine, both, expected)


def thresholds(rank: int) -> None:
    """Ranks of other magnitudes keep one threshold, by what both counted; one that gets its first
    tokens late takes it."""
    torch.manual_seed(0)
    layer = mxtrain.MXLinear(256, 128, recipe="int8_fallback")
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    g = torch.Generator().manual_seed(rank)
    seen = []
    for step in range(6):
        if rank == 0 or step > 1:
            x = torch.randn(256, 256, generator=g) * (1.0 + 7.0 * rank)
            layer(x).square().mean().backward()
        for p in layer.parameters():
            p.grad = torch.zeros_like(p)
        before = everyones(layer.fallback_threshold)
        counts = sum(everyones(layer.fallback_counts))
        largest = torch.stack(before).max()
        optimizer.step()
        after = everyones(layer.fallback_threshold)
        assert torch.equal(*after), (step, after)
        assert step == 0 or torch.equal(*before), (step, before)
        rate = float(counts[0]) / float(counts[2] - counts[1])
        rule = layer.recipe.fallback
        move = int(rate > rule.high) - int(rate < rule.low)
        assert (after[0] > largest) == (move > 0) and (after[0] < largest) == (move < 0), step
        seen.append(rate)
    assert seen[0] != seen[3] and max(seen) > rule.high


def main(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    shards_of_one_step(lambda model: AdamW(model.parameters(), **OPTIONS))
    shards_of_one_step(lambda model: torch.optim.AdamW(model.parameters(), **OPTIONS))
    ramped_shards()
    thresholds(rank)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
    # All has been asserted. Without the interpreter's end, in which a rank has aborted now and
    # then, with no Python frame left, as where a thread still runs; the package has none.
    os._exit(0)
