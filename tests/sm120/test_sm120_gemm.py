"""The block-scaled GEMM of csrc/cuda/sm120 on whatever GPU runs it.

On Hopper it is the backend sm120_emulated: every load, address, fragment, stage and store of the
kernel, and in the place of its one instruction the emulation that test_mma_block_scale.py checks.
On 12.x it is sm120. Random calls run on the CPU, too, where the CUDA kernels have been built for it
(docs/emulation.md). Under a memory and a race checker (--tool memcheck, --tool racecheck):

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck \\
        --kernel-name kernel_substring=mxtrain \\
        python -m pytest tests/sm120/test_sm120_gemm.py -k "part0 or wide or tiles"
"""

from __future__ import annotations

import random
from dataclasses import replace

import emulated
import pytest
import torch
from common import assert_same_bytes, refuses
from sm120_common import NATIVE, SM120_BACKEND
from test_gemm_sweep import Call, backend, check, random_operand

import mxtrain
from mxtrain._library import CATALOGUE, gemm_backend
from mxtrain.env import gemm_backend_here

FORMATS = ["mxfp4", "nvfp4", "mxfp8_e4m3", "mxfp8_e5m2"]
PARTS, CALLS = 8, 25  # of a part

EMULATED = "sm120_emulated"

needs_sm120 = pytest.mark.skipif(not SM120_BACKEND, reason="needs a GPU that runs sm120's kernels")
needs_emulation = pytest.mark.skipif(
    emulated.library() is None, reason=f"{emulated.LIBRARY} has not been built"
)


@pytest.fixture
def sm120():
    with backend(SM120_BACKEND):
        yield


def on_sm120(test):
    return needs_sm120(pytest.mark.usefixtures("sm120")(test))


# ---- what takes it ----


def test_auto_takes_it_on_12_only_and_says_which_suffix_is_missing():
    archs = CATALOGUE["build"]["cuda_archs"].split(";")
    if archs == [""]:
        pytest.skip("a build with CUDA chooses")
    for (major, minor), arch in NATIVE.items():
        for name, fmt in mxtrain.FORMATS.items():
            chosen = gemm_backend(major, minor, fmt.code)
            if name not in FORMATS:
                assert chosen.startswith("dequant: ")
            elif arch in archs:
                assert chosen.startswith("sm120: block-scaled tensor cores")
            else:
                assert chosen.startswith("dequant: ") and f"MXTRAIN_CUDA_ARCHS={arch}" in chosen
    for major, minor in [(8, 0), (8, 9), (9, 0)]:
        for fmt in mxtrain.FORMATS.values():
            assert "sm120" not in gemm_backend(major, minor, fmt.code)


@needs_sm120
def test_it_is_refused_where_it_does_not_run():
    a = mxtrain.quantize(torch.ones(4, 64, device="cuda"), "mxfp6_e3m2")
    with backend(SM120_BACKEND), refuses(RuntimeError, "serves format mxfp6_e3m2 here, got sm120"):
        mxtrain.gemm(a, a)
    a = mxtrain.quantize(torch.ones(4, 64, device="cuda"), "mxfp4")
    other = "sm120" if SM120_BACKEND == "sm120_emulated" else "sm120_emulated"
    with backend(other), refuses(RuntimeError, f"got {other} .*built for 120a"):
        mxtrain.gemm(a, a)
    if SM120_BACKEND == "sm120_emulated":
        assert gemm_backend_here("mxfp4") != "sm120_emulated"


@on_sm120
def test_scales_of_another_size_are_refused_with_the_size_they_should_have():
    data = torch.zeros(5, 64, dtype=torch.uint8, device="cuda")
    scale = torch.zeros(5, 4, dtype=torch.uint8, device="cuda")
    call = lambda s: torch.ops.mxtrain.gemm(  # noqa: E731
        data, s, None, data, scale, None, 0, None, 1.0, torch.float32, 0
    )
    assert call(scale).shape == (5, 5)
    for wrong in [scale[:, :3], scale[:4], torch.zeros(128, 4, dtype=torch.uint8, device="cuda")]:
        with refuses(RuntimeError, r"a scale must have shape \[5, 4\], got"):
            call(wrong)
    swizzled = torch.ops.mxtrain.swizzle_scale(scale)
    assert torch.equal(call(swizzled), call(scale))
    with refuses(RuntimeError, r"a scale must have shape \[1, 1, 512\] where it is swizzled, got"):
        call(swizzled[:, :, :256])


