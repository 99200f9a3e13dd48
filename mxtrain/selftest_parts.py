"""The parts of the self test (mxtrain/selftest.py runs each in a process of its own).

A part is a generator: before each check it yields the check's name, so that what hangs or crashes
is known by name, and after it the result, a dict with name, status and figures.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from . import reference
from ._library import gemm_backend, mma_probe
from .formats import FORMATS, ROUNDINGS, SCALE_RULES
from .operand import (
    Operand,
    gemm,
    gemm_add_,
    quantize,
    quantize_dual,
    set_gemm_backend,
    swizzle_scale,
)
from .quantizer import Quantizer

PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
Steps = Iterator[str | dict]


def _result(name: str, passed: bool, **figures) -> dict:
    return {"name": name, "status": PASSED if passed else FAILED, **figures}


def _worst(figures: Tensor) -> float:
    """The largest, as JSON can have it: without NaN and Infinity."""
    return (
        min(float(figures.double().nan_to_num(torch.inf).max()), 1e30) if figures.numel() else 0.0
    )


# ---- quantize ----


def hard_input(rows: int, cols: int, seed: int = 0) -> Tensor:
    """Blocks of every exponent, some with zeros of both signs, NaN or Inf; bfloat16."""
    g = torch.Generator().manual_seed(seed)
    exponent = torch.randint(-140, 128, (rows, -(-cols // 32)), generator=g)
    exponent = exponent.repeat_interleave(32, 1)[:, :cols]
    x = torch.randn(rows, cols, generator=g, dtype=torch.float64).clamp(-3.9, 3.9)
    x = (x * 2.0 ** exponent.double()).bfloat16()
    special = torch.tensor([float("nan"), float("inf"), -0.0, 0.0]).bfloat16()
    places = x.view(-1)[::397]
    places.copy_(special[torch.arange(places.numel()) % 4])
    return x


def _differing(got: Tensor, expected: Tensor) -> int:
    if got.shape != expected.shape:
        return max(got.numel(), 1)
    a, b = (t.cpu().contiguous().view(torch.uint8).flatten() for t in (got, expected))
    return int((a != b).sum())


def _differing_values(got: Tensor, expected: Tensor) -> int:
    """As _differing; every NaN is equal to every other."""
    return _differing(*(torch.where(t.isnan(), torch.nan, t.cpu()) for t in (got.cpu(), expected)))


def _quantize_options() -> list[dict]:
    """Every scale rule and rounding along both axes, and with a rotation."""
    rng = torch.tensor([5, 1 << 33])
    found = []
    for rule in SCALE_RULES:
        for rounding in ROUNDINGS:
            for transpose, hadamard in ((False, 0), (True, 0), (False, 32)):
                options = dict(scale_rule=rule, rounding=rounding, transpose=transpose)
                if hadamard:
                    options["hadamard"] = hadamard
                if rounding == "stochastic":
                    options["rng"] = rng
                found.append(options)
    return found


def quantize_part(device: str) -> Steps:
    """One result for each format and set of options: how many bytes differ."""
    x = hard_input(70, 160)
    toward = x.float() * (
        1 + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    )
    for name in FORMATS:
        for options in _quantize_options():
            words = {k: v for k, v in options.items() if not isinstance(v, Tensor)}
            yield f"{name} {words}"
            if options["rounding"] == "toward":
                options = {**options, "toward": toward}
            there = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
            got = quantize(x.to(device), name, **there)
            data, scale, tensor_scale = reference.quantize(x, name, **options)
            differing = _differing(got.data, data) + _differing(got.scale, scale)
            if tensor_scale is not None:
                differing += _differing(got.tensor_scale, tensor_scale.reshape(1))
            in_tiles = quantize(x.to(device), name, **there, swizzle=True)
            differing += _differing(in_tiles.scale, reference.swizzle(scale))
            yield _result(f"{name} {words}", differing == 0, differing=differing)
        yield f"{name} dequantize"
        got = quantize(x.to(device), name)
        expected = reference.dequantize(*reference.quantize(x, name), name, x.shape[1])
        differing = _differing_values(got.dequantize(), expected)
        yield _result(f"{name} dequantize", differing == 0, differing=differing)
        yield f"{name} quantize_dual"
        both = Quantizer(name), Quantizer(name, rounding="stochastic")
        rng = torch.tensor([7, 3])
        row, col = quantize_dual(x.to(device), *both, rng=rng.to(device))
        parts = (
            reference.quantize(x, name),
            reference.quantize(x, name, rounding="stochastic", transpose=True, rng=rng),
        )
        differing = sum(
            _differing(got.data, p[0]) + _differing(got.scale, p[1])
            for got, p in zip((row, col), parts, strict=True)
        )
        yield _result(f"{name} quantize_dual", differing == 0, differing=differing)


# ---- gemm ----


LARGE = 4_000_000  # elements of D
EXACT = (2, 8, 9, 11, 13)  # of shapes(): these run with accumulate="exact" too


def shapes() -> list[tuple[int, int, int]]:
    """40 times (M, N, K): whole tiles of every kind, ragged ones, and what fills a large GPU."""
    r = random.Random(7)
    found = [(128, 128, 128), (256, 256, 256), (256, 512, 1024), (1024, 1024, 512), (1, 1, 32)]
    found += [(2048, 2048, 512), (2304, 2056, 288), (2047, 2300, 96), (300, 260, 480)]
    found += [(1, 4096, 256), (4096, 1, 256), (129, 127, 33), (257, 255, 1), (8, 8, 4000)]
    found += [(4099, 3001, 96), (2900, 2895, 33)]
    while len(found) < 40:
        found.append((r.randint(1, 700), r.randint(1, 700), r.choice((r.randint(1, 700), 512))))
    return found


@dataclass(frozen=True)
class Product:
    """One product of two random operands, and how it is asked for."""

    m: int
    n: int
    k: int
    format: str
    seed: int
    alpha: float
    out_dtype: torch.dtype
    bias: bool
    add: bool  # gemm_add_
    in_tiles: bool  # scales swizzled
    accumulate: str

    @property
    def name(self) -> str:
        words = f"{self.format} {self.m}x{self.n}x{self.k} {str(self.out_dtype)[6:]}"
        words += f"{' +=' if self.add else ''} alpha {self.alpha:.4g}"
        words += f"{' bias' if self.bias else ''}{' swizzled' if self.in_tiles else ''}"
        return words + (f" {self.accumulate}" if self.accumulate != "fp32" else "")


def product(i: int, shape: tuple[int, int, int], format: str, accumulate: str = "fp32") -> Product:
    """The product of a shape with the options that number i picks.

    A large D is bfloat16, which is what sm100's tile of two multiprocessors is taken for.
    """
    large = shape[0] * shape[1] >= LARGE
    out_dtype = (torch.bfloat16, torch.float32, torch.bfloat16, torch.float16)[i % 4]
    add = i % 5 == 4 and not large
    if large:
        out_dtype = torch.bfloat16
    elif add or accumulate != "fp32":
        out_dtype = torch.float32
    return Product(
        *shape, format, i, (1.0, -0.5, 16 / 9)[i % 3], out_dtype,
        bias=i % 2 == 1 and not add, add=add, in_tiles=i % 3 != 1, accumulate=accumulate,
    )  # fmt: skip


def products(format: str) -> list[Product]:
    every = list(enumerate(shapes()))
    found = [product(i, shape, format) for i, shape in every]
    return found + [product(i, shape, format, "exact") for i, shape in every if i in EXACT]


def _operand(rows: int, k: int, format: str, seed: int, device: str) -> Operand:
    """A random operand whose block scales spread over some binades."""
    g = torch.Generator().manual_seed(seed)
    spread = torch.exp2(2 * torch.randn(rows, -(-k // 32), generator=g)).repeat_interleave(32, 1)
    return quantize((torch.randn(rows, k, generator=g) * spread[:, :k]).to(device), format)


def _swizzled(a: Operand) -> Operand:
    return Operand(a.data, swizzle_scale(a.scale), a.format, a.shape, a.tensor_scale, True)


def _values(a: Operand) -> Tensor:
    """The operand in float64, by the reference: nvfp4's tensor scale is not rounded into it."""
    one = None if a.tensor_scale is None else torch.ones(1)
    plain = reference.dequantize(a.data.cpu(), a.plain_scale().cpu(), one, a.format, a.shape[1])
    values = plain.double().to(a.data.device)
    return values if a.tensor_scale is None else values * a.tensor_scale.double()


