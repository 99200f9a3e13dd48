"""Split K of the fold backend on Hopper (csrc/cuda/split_k.h): who computes what, and the product.

The plan is checked on any machine; the product where the kernel runs. K is long in all of them,
and tiles are few.
"""

from __future__ import annotations

import random

import pytest
import torch
from common import assert_same_bytes
from test_gemm_fold import HAS_FOLD, TOLERANCE, exact, values

import mxtrain

needs_hopper = pytest.mark.skipif(
    not HAS_FOLD or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
)


@pytest.fixture(scope="module")
def plan():
    return pytest.importorskip(
        "mxtrain._host", reason="this library was built for another Python"
    ).split_k


# 128 x 128 tiles in 2, 3, 5, 10 and 16 slabs; ragged ones.
SHAPES = [
    (1024, 1024, 16384),
    (768, 768, 12608),
    (512, 768, 8192),
    (256, 256, 16384),
    (5, 300, 65536),
    (1000, 1023, 16380),
    (767, 770, 12600),
]


# ---- the plan, on any machine ----


def check_plan(p: dict, k: int) -> None:
    """Every stage of every tile once, in the order of K, which is that of the sum."""
    stages = [[] for _ in range(p["tiles"])]
    for tile, begin, end in p["segments"]:
        assert begin < end
        stages[tile] += range(begin, end)
    assert all(s == list(range(-(-k // 128))) for s in stages)


def test_plans_cover_the_product_once(plan):
    r = random.Random(0)
    split = 0
    for _ in range(3000):
        m, n = (r.choice((r.randint(1, 300), r.randint(1, 5000))) for _ in range(2))
        k = 2 ** r.randint(5, 16) - 32 * r.randint(0, 1) + 32
        sms = r.choice((132, 114, 78, 1, 2, 3, 131))
        p = plan(m, n, k, sms)
        if p["slabs"] == 1:
            assert p["segments"] == []
            continue
        split += 1
        assert len(p["segments"]) <= sms  # a thread block each
        check_plan(p, k)
    assert split > 500


def test_what_is_split_and_what_is_not(plan):
    """On 132 multiprocessors, as measured (docs/performance.md): what leaves half of them idle, but
    not what leaves fewer, or has little K."""
    for m, n, k in [*SHAPES, (256, 4096, 16384), (64, 8192, 8192)]:
        assert plan(m, n, k, 132)["slabs"] > 1, (m, n, k)
    for m, n, k in [(3072, 1024, 16384), (3072, 768, 12608), (1536, 1024, 16384),
                    (2048, 1536, 16384), (4096, 1024, 16384), (16384, 1024, 1024),
                    (4096, 4096, 4096), (64, 4096, 512), (8192, 8192, 8192),
                    (16384, 4096, 4096), (8192, 14336, 4096)]:  # fmt: skip
        assert plan(m, n, k, 132)["slabs"] == 1, (m, n, k)


# ---- the product ----


def operands(name: str, m: int, n: int, k: int) -> tuple[mxtrain.Operand, mxtrain.Operand]:
    return (
        mxtrain.quantize(values(name, m, k, seed=1), "mxfp4"),
        mxtrain.quantize(values(name, n, k, seed=2), "mxfp4"),
    )


@needs_hopper
@pytest.mark.parametrize("shape", SHAPES)
def test_split_products_are_right(shape, monkeypatch):
    """Within the bound on operands that err; the bytes of whole tiles on those that do not.

    On 132 multiprocessors all are split (test_what_is_split_and_what_is_not).
    """
    a, b = operands("blocks-4", *shape)
    got = mxtrain.gemm(a, b, out_dtype=torch.float32).double()
    product, magnitude = exact(a, b)
    assert ((got - product).abs() <= TOLERANCE["fp32"](shape[2]) * magnitude).all()
    del got, product, magnitude
    a, b = operands("gaussian", *shape)
    bias = values("gaussian", 1, shape[1], seed=3)[0]
    start = values("gaussian", *shape[:2], seed=4)
    got = []
    for split in ("1", "0"):
        monkeypatch.setenv("MXTRAIN_SPLIT_K", split)
        got.append([
            *(mxtrain.gemm(a, b, out_dtype=t) for t in (torch.float32, torch.bfloat16)),
            mxtrain.gemm(a, b, bias, alpha=0.7, out_dtype=torch.float16),
            mxtrain.gemm_add_(start.clone(), a, b, alpha=0.5),
        ])  # fmt: skip
    for one, other in zip(*got, strict=True):
        assert_same_bytes(one, other)


@needs_hopper
def test_split_products_of_nan_scales(monkeypatch):
    m, n, k = 1000, 1024, 16384
    x, y = values("gaussian", m, k, seed=1), values("gaussian", n, k, seed=2)
    x[3, 40] = x[999, k - 1] = y[7, k // 2] = float("nan")
    a, b = mxtrain.quantize(x, "mxfp4"), mxtrain.quantize(y, "mxfp4")
    expected = torch.zeros(m, n, dtype=torch.bool, device="cuda")
    expected[[3, 999], :] = expected[:, 7] = True
    assert torch.equal(mxtrain.gemm(a, b).isnan(), expected)


@needs_hopper
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2], SHAPES[6]])
def test_split_products_have_the_same_bytes_every_time(shape):
    """100 times over, and beside another on a second stream: who comes last differs.

    Their terms are of many sizes, so that a sum in another order would be another sum.
    """
    a, b = operands("blocks-4", *shape)
    one, other = ((a, b), (b, a))
    expected = [mxtrain.gemm(*pair, out_dtype=torch.float32) for pair in (one, other)]
    assert all(
        torch.equal(mxtrain.gemm(*one, out_dtype=torch.float32), expected[0]) for _ in range(100)
    )
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    got: list[list[torch.Tensor]] = [[], []]
    for _ in range(20):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                got[i].append(mxtrain.gemm(*(one, other)[i], out_dtype=torch.float32))
    torch.cuda.synchronize()
    assert all(torch.equal(t, expected[i]) for i in range(2) for t in got[i])


@needs_hopper
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2]])
def test_split_products_in_a_graph(shape):
    operands_of_it = operands("blocks-4", *shape)
    expected = mxtrain.gemm(*operands_of_it, out_dtype=torch.float32)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = mxtrain.gemm(*operands_of_it, out_dtype=torch.float32)
    for _ in range(3):
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, expected)