# ---- the product ----


def draw(r: random.Random) -> Call:
    return replace(Call.draw(r), format=r.choice(FORMATS), backend=SM120_BACKEND or EMULATED)


def check_part(part: int, device: str) -> None:
    """Elementwise: a sum within K * 2^-24 |A||B|^T of float64, then float32 and D's rounding."""
    r = random.Random(part)
    for i in range(CALLS):
        check(draw(r), 1000 * part + i, device)


def check_tiles(format: str, multiprocessors: int, device: str) -> None:
    """Random calls with a wide tile for each multiprocessor, with two, and with narrow ones."""
    down = max(d for d in range(1, 17) if multiprocessors % d == 0)
    r = random.Random(format)
    for times, accumulate in [(1, "fp32"), (2, "fast"), (2, "exact")]:
        m = 128 * down * times - r.randint(0, 127)
        n = 256 * (multiprocessors // down) - r.randint(0, 127)
        k = r.randint(1, 300)
        check(replace(draw(r), m=m, n=n, k=k, format=format, accumulate=accumulate), times, device)


def check_lines(format: str, device: str) -> None:
    """Random calls of one row, of one column, and of both."""
    r = random.Random(f"{format} lines")
    for seed, (m, n) in enumerate([(1, 0), (1, 0), (0, 1), (0, 1), (1, 1)]):
        shape = {"m": m or r.randint(2, 300), "n": n or r.randint(2, 300), "k": r.randint(1, 600)}
        check(replace(draw(r), format=format, **shape), seed, device)


@on_sm120
@pytest.mark.parametrize("part", range(PARTS), ids=lambda part: f"part{part}")
def test_random_calls(part):
    check_part(part, "cuda")


@on_sm120
@pytest.mark.parametrize("format", FORMATS)
def test_random_calls_of_many_tiles(format):
    check_tiles(format, torch.cuda.get_device_properties(0).multi_processor_count, "cuda")


@needs_emulation
@pytest.mark.parametrize(
    "part", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, PARTS))]
)
def test_random_calls_on_the_cpu(part):
    """Eight of them take two minutes."""
    with emulated.emulated(EMULATED):
        check_part(part, "cpu")


@on_sm120
@pytest.mark.parametrize("format", FORMATS)
def test_random_calls_of_one_row_or_column(format):
    check_lines(format, "cuda")


@needs_emulation
@pytest.mark.parametrize("format", FORMATS)
def test_random_calls_of_few_rows_and_of_many_tiles_on_the_cpu(format):
    with emulated.emulated(EMULATED):
        check_lines(format, "cpu")
        check_tiles(format, 2, "cpu")


def test_the_calls_cover_every_option():
    calls = [draw(r) for r in map(random.Random, range(PARTS)) for _ in range(CALLS)]
    assert len(set(calls)) == PARTS * CALLS == 200
    for name in FORMATS:
        some = [c for c in calls if c.format == name]
        for field, count in [("accumulate", 3), ("out_dtype", 3), ("bias", 4), ("alpha", 4),
                            ("add", 2), ("nan", 2), ("shift", 4), ("spread", 3)]:  # fmt: skip
            assert len({getattr(c, field) for c in some}) == count, (name, field)