def _bound(backend: str, k: int, accumulate: str = "fp32") -> float:
    """c of |error| <= c |A||B|^T, as docs/numerics.md has it for K filled up to whole blocks, or 8.

    tests/test_gemm_sweep.py has the tight one.
    """
    short = backend.startswith("fold") and accumulate == "fp32"
    return 2.0**-9 if short else max(k, 8) * 2.0**-24


def _one_product(p: Product, backend: str, device: str) -> dict:
    """The product's error as a share of what the bound allows."""
    a = _operand(p.m, p.k, p.format, 2 * p.seed, device)
    b = _operand(p.n, p.k, p.format, 2 * p.seed + 1, device)
    g = torch.Generator().manual_seed(p.seed)
    bias = torch.randn(p.n, generator=g).to(device) if p.bias else None
    left, right = _values(a), _values(b)
    expected = p.alpha * (left @ right.T)
    allowed = abs(p.alpha) * _bound(backend, FORMATS[p.format].padded(p.k), p.accumulate)
    allowed = allowed * (left.abs() @ right.abs().T)
    left_op, right_op = (_swizzled(a), _swizzled(b)) if p.in_tiles else (a, b)
    if p.add:
        before = torch.randn(p.m, p.n, generator=g).to(device)
        got = gemm_add_(before.clone(), left_op, right_op, p.alpha, p.accumulate)
        expected = expected + before.double()
    else:
        got = gemm(left_op, right_op, bias, p.alpha, p.out_dtype, p.accumulate)
        expected = expected if bias is None else expected + bias.double()
    allowed = allowed + UNIT[p.out_dtype] * expected.abs() + 2.0**-24 * 4 + 1e-37
    if p.out_dtype == torch.float16:  # what does not fit is Inf
        fits = expected.abs() < 65000
        expected, allowed, got = expected[fits], allowed[fits], got[fits]
    worst = _worst((got.double() - expected).abs() / allowed)
    return _result(p.name, worst <= 1, of_bound=worst)


