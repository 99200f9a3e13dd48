"""The fold backends of gemm: mxfp4 folded into E5M2, multiplied on FP8 tensor cores.

The folding is checked on the CPU, through its reference; the product where a backend exists, and
by each that the GPU has: "fold", its own, "fold_packed", unpacked inside the product, and
"fold_mma", by mma.sync. Bounds: docs/numerics.md, "GEMM". Operands come from fixed seeds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from common import assert_same_bytes, cuda_has

import mxtrain
from mxtrain import reference
from mxtrain._library import CATALOGUE, gemm_backend
from mxtrain.env import gemm_backend_here

HAS_FOLD = cuda_has("gemm") and gemm_backend_here("mxfp4") == "fold"
needs_fold = pytest.mark.skipif(not HAS_FOLD, reason="needs a GPU that gemm's fold backend serves")


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """mxtrain.set_gemm_backend(name), for a while."""
    before = mxtrain.set_gemm_backend(name)
    try:
        yield
    finally:
        mxtrain.set_gemm_backend(before)


@pytest.fixture(params=["fold", "fold_packed", "fold_mma"])
def fold(request) -> Iterator[None]:
    if request.param != "fold" and torch.cuda.get_device_capability() == (8, 9):
        pytest.skip("there fold is fold_mma, and fold_packed does not run")
    with backend(request.param):
        yield


def by_each_fold_backend(test: Callable) -> Callable:
    """Run the test once for each fold backend that the GPU has."""
    return needs_fold(pytest.mark.usefixtures("fold")(test))


# c of |D - D64| <= c |A||B|^T. "exact" is a float32 sum of exact products; the others cut products
# off 13 bits below the largest of their instruction, again and again along a chunk of K.
TOLERANCE = {"exact": lambda k: max(k, 8) * 2.0**-24, "fp32": lambda k: 2.0**-9}
# The roundings of a float32 sum of k terms are a random walk.
NORMWISE = {"exact": lambda k: max(1e-6, k**0.5 * 2.0**-26), "fp32": lambda k: 5e-4}


def values(name: str, rows: int, k: int, seed: int) -> torch.Tensor:
    """A float matrix of one of the distributions that the bound is tested on."""
    generator = torch.Generator(device="cuda").manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    x = normal(rows, k)
    kind, _, size = name.partition("-")
    if kind == "lognormal":
        return x.sign() * torch.exp(float(size) * normal(rows, k))
    if kind == "blocks":  # block scales over several times `size` binades
        factors = torch.exp2(float(size) * normal(rows, -(-k // 32)))
        return x * factors.repeat_interleave(32, 1)[:, :k]
    if kind == "outliers":
        x[:, ::97] *= 100
    if kind == "biased":
        x += 3
    return x


def exact(a: mxtrain.Operand, b: mxtrain.Operand) -> tuple[torch.Tensor, torch.Tensor]:
    """A B^T and |A||B|^T in float64."""
    left, right = a.dequantize(torch.float32).double(), b.dequantize(torch.float32).double()
    return left @ right.T, left.abs() @ right.abs().T


DISTRIBUTIONS = [
    "gaussian",
    "lognormal-1",
    "lognormal-2",
    "lognormal-4",
    "blocks-1",
    "blocks-4",
    "outliers-",
    "biased-",
]


# ---- the folding, on any machine ----


def test_folding_is_exact_over_29_binades():
    codes = torch.arange(16, dtype=torch.uint8).repeat(2)  # every element, with its sign
    data = (codes[0::2] | (codes[1::2] << 4)).repeat(1, 40)
    scale = torch.tensor([[200 - s for s in range(40)]], dtype=torch.uint8)
    folded, row_scale = reference.fold(data, scale)
    assert row_scale.tolist() == [200]
    got = folded.view(torch.float8_e5m2).double() * 2.0 ** (200 - reference.FOLD_BIAS)
    values = reference.dequantize(data, scale, None, "mxfp4", 1280).double()
    assert torch.equal(got[:, : 29 * 32], values[:, : 29 * 32])
    assert (got[:, 29 * 32 :] == 0).all()
    assert torch.equal(folded.view(torch.int8) < 0, (codes >= 8).repeat(1, 40))  # -0 stays -0


def test_folding_a_nan_block_marks_its_row():
    data = torch.full((3, 64), 0x21, dtype=torch.uint8)
    scale = torch.full((3, 4), 127, dtype=torch.uint8)
    scale[1, 2] = 255
    folded, row_scale = reference.fold(data, scale)
    assert row_scale.tolist() == [127, 255, 127]
    assert folded.view(torch.float8_e5m2).float().isfinite().all()


def test_compute_capabilities_that_fold_serves():
    """8.9 by code for 89, 9.0 by code for 90a; code for 80 runs on 8.9, but does not fold."""
    archs, code = CATALOGUE["build"]["cuda_archs"].split(";"), mxtrain.FORMATS["mxfp4"].code
    if archs == [""]:
        pytest.skip("a build with CUDA chooses")
    for major, minor, arch in [(8, 9, "89"), (9, 0, "90a")]:
        chosen = gemm_backend(major, minor, code)
        if arch in archs:
            assert chosen.startswith("fold: exact folding into E5M2, FP8 tensor cores")
        else:
            assert chosen.startswith("dequant: ") and f"a build with {arch}" in chosen
    for major, minor in [(8, 0), (8, 6), (10, 0)]:
        assert gemm_backend(major, minor, code).startswith("dequant: ")


def test_set_gemm_backend_returns_the_previous_one_and_refuses_others():
    before = mxtrain.set_gemm_backend("dequant")
    try:
        assert before == "auto"
        with pytest.raises(ValueError, match=r"set_gemm_backend: name must be one of auto"):
            mxtrain.set_gemm_backend("cublas")
        assert mxtrain.set_gemm_backend("fold") == "dequant"
    finally:
        assert mxtrain.set_gemm_backend(before) == "fold"


# ---- the product ----


@needs_fold
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_error_bound_of_dequant(name):
    """A float32 sum of exact products, as in "exact"."""
    with backend("dequant"):
        test_error_bound(name, "exact")


@needs_fold
@pytest.mark.parametrize("format", ["mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e2m3", "nvfp4"])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_error_bound_of_the_formats_that_are_decoded(name, format):
    """A BF16 holds what an element and its block's scale make. Their products differ by more than
    mxfp4's, so the tensor cores cut off more: 1.24e-6 normwise was seen on an H200."""
    test_error_bound(name, "exact", format)


