"""Residuals of few blocks, packed and unpacked: bytes against a plain statement of the rule."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from common import refuses

pytestmark = pytest.mark.ops("int8_pack_residual", "int8_unpack_residual")
fwd = torch.ops.mxtrain
BLOCK = 128


def tile_of(residual, i, j):
    """Block (i, j), whole."""
    tile = residual[BLOCK * i : BLOCK * (i + 1), BLOCK * j : BLOCK * (j + 1)]
    return F.pad(tile, (0, 0, 0, BLOCK - len(tile)))


def expected_order(scale, mask):
    """Fallen blocks, the largest first, equal ones in the order of the grid (sorted is stable)."""
    rows, cols = mask.shape
    fell = [(i, j) for i in range(rows) for j in range(cols) if mask[i, j] and scale[i, j] >= 0]
    return sorted(fell, key=lambda block: -float(scale[block]))


def check(residual, scale, mask, count):
    """Both ways, against the rule."""
    order = expected_order(scale.cpu(), mask.cpu())[:count]
    pool, slots = fwd.int8_pack_residual(residual, scale, mask, count)
    assert pool.dtype == torch.int8 and pool.shape == (count, BLOCK, BLOCK)
    assert slots.dtype == torch.int32 and slots.shape == mask.shape
    want = torch.zeros(mask.shape, dtype=torch.int32)
    for tile, block in enumerate(order):
        want[block] = tile + 1
    assert torch.equal(slots.cpu(), want)
    for tile, block in enumerate(order):
        assert torch.equal(pool[tile], tile_of(residual, *block)), (tile, block)
    got = fwd.int8_unpack_residual(pool, slots, *residual.shape)
    assert got.dtype == torch.int8 and got.shape == residual.shape
    for block in order:
        assert torch.equal(tile_of(got, *block), tile_of(residual, *block)), block


def drawn(rows, kp, rate, device, turned=False):
    """Codes, scales of few values, some of them NaN, and a mask, with the grids in either order."""
    grid = -(-rows // BLOCK), kp // BLOCK
    residual = torch.randint(-127, 128, (rows, kp), dtype=torch.int8, device=device)
    scale = torch.randint(0, 4, grid, device=device).float()
    scale[torch.rand(grid, device=device) < 0.1] = float("nan")
    mask = (torch.rand(grid, device=device) < rate).to(torch.uint8)
    if turned:
        scale, mask = scale.t().contiguous().t(), mask.t().contiguous().t()
    return residual, scale, mask


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("rate", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("rows, kp", [(1, 128), (512, 640), (300, 256), (130, 1408), (128, 384)])
def test_the_rule(rows, kp, rate, turned, device):
    """Few and many blocks, ragged, none to all fallen, ties, NaN scales, every kind of count."""
    residual, scale, mask = drawn(rows, kp, rate, device, turned)
    blocks = mask.numel()
    for count in sorted({0, 1, -(-blocks // 4), -(-blocks // 2), blocks}):
        check(residual, scale, mask, count)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("rows, kp", [(3, 300 * 128), (300 * 128 - 5, 128), (40 * 128, 27 * 128)])
def test_more_blocks_than_threads(rows, kp, turned, device):
    """The last: more than a thread block looks at in one go."""
    residual, scale, mask = drawn(rows, kp, 0.1, device, turned)
    check(residual, scale, mask, 25)
    check(residual, scale, mask.contiguous(), 25)


def test_all_of_one_scale_are_in_the_order_of_the_grid(device):
    residual, _, mask = drawn(384, 384, 1.0, device)
    scale = torch.full((3, 3), 0.5, device=device).t()
    check(residual, scale, mask.t(), 5)
    _, slots = fwd.int8_pack_residual(residual, scale, mask.t(), 5)
    assert slots.flatten().tolist() == [1, 2, 3, 4, 5, 0, 0, 0, 0]


def test_a_nan_scale_never_fell_back(device):
    residual, _, _ = drawn(256, 256, 1.0, device)
    scale = torch.tensor([[float("nan"), 1.0], [3.0, float("nan")]], device=device)
    mask = torch.tensor([[1, 1], [1, 0]], dtype=torch.uint8, device=device)
    check(residual, scale, mask, 3)
    _, slots = fwd.int8_pack_residual(residual, scale, mask, 3)
    assert slots.tolist() == [[0, 2], [1, 0]]


def test_tensors_that_lie_anyhow(device):
    """Codes from an odd address on, of a transpose, in columns of more; a pool that is a view."""
    _, scale, mask = drawn(300, 256, 0.7, device)
    room = torch.randint(-127, 128, (300 * 512 + 1,), dtype=torch.int8, device=device)
    for residual in (
        room[1 : 1 + 300 * 256].view(300, 256),
        room[: 300 * 256].view(256, 300).t(),
        room[:-1].view(300, 512)[:, 128:384],
    ):
        check(residual, scale, mask, 4)
    residual = room[: 300 * 256].view(300, 256)
    pool, slots = fwd.int8_pack_residual(residual, scale, mask, 4)
    want = fwd.int8_unpack_residual(pool, slots, 300, 256)
    odd = torch.empty(4 * BLOCK * BLOCK + 1, dtype=torch.int8, device=device)[1:]
    odd = odd.view(4, BLOCK, BLOCK).copy_(pool)
    got = fwd.int8_unpack_residual(odd, slots.repeat(2, 2)[:3, :2], 300, 256)
    for block in slots.nonzero().tolist():
        assert torch.equal(tile_of(got, *block), tile_of(want, *block))


def test_without_blocks(device):
    empty = torch.empty(0, 256, dtype=torch.int8, device=device)
    scale, mask = torch.ones(0, 2, device=device), torch.ones(0, 2, device=device).byte()
    pool, slots = fwd.int8_pack_residual(empty, scale, mask, 0)
    assert pool.shape == (0, BLOCK, BLOCK) and slots.shape == (0, 2)
    assert fwd.int8_unpack_residual(pool, slots, 0, 256).shape == (0, 256)


@pytest.mark.parametrize("bad", [5, -1, 2**31 - 1, -(2**31)])
def test_slots_beyond_the_pool(bad, device, looks_at_values):
    """The CPU refuses them; CUDA writes nothing there."""
    residual, _, mask = drawn(256, 256, 1.0, device)
    pool, slots = fwd.int8_pack_residual(residual, torch.ones(2, 2, device=device), mask, 4)
    slots[1, 0] = bad
    if looks_at_values:
        with refuses(RuntimeError, match=rf"slots must lie in \[0, 4\], got {bad} \(block 1, 0"):
            fwd.int8_unpack_residual(pool, slots, 256, 256)
        return
    got = fwd.int8_unpack_residual(pool, slots, 256, 256)
    for block in ((0, 0), (0, 1), (1, 1)):
        assert torch.equal(tile_of(got, *block), tile_of(residual, *block))


def test_under_compile_sizes_are_symbols(device):
    """Other rows, and so other counts and pools, need no compilation of their own."""

    def both(residual, scale, mask):
        count = (mask.shape[0] * mask.shape[1] + 1) // 2
        pool, slots = fwd.int8_pack_residual(residual, scale, mask, count)
        return fwd.int8_unpack_residual(pool, slots, *residual.shape), slots

    torch.compiler.reset()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (300, 512, 700):
            args = drawn(rows, 512, 0.6, device)
            (got, slots), (want, same) = compiled(*args), both(*args)
            assert torch.equal(slots, same) and slots.any()
            for block in slots.nonzero().tolist():
                assert torch.equal(tile_of(got, *block), tile_of(want, *block))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_in_a_cuda_graph():
    """Captured once, replayed on other scales, masks and codes."""
    held = drawn(700, 640, 0.5, "cuda")

    def both():
        pool, slots = fwd.int8_pack_residual(*held, 12)
        return pool, slots, fwd.int8_unpack_residual(pool, slots, 700, 640)

    both()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pool, slots, back = both()
    for rate in (0.2, 0.9):
        for t, new in zip(held, drawn(700, 640, rate, "cuda"), strict=True):
            t.copy_(new)
        graph.replay()
        order = expected_order(held[1].cpu(), held[2].cpu())[:12]
        assert sorted(order) == list(map(tuple, slots.nonzero().tolist())) and order
        for tile, block in enumerate(order):
            assert slots[block] == tile + 1
            assert torch.equal(pool[tile], tile_of(held[0], *block))
            assert torch.equal(tile_of(back, *block), tile_of(held[0], *block))