def _nan_stays(format: str, device: str) -> dict:
    """A NaN scale makes its row NaN and nothing else."""
    a, b = _operand(130, 96, format, 1, device), _operand(140, 96, format, 2, device)
    a.scale[77, 1] = 0x7F if FORMATS[format].two_level else 255
    nan = gemm(a, b, out_dtype=torch.float32).isnan()
    good = bool(nan[77].all()) and int(nan.sum()) == nan.shape[1]
    return _result(f"{format} NaN scale in row 77", good, nan=int(nan.sum()))


def gemm_part(device: str, backend: str) -> Steps:
    """40 shapes for each format that the backend serves here; the others with its refusal."""
    for format in FORMATS:
        taken = backend
        if device == "cuda" and backend == "auto":
            capability = torch.cuda.get_device_capability()
            chosen = gemm_backend(*capability, FORMATS[format].code)
            taken = chosen.split(":")[0]
            yield _result(f"{format} auto takes {chosen}", "needs a build with" not in chosen)
        if device == "cuda":
            set_gemm_backend(backend)
            yield f"{format} 16x16x64"
            try:
                gemm(*(_operand(16, 64, format, 0, device) for _ in range(2)))
            except RuntimeError as error:
                if "GEMM backend must be one that serves" not in str(error):
                    raise
                yield {"name": format, "status": NOT_RUN, "detail": str(error)}
                continue
        for one in products(format):
            yield one.name
            yield _one_product(one, taken, device)
        yield f"{format} NaN scale in row 77"
        yield _nan_stays(format, device)


# ---- one instruction ----


PROBES = 64  # products of each set of selectors


def _registers(format: str, seed: int = 8) -> list[Tensor]:
    """a, b, scale_a, scale_b (int32) and c (float32) of a warp's lanes, PROBES times: random codes
    of sums that float32 holds, random scales in every byte.
    """
    fmt, g = FORMATS[format], torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, (PROBES, 32, *shape), generator=g)

    def words(codes: Tensor) -> Tensor:
        return codes.to(torch.uint8).contiguous().view(torch.int32).squeeze(-1)

    def codes(count: int) -> Tensor:
        if fmt.bits == 4:
            return draw(0, 256, count, 4)
        low, high = (0x30, 0x48) if fmt.mbits == 3 else (0x38, 0x44)  # 0.5 to 4
        return draw(low, high, count, 4) + 128 * draw(0, 2, count, 4)

    scale = (0x38, 0x48) if fmt.two_level else (126, 129)  # 1 to 4; 1/2 to 2
    return [
        *(words(codes(count)) for count in (4, 2)),
        *(words(draw(*scale, 4)) for _ in range(2)),
        draw(-256, 257, 4).float() / 4,
    ]