def operands(m: int, n: int, k: int, format: str, seed: int = 0) -> tuple:
    """Random operands of small whole numbers, times powers of two: float32 holds every sum."""
    g = torch.Generator().manual_seed(seed)
    low, high = {"mxfp4": (0, 7), "nvfp4": (0, 7), "mxfp8_e4m3": (0x38, 0x48)}.get(
        format, (0x3C, 0x44)
    )  # fmt: skip
    fmt = mxtrain.FORMATS[format]
    made = []
    for rows in (m, n):
        kp = fmt.padded(k)
        codes = torch.randint(low, high, (rows, kp), generator=g, dtype=torch.uint8)
        codes |= torch.randint(0, 2, codes.shape, generator=g, dtype=torch.uint8) << (fmt.bits - 1)
        codes[:, k:] = 0
        data = codes if fmt.bits == 8 else codes[:, ::2] | codes[:, 1::2] << 4
        base = 0x38 if fmt.two_level else 127  # 1; E4M3's exponent field ends at bit 3
        power = torch.randint(-1, 2, (rows, kp // fmt.block), generator=g)
        scale = (base + power * (8 if fmt.two_level else 1)).to(torch.uint8)
        top = torch.tensor([0.5], device="cuda") if fmt.two_level else None
        made.append(mxtrain.Operand(data.cuda(), scale.cuda(), format, (rows, k), top))
    return tuple(made)


def exact(a: mxtrain.Operand, b: mxtrain.Operand) -> torch.Tensor:
    return a.dequantize(torch.float32).double() @ b.dequantize(torch.float32).double().T


def assert_exact(a: mxtrain.Operand, b: mxtrain.Operand, what: str, **options) -> None:
    product = exact(a, b)
    assert torch.equal(product, product.float().double()), "the sums must be exact"
    got = mxtrain.gemm(a, b, out_dtype=torch.float32, **options)
    assert_same_bytes(got, product.float() + 0.0, what)


SHAPES = [(1, 1, 1), (16, 8, 64), (33, 65, 100), (128, 128, 128), (129, 127, 160), (300, 520, 480),
          (64, 1031, 96), (257, 130, 1), (200, 136, 512)]  # fmt: skip


@on_sm120
@pytest.mark.parametrize("accumulate", ["fp32", "exact"])
@pytest.mark.parametrize("format", FORMATS)
def test_exact_sums_have_no_error(format, accumulate):
    for m, n, k in SHAPES:
        a, b = operands(m, n, k, format)
        assert_exact(a, b, f"{format} {m} {n} {k}", accumulate=accumulate)


@on_sm120
@pytest.mark.parametrize("format", FORMATS)
def test_wide_tiles(format):
    """Shapes of as many tiles of 128 x 256 as the GPU has multiprocessors, and of twice as many."""
    count = torch.cuda.get_device_properties(0).multi_processor_count
    down = max(d for d in range(1, 17) if count % d == 0)
    for times, k in [(1, 384), (2, 48)]:
        m, n = 128 * down * times - 5, 256 * (count // down) - 6
        a, b = operands(m, n, k, format)
        assert_exact(a, b, f"{format} {m} {n} {k}")


@on_sm120
@pytest.mark.parametrize("accumulate", ["fp32", "exact"])
@pytest.mark.parametrize("format", FORMATS)
def test_narrow_tiles_one_after_the_other(format, accumulate):
    """One tile of 128 x 128 more than the GPU has multiprocessors: one of them takes two."""
    count = torch.cuda.get_device_properties(0).multi_processor_count
    a, b = operands(128 * (count + 1) - 3, 8, 800, format)
    assert_exact(a, b, f"{format} {accumulate}", accumulate=accumulate)


@on_sm120
@pytest.mark.parametrize("format", FORMATS)
def test_every_tile_size_gives_the_same_bytes(format):
    count = torch.cuda.get_device_properties(0).multi_processor_count
    call = Call(256, 128 * count, 320, format, SM120_BACKEND, "fp32", 2.0, torch.float32, None, 1.0,
                False, False, 0)  # fmt: skip
    g = torch.Generator().manual_seed(1)
    a, b = (random_operand(call, rows, g, "cuda") for rows in (call.m, call.n))
    whole = mxtrain.gemm(a, b, out_dtype=torch.float32)
    part = mxtrain.Operand(a.data[77:78], a.scale[77:78], format, (1, 320), a.tensor_scale)
    assert torch.equal(mxtrain.gemm(part, b, out_dtype=torch.float32)[0], whole[77])
    assert all(torch.equal(mxtrain.gemm(a, b, out_dtype=torch.float32), whole) for _ in range(5))


@on_sm120
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", FORMATS)
def test_bias_alpha_and_every_output_type(format, out_dtype):
    for m, n, k in SHAPES:
        a, b = operands(m, n, k, format)
        bias = torch.randn(n, generator=torch.Generator().manual_seed(2)).cuda()
        # One float32 operation after the other; nvfp4's tensor scales are powers of two here.
        expected = exact(a, b).float() * torch.tensor(0.7, device="cuda") + bias
        got = mxtrain.gemm(a, b, bias, alpha=0.7, out_dtype=out_dtype)
        assert_same_bytes(got, expected.to(out_dtype), f"{format} {m} {n} {k}")


@on_sm120
@pytest.mark.parametrize("format", FORMATS)
def test_gemm_add_adds_the_rounded_product(format):
    for m, n, k in SHAPES:
        a, b = operands(m, n, k, format)
        out = torch.randn(m, n, generator=torch.Generator().manual_seed(3)).cuda()
        expected = out + mxtrain.gemm(a, b, alpha=0.7, out_dtype=torch.float32)
        mxtrain.gemm_add_(out, a, b, alpha=0.7)
        assert_same_bytes(out, expected, f"{format} {m} {n} {k}")


@on_sm120
@pytest.mark.parametrize("accumulate", ["fp32", "exact"])
@pytest.mark.parametrize("format", FORMATS)
def test_nan_scales_reach_their_row_or_column_and_nothing_else(format, accumulate):
    g = torch.Generator().manual_seed(4)
    x, y = torch.randn(300, 512, generator=g), torch.randn(260, 512, generator=g)
    x[3, 40] = x[299, 511] = float("nan")
    y[7, 90] = float("inf")
    a, b = mxtrain.quantize(x.cuda(), format), mxtrain.quantize(y.cuda(), format)
    got = mxtrain.gemm(a, b, accumulate=accumulate).isnan()
    expected = torch.zeros(300, 260, dtype=torch.bool, device="cuda")
    expected[[3, 299], :] = expected[:, 7] = True
    assert torch.equal(got, expected)


@on_sm120
@pytest.mark.parametrize("format", FORMATS)
def test_operands_at_any_address_and_stride(format):
    a, b = operands(140, 90, 480 - 16, format)
    expected = mxtrain.gemm(a, b, out_dtype=torch.float32)

    def moved(t: torch.Tensor, by: int) -> torch.Tensor:
        storage = torch.empty(t.numel() + by, dtype=t.dtype, device=t.device)
        storage[by:] = t.flatten()
        return storage[by:].view_as(t)

    def sliced(t: torch.Tensor) -> torch.Tensor:
        return torch.cat([t, t], 1)[:, : t.shape[1]]

    def wide(t: torch.Tensor) -> torch.Tensor:  # rows a multiple of 16 bytes apart, noise behind
        storage = torch.full((t.shape[0], -(-t.shape[1] // 16) * 16 + 16), 255, dtype=t.dtype)
        storage = storage.to(t.device)
        storage[:, : t.shape[1]] = t
        return storage[:, : t.shape[1]]

    def rows_apart(t: torch.Tensor) -> torch.Tensor:
        return t.T.contiguous().T

    for change in (lambda t: moved(t, 1), lambda t: moved(t, 4), sliced, wide, rows_apart):
        p, q = (
            mxtrain.Operand(change(o.data), change(o.scale), format, o.shape, o.tensor_scale)
            for o in (a, b)
        )
        assert_same_bytes(mxtrain.gemm(p, q, out_dtype=torch.float32), expected)


@on_sm120
def test_captured_in_a_graph():
    a, b = operands(700, 300, 1024, "mxfp4")
    expected = mxtrain.gemm(a, b)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = mxtrain.gemm(a, b)
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, expected)
