"""What only a GPU shows: graphs, streams, tensors beyond 2^31 elements, words of failures."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from common import FORMATS, assert_same_bytes, assert_same_operand, cuda_has

import mxtrain
from mxtrain import Quantizer, reference

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and cuda_has("quantize")),
    reason="no GPU that this build has code for",
)

STOCHASTIC = Quantizer("mxfp4", rounding="stochastic")
ROTATED = Quantizer("mxfp4", rounding="stochastic", hadamard=64, signs="drawn")


def capture(f) -> tuple[torch.cuda.CUDAGraph, object]:
    """f() captured after one call on a side stream; the graph and what f returned in it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        f()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = f()
    return graph, out


@pytest.mark.parametrize("format", FORMATS)
def test_graph_replays_draw_fresh_numbers_when_rng_advances(format):
    x = torch.randn(96, 128, device="cuda").bfloat16()
    rng = torch.tensor([5, 0], device="cuda")
    options = dict(rounding="stochastic", rng=rng, transpose=True)
    graph, out = capture(lambda: mxtrain.quantize(x, format, **options))
    seen = []
    for offset in (0, 1, 2, 1):
        rng[1] = offset
        graph.replay()
        torch.cuda.synchronize()
        on_cpu = {**options, "rng": torch.tensor([5, offset])}
        assert_same_operand(out, reference.quantize(x.cpu(), format, **on_cpu), f"offset {offset}")
        seen.append(out.data.clone())
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
    assert torch.equal(seen[1], seen[3])


def test_every_op_is_captured_and_replays_on_new_inputs():
    x = torch.randn(128, 192, device="cuda").bfloat16()
    wide = torch.randn(256, device="cuda")
    rng = torch.tensor([7, 3], device="cuda")
    signs = mxtrain.draw_signs(64, device="cuda")[0]

    def step() -> list[torch.Tensor]:
        a, b = mxtrain.quantize_dual(x, STOCHASTIC, ROTATED, rng=rng, col_signs=signs)
        c = mxtrain.requantize(a, rounding="stochastic", rng=rng)
        swizzled = mxtrain.swizzle_scale(a.scale)
        return [
            a.data, a.scale, b.data, b.scale, c.data, c.scale, swizzled,
            mxtrain.unswizzle_scale(swizzled, *a.scale.shape),
            c.dequantize(torch.bfloat16),
            mxtrain.hadamard(x, 64, signs),
            mxtrain.stochastic_round(wide, torch.bfloat16, rng),
            mxtrain.gemm(a, a),
        ]  # fmt: skip

    graph, out = capture(step)
    for seed in range(3):
        torch.manual_seed(seed)
        x.copy_(torch.randn(128, 192))
        wide.copy_(torch.randn(256))
        rng[1] = seed
        graph.replay()
        replayed = [t.clone() for t in out]
        for got, expected in zip(replayed, step(), strict=True):
            assert_same_bytes(got, expected)


def test_ops_run_on_the_current_stream_without_synchronizing():
    x = torch.randn(256, 256, device="cuda").bfloat16()
    rng = torch.tensor([1, 1], device="cuda")
    expected = mxtrain.quantize(x, "mxfp4", rounding="stochastic", rng=rng)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        y = torch.empty_like(x)
        torch.cuda._sleep(200_000_000)  # about 0.1 s in which y is not yet x
        y.copy_(x)
        got = mxtrain.quantize(y, "mxfp4", rounding="stochastic", rng=rng)
        busy = not stream.query()  # the op came back while the stream was asleep
    stream.synchronize()
    assert busy
    assert torch.equal(got.data, expected.data) and torch.equal(got.scale, expected.scale)


@pytest.mark.slow
@pytest.mark.parametrize(
    "format, rounding, hadamard, transpose",
    [
        ("mxfp4", "nearest", 0, False),
        ("mxfp4", "nearest", 0, True),
        ("mxfp4", "stochastic", 64, False),
        ("mxfp4", "stochastic", 64, True),
        ("mxfp8_e4m3", "stochastic", 0, True),
    ],
)
def test_beyond_two_to_the_31_elements(format, rounding, hadamard, transpose):
    """Every byte against the CPU's; needs 12 GiB of GPU memory and 20 of the host's."""
    rows, cols = (1 << 17) + 64, 16448  # 2.16e9 elements
    x = torch.empty(rows, cols, dtype=torch.bfloat16, device="cuda")
    generator = torch.Generator("cuda").manual_seed(3)
    for part in x.split(1 << 14):
        part.copy_(torch.randn(part.shape, device="cuda", generator=generator))
    rng = torch.tensor([9, 4]) if rounding == "stochastic" else None
    options = dict(rounding=rounding, hadamard=hadamard, transpose=transpose)
    got = mxtrain.quantize(x, format, rng=None if rng is None else rng.cuda(), **options)
    expected = mxtrain.quantize(x.cpu(), format, rng=rng, **options)
    for a, b in ((got.scale, expected.scale), (got.data, expected.data)):
        assert torch.equal(a.cpu(), b)


def test_a_failed_launch_names_op_grid_and_block():
    """A device-side assertion makes every later launch fail; the context dies with the process."""
    script = """
import torch, mxtrain
x = torch.randn(256, 256, device="cuda").bfloat16()
mxtrain.quantize(x, "mxfp4")  # its buffers stay cached
torch.cuda.synchronize()
try:
    torch.zeros(4, device="cuda")[torch.tensor([9], device="cuda")]
    torch.cuda.synchronize()
except Exception:
    pass
try:
    mxtrain.quantize(x, "mxfp4")
except RuntimeError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert "mxtrain::quantize: the kernel must launch, got cudaErrorAssert" in done.stdout, done
    assert "grid " in done.stdout and "block 256" in done.stdout, done.stdout