def probe_part(format: str) -> Steps:
    """The block-scaled instruction of 12.x, or what stands for it on 9.0, under every set of
    selectors that the probe has (csrc/cuda/sm120/mma_probe.cu), against the emulation on the CPU.

    The sums are exact, so the results are equal where the chip reads the lanes and bytes that
    csrc/ptx/block_scale.h says.
    """
    try:
        from ._host import mma_block_scale
    except ImportError as error:  # a library that was built for another Python
        yield {"name": format, "status": NOT_RUN, "detail": str(error)}
        return
    fmt, registers = FORMATS[format], _registers(format)
    scales = 256 // fmt.bits // fmt.block
    here = [*(t.numpy().view("uint32") for t in registers[:4]), registers[4].numpy()]
    for byte_a, thread_b in itertools.product(range(0, 4, scales), range(4)):
        selectors = (byte_a, thread_b % 2, 4 - scales - byte_a, thread_b)
        name = f"{format} selectors {selectors}"
        yield name
        got = mma_probe(fmt.code, selectors, registers)
        if got is None:
            detail = "this build has no code for it: build for 90a, 120a or 121a"
            yield {"name": format, "status": NOT_RUN, "detail": detail}
            return
        every = [mma_block_scale(fmt.code, selectors, *one) for one in zip(*here, strict=True)]
        expected = torch.from_numpy(np.stack(every))
        error = (got.double() - expected).abs()
        figures = dict(differing=int((got != expected).sum()), absolute=_worst(error))
        figures["relative"] = _worst(error / expected.double().abs().clamp_min(1e-30))
        yield _result(name, figures["differing"] == 0, **figures)


# ---- torch's own ----


def scaled_mm_part(format: str, device: str = "cuda") -> Steps:
    """torch.nn.functional.scaled_mm on the same operands: gemm is judged against float64, torch's
    figures stand beside it.
    """
    functional = torch.nn.functional
    if not hasattr(functional, "scaled_mm"):
        yield {"name": format, "status": NOT_RUN, "detail": f"torch {torch.__version__}"}
        return
    scaling, swizzle = functional.ScalingType, functional.SwizzleType.SWIZZLE_32_4_4
    m, n, k = 512, 384, 1024
    name = f"{format} {m}x{n}x{k}"
    yield name
    a, b = _operand(m, k, format, 1, device), _operand(n, k, format, 2, device)
    elements = {"mxfp8_e4m3": torch.float8_e4m3fn, "mxfp8_e5m2": torch.float8_e5m2}
    element = elements.get(format, torch.float4_e2m1fn_x2)
    two_level = FORMATS[format].two_level
    code = torch.float8_e4m3fn if two_level else torch.float8_e8m0fnu
    block = scaling.BlockWise1x16 if two_level else scaling.BlockWise1x32
    scales = [swizzle_scale(t.scale).flatten().view(code) for t in (a, b)]
    call = [a.data.view(element), b.data.view(element).t(), scales[0], block, scales[1], block]
    if two_level:
        recipe = [block, scaling.TensorWise]
        call[2:] = [[scales[0], a.tensor_scale], recipe, [scales[1], b.tensor_scale], recipe]
    try:
        theirs = functional.scaled_mm(*call, swizzle, swizzle, output_dtype=torch.bfloat16)
        theirs = theirs.cpu()  # an error of its kernel shows here
    except (RuntimeError, ValueError, NotImplementedError) as error:
        yield {"name": format, "status": NOT_RUN, "detail": f"torch: {error}"[:500]}
        return
    ours = gemm(a, b).cpu()
    left, right = _values(a).cpu(), _values(b).cpu()
    expected, size = left @ right.T, left.abs() @ right.abs().T
    allowed = _bound("", k) * size + UNIT[torch.bfloat16] * expected.abs()
    share = [_worst((d.double() - expected).abs() / allowed) for d in (theirs, ours)]
    figures = dict(
        theirs=share[0], ours=share[1], same_bytes=float((theirs == ours).double().mean())
    )
    if share[0] > 1:
        figures["note"] = "torch's own product is out of the bound"
    yield _result(name, share[1] <= 1, **figures)


# ---- a part by its name ----


def steps(name: str) -> Steps:
    """What a part yields, by its name: "gemm:cuda:sm100"."""
    kind, *rest = name.split(":")
    parts = {"quantize": quantize_part, "gemm": gemm_part}
    parts |= {"probe": probe_part, "scaled_mm": scaled_mm_part}
    return parts[kind](*rest)


def run_part(name: str) -> list[dict]:
    """The results of a part."""
    return [step for step in steps(name) if isinstance(step, dict)]