@by_each_fold_backend
@pytest.mark.parametrize("accumulate", ["fp32", "exact"])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_error_bound(name, accumulate, format="mxfp4"):
    for m, n, k in [(256, 512, 128), (130, 200, 1000), (128, 256, 8192), (5, 300, 65536)]:
        a = mxtrain.quantize(values(name, m, k, seed=1), format)
        b = mxtrain.quantize(values(name, n, k, seed=2), format)
        got = mxtrain.gemm(a, b, out_dtype=torch.float32, accumulate=accumulate).double()
        product, magnitude = exact(a, b)
        assert ((got - product).abs() <= TOLERANCE[accumulate](k) * magnitude).all(), (m, n, k)
        error = float((got - product).norm() / product.norm())
        assert error <= NORMWISE[accumulate](k) or format != "mxfp4", (m, n, k, error)


@by_each_fold_backend
@pytest.mark.parametrize("accumulate", ["fp32", "exact"])
def test_gaussian_operands_have_no_error_at_all(accumulate):
    """Their scales differ by a few binades, so nothing is cut off and float32 holds the sums."""
    a = mxtrain.quantize(values("gaussian", 512, 8192, seed=1), "mxfp4")
    b = mxtrain.quantize(values("gaussian", 768, 8192, seed=2), "mxfp4")
    got = mxtrain.gemm(a, b, out_dtype=torch.float32, accumulate=accumulate)
    assert torch.equal(got.double(), exact(a, b)[0])


@needs_fold
def test_gaussian_operands_have_no_error_in_dequant():
    with backend("dequant"):
        test_gaussian_operands_have_no_error_at_all("exact")


@by_each_fold_backend
def test_agrees_with_dequant_and_refuses_other_formats():
    a = mxtrain.quantize(values("gaussian", 300, 1024, seed=1), "mxfp4")
    b = mxtrain.quantize(values("gaussian", 200, 1024, seed=2), "mxfp4")
    folded = mxtrain.gemm(a, b)
    with backend("dequant"):
        assert torch.equal(folded, mxtrain.gemm(a, b))
    x = mxtrain.quantize(torch.randn(64, 64, device="cuda"), "mxfp8_e4m3")
    with pytest.raises(RuntimeError, match="GEMM backend must be one that serves format mxfp8"):
        mxtrain.gemm(x, x)


@needs_fold
def test_fold_mma_and_fold_give_the_same_bytes():
    """Of float32 sums of exact products, in the same order; they differ in everything else."""
    for m, n, k in [(300, 520, 480), (2100, 4100, 1024)]:
        a = mxtrain.quantize(values("blocks-4", m, k, seed=1), "mxfp4")
        b = mxtrain.quantize(values("blocks-4", n, k, seed=2), "mxfp4")
        got = []
        for name in ("auto", "fold", "fold_mma"):
            with backend(name):
                got.append(mxtrain.gemm(a, b, out_dtype=torch.float32, accumulate="exact"))
        assert torch.equal(got[0], got[1]) and torch.equal(got[1], got[2])


@by_each_fold_backend
@pytest.mark.parametrize("accumulate", ["fp32", "fast", "exact"])
def test_gemm_add_adds_the_rounded_product(accumulate):
    for m, n, k in [(33, 65, 100), (129, 128, 160), (300, 522, 480), (4095, 2044, 96)]:
        a = mxtrain.quantize(values("gaussian", m, k, seed=1), "mxfp4")
        b = mxtrain.quantize(values("gaussian", n, k, seed=2), "mxfp4")
        out = values("gaussian", m, n, seed=3)
        product = mxtrain.gemm(a, b, alpha=0.7, out_dtype=torch.float32, accumulate=accumulate)
        expected = out + product
        mxtrain.gemm_add_(out, a, b, alpha=0.7, accumulate=accumulate)
        assert_same_bytes(out, expected, f"{m} {n} {k}")


@by_each_fold_backend
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("accumulate", ["fp32", "fast", "exact"])
def test_ragged_shapes_alpha_bias_and_every_output_type(accumulate, out_dtype):
    """Rows of D that are not whole 16- or 8-byte units, tiles of either size that stick out, K that
    is not a stage."""
    shapes = [(1, 1, 1), (33, 65, 100), (129, 127, 160), (300, 520, 480), (64, 1031, 96)]
    large = [(1000, 1030, 32), (2049, 2056, 224), (4095, 2044, 224), (3970, 2047, 96)]
    for m, n, k in [*shapes, *large]:
        a = mxtrain.quantize(values("gaussian", m, k, seed=1), "mxfp4")
        b = mxtrain.quantize(values("gaussian", n, k, seed=2), "mxfp4")
        bias = values("gaussian", 1, n, seed=3)[0]
        product = exact(a, b)[0].float()  # exact in float32, too
        options = {"out_dtype": out_dtype, "accumulate": accumulate}
        assert_same_bytes(mxtrain.gemm(a, b, **options), product.to(out_dtype), f"{m} {n} {k}")
        expected = product * torch.tensor(0.7, device="cuda") + bias
        got = mxtrain.gemm(a, b, bias, alpha=0.7, **options)
        assert_same_bytes(got, expected.to(out_dtype), f"{m} {n} {k}, alpha and bias")


@by_each_fold_backend
@pytest.mark.parametrize("accumulate", ["fp32", "fast", "exact"])
def test_nan_scales_reach_their_row_or_column_and_nothing_else(accumulate):
    x, y = values("gaussian", 300, 512, seed=1), values("gaussian", 260, 512, seed=2)
    x[3, 40] = x[299, 511] = float("nan")
    y[7, 90] = float("inf")
    a, b = mxtrain.quantize(x, "mxfp4"), mxtrain.quantize(y, "mxfp4")
    got = mxtrain.gemm(a, b, accumulate=accumulate).isnan()
    expected = torch.zeros(300, 260, dtype=torch.bool, device="cuda")
    expected[[3, 299], :] = expected[:, 7] = True
    assert torch.equal(got, expected)


@by_each_fold_backend
def test_scales_at_the_ends_of_their_range():
    """2^(scales) of a row times a column may leave float32's range on the way, not in the result.

    Rows at 2^-127 and 2^120 times columns at 2^120, 2^-127 and 1.
    """
    g = torch.Generator().manual_seed(0)
    data = [torch.randint(0, 256, (3, 64), generator=g, dtype=torch.uint8).cuda() for _ in "ab"]
    scale = [torch.tensor(s, dtype=torch.uint8).cuda() for s in ([0, 247, 127], [247, 0, 127])]
    a, b = (
        mxtrain.Operand(d, s[:, None].repeat(1, 4), "mxfp4", (3, 128))
        for d, s in zip(data, scale, strict=True)
    )
    got = mxtrain.gemm(a, b, out_dtype=torch.float32)
    assert torch.equal(got, exact(a, b)[0].float())  # overflows to Inf and underflows alike
    assert got.isinf().any() and (got.abs() < 2.0**-126).any()
    doubled = mxtrain.gemm(a, b, alpha=2.0**20, out_dtype=torch.float32)
    inside = got.abs() > 2.0**-100
    assert torch.equal(doubled[inside], (exact(a, b)[0] * 2.0**20).float()[inside])


@by_each_fold_backend
def test_operands_at_any_address_and_stride():
    """Codes at an odd address, scales at an odd address, and operands that are slices of larger."""
    x, y = values("blocks-2", 140, 480, seed=1), values("blocks-2", 90, 480, seed=2)
    a, b = mxtrain.quantize(x, "mxfp4"), mxtrain.quantize(y, "mxfp4")
    expected = mxtrain.gemm(a, b, out_dtype=torch.float32)

    def moved(t: torch.Tensor, by: int) -> torch.Tensor:
        storage = torch.empty(t.numel() + by, dtype=t.dtype, device=t.device)
        storage[by:] = t.flatten()
        return storage[by:].view_as(t)

    def sliced(t: torch.Tensor) -> torch.Tensor:
        return torch.cat([t, t], 1)[:, : t.shape[1]]

    for change in (lambda t: moved(t, 1), lambda t: moved(t, 4), sliced):
        p, q = (mxtrain.Operand(change(o.data), change(o.scale), o.format, o.shape) for o in (a, b))
        assert_same_bytes(mxtrain.gemm(p, q, out_dtype=torch.float32), expected)


@by_each_fold_backend
def test_the_same_bytes_every_time_on_two_streams_and_in_a_graph():
    check_the_same_bytes_every_time("mxfp4", 1300)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("format", ["mxfp4", "mxfp8_e4m3", "nvfp4"])
def test_dequant_has_the_same_bytes_every_time_on_two_streams_and_in_a_graph(format):
    before = mxtrain.set_gemm_backend("dequant")
    try:
        check_the_same_bytes_every_time(format, 1304)  # cuBLAS rounds one of its products
    finally:
        mxtrain.set_gemm_backend(before)


def check_the_same_bytes_every_time(format, rows):
    a = mxtrain.quantize(values("blocks-4", rows, 2048, seed=1), format)
    b = mxtrain.quantize(values("blocks-4", 1100, 2048, seed=2), format)
    expected = [mxtrain.gemm(a, b), mxtrain.gemm(b, a)]
    start = torch.randn(rows, 1100, device="cuda")
    sums = mxtrain.gemm_add_(start.clone(), a, b)
    for _ in range(100):
        assert torch.equal(mxtrain.gemm(a, b), expected[0])
        assert torch.equal(mxtrain.gemm_add_(start.clone(), a, b), sums)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    got: list[list[torch.Tensor]] = [[], []]
    for _ in range(20):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                got[i].append(mxtrain.gemm(*((a, b) if i == 0 else (b, a))))
    torch.cuda.synchronize()
    assert all(torch.equal(t, expected[i]) for i in range(2) for t in got[i])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = mxtrain.gemm(a, b)
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, expected[0])


@by_each_fold_backend
def test_every_tile_size_gives_the_same_bytes():
    """One row of a large product, alone: another tile, the same sums."""
    a = mxtrain.quantize(values("blocks-4", 4096, 1024, seed=1), "mxfp4")
    b = mxtrain.quantize(values("blocks-4", 2048, 1024, seed=2), "mxfp4")
    for accumulate in ("fp32", "exact"):
        whole = mxtrain.gemm(a, b, accumulate=accumulate)
        for row in (0, 777, 4095):
            one = mxtrain.Operand(
                a.data[row : row + 1], a.scale[row : row + 1], a.format, (1, 1024)
            )
            assert torch.equal(mxtrain.gemm(one, b, accumulate=accumulate)[0], whole[row])


@needs_fold
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_overlapped_tiles_are_those_one_after_the_other(out_dtype, monkeypatch):
    """Several tiles a thread block, of both sizes, K of one stage and of many, rows and columns
    that end inside a tile and a box, a factor that takes the slow way of scaling."""
    for m, n, k in [(8200, 2056, 96), (3970, 2048, 1024), (8192, 1800, 384), (1500, 1544, 2080),
                    (16384, 1024, 256)]:  # fmt: skip
        a = mxtrain.quantize(values("blocks-4", m, k, seed=1), "mxfp4")
        b = mxtrain.quantize(values("blocks-4", n, k, seed=2), "mxfp4")
        bias = values("gaussian", 1, n, seed=3)[0]
        start = values("gaussian", m, n, seed=4)
        got = []
        for overlap in ("1", "0"):
            monkeypatch.setenv("MXTRAIN_GEMM_OVERLAP", overlap)
            got.append([
                mxtrain.gemm(a, b, out_dtype=out_dtype),
                mxtrain.gemm(a, b, bias, alpha=0.7, out_dtype=out_dtype),
                mxtrain.gemm(a, b, alpha=2.0**-20, out_dtype=out_dtype),
                mxtrain.gemm_add_(start.clone(), a, b),
            ])  # fmt: skip
        for i, (one, other) in enumerate(zip(*got, strict=True)):
            assert torch.equal(one, other), (m, n, k, i)
