"""`python -m mxtrain.env --selftest [FILE]`: what the owner of a GPU runs once, and sends back.

Bytes of quantize against the reference in every format, scale rule and rounding; GEMM against
float64 on 40 shapes for each backend that the GPU has, and for what `auto` takes; the block-scaled
instruction of 12.x by itself, register by register, against its emulation on the CPU; torch's own
scaled_mm on the same operands, where it takes them; and the quick suite of the benchmark, in a
checkout. Each part runs in a
process of its own, so that a kernel that hangs or breaks the CUDA context ends that part only. FILE
is one JSON: the report of mxtrain.env, a list of parts with every figure, and the benchmark's own
JSON.

Exit status: 0 where everything that ran passed, 1 where a part failed, 2 where FILE cannot be
written. What cannot run here is listed as not run, with the reason, and fails nothing; but a build
that has no code for a visible GPU fails the part build, and one that lacks the GEMM which the GPU
has tensor cores for fails gemm:cuda:auto, both with what to build.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import reference
from ._library import gemm_backend, mma_probe
from .formats import FORMATS, GEMM_BACKENDS, ROUNDINGS, SCALE_RULES
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

FILE = "mxtrain-selftest.json"
SCHEMA = 1
PART_SECONDS, BENCH_SECONDS = 600, 1800
PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


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


def quantize_part(device: str) -> list[dict]:
    """One result for each format and set of options: how many bytes differ."""
    x = hard_input(70, 160)
    toward = x.float() * (
        1 + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    )
    results = []
    for name in FORMATS:
        for options in _quantize_options():
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
            words = {k: v for k, v in options.items() if not isinstance(v, Tensor)}
            results.append(_result(f"{name} {words}", differing == 0, differing=differing))
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
        results.append(_result(f"{name} quantize_dual", differing == 0, differing=differing))
    return results


# ---- gemm ----


def shapes() -> list[tuple[int, int, int]]:
    """40 times (M, N, K): whole tiles of every kind, ragged ones, and what fills a large GPU."""
    r = random.Random(7)
    found = [(128, 128, 128), (256, 256, 256), (256, 512, 1024), (1024, 1024, 512), (1, 1, 32)]
    found += [(2048, 2048, 512), (2304, 2056, 288), (2047, 2300, 96), (300, 260, 480)]
    found += [(1, 4096, 256), (4096, 1, 256), (129, 127, 33), (257, 255, 1), (8, 8, 4000)]
    while len(found) < 40:
        found.append((r.randint(1, 700), r.randint(1, 700), r.choice((r.randint(1, 700), 512))))
    return found


def _operand(rows: int, k: int, format: str, seed: int, device: str) -> Operand:
    """A random operand whose block scales spread over some binades."""
    g = torch.Generator().manual_seed(seed)
    spread = torch.exp2(2 * torch.randn(rows, -(-k // 32), generator=g)).repeat_interleave(32, 1)
    return quantize((torch.randn(rows, k, generator=g) * spread[:, :k]).to(device), format)


def _swizzled(a: Operand) -> Operand:
    return Operand(a.data, swizzle_scale(a.scale), a.format, a.shape, a.tensor_scale, True)


def _values(a: Operand) -> Tensor:
    """The operand in float64: nvfp4's tensor scale is not rounded into it."""
    if a.tensor_scale is None:
        return a.dequantize().double()
    one = torch.ones_like(a.tensor_scale)
    plain = Operand(a.data, a.plain_scale(), a.format, a.shape, one)
    return plain.dequantize().double() * a.tensor_scale.double()


def _bound(backend: str, k: int) -> float:
    """c of |error| <= c |A||B|^T, as docs/numerics.md has it for accumulate="fp32"."""
    return 2.0**-9 if backend.startswith("fold") else max(k, 8) * 2.0**-24


def _one_product(i: int, shape: tuple[int, int, int], format: str, backend: str, device: str):
    """A product with the options that number i picks, as a share of what the bound allows."""
    m, n, k = shape
    a, b = _operand(m, k, format, 2 * i, device), _operand(n, k, format, 2 * i + 1, device)
    alpha = (1.0, -0.5, 16 / 9)[i % 3]
    out_dtype = (torch.bfloat16, torch.float32, torch.bfloat16, torch.float16)[i % 4]
    g = torch.Generator().manual_seed(i)
    bias = torch.randn(n, generator=g).to(device) if i % 2 else None
    left, right = _values(a), _values(b)
    expected = alpha * (left @ right.T)
    allowed = abs(alpha) * _bound(backend, FORMATS[format].padded(k))
    allowed = allowed * (left.abs() @ right.abs().T)
    in_tiles = i % 3 != 1
    left_op, right_op = (_swizzled(a), _swizzled(b)) if in_tiles else (a, b)
    add = i % 5 == 4
    if add:
        out_dtype, before = torch.float32, torch.randn(m, n, generator=g).to(device)
        got = gemm_add_(before.clone(), left_op, right_op, alpha)
        expected = expected + before.double()
    else:
        got = gemm(left_op, right_op, bias, alpha, out_dtype)
        expected = expected if bias is None else expected + bias.double()
    allowed = allowed + UNIT[out_dtype] * expected.abs() + 2.0**-24 * 4 + 1e-37
    if out_dtype == torch.float16:  # what does not fit is Inf
        fits = expected.abs() < 65000
        expected, allowed, got = expected[fits], allowed[fits], got[fits]
    share = ((got.double() - expected).abs() / allowed).nan_to_num(torch.inf)
    worst = min(float(share.max()), 1e30) if share.numel() else 0.0  # JSON has no Infinity
    words = f"{format} {m}x{n}x{k} {str(out_dtype)[6:]}{' +=' if add else ''}"
    words += f" alpha {alpha:.4g}{' bias' if bias is not None and not add else ''}"
    return _result(words + (" swizzled" if in_tiles else ""), worst <= 1, of_bound=worst)


def _nan_stays(format: str, device: str) -> dict:
    """A NaN scale makes its row NaN and nothing else."""
    a, b = _operand(130, 96, format, 1, device), _operand(140, 96, format, 2, device)
    a.scale[77, 1] = 0x7F if FORMATS[format].two_level else 255
    nan = gemm(a, b, out_dtype=torch.float32).isnan()
    good = bool(nan[77].all()) and int(nan.sum()) == nan.shape[1]
    return _result(f"{format} NaN scale in row 77", good, nan=int(nan.sum()))


def gemm_part(device: str, backend: str) -> list[dict]:
    """40 shapes for each format that the backend serves here; the others with its refusal."""
    results = []
    for format in FORMATS:
        taken = backend
        if device == "cuda" and backend == "auto":
            capability = torch.cuda.get_device_capability()
            chosen = gemm_backend(*capability, FORMATS[format].code)
            taken = chosen.split(":")[0]
            found = _result(f"{format} auto takes {chosen}", "needs a build with" not in chosen)
            results.append(found)
        if device == "cuda":
            set_gemm_backend(backend)
            try:
                gemm(*(_operand(16, 64, format, 0, device) for _ in range(2)))
            except RuntimeError as error:
                if "GEMM backend must be one that serves" not in str(error):
                    raise
                results.append({"name": format, "status": NOT_RUN, "detail": str(error)})
                continue
        for i, shape in enumerate(shapes()):
            results.append(_one_product(i, shape, format, taken, device))
        results.append(_nan_stays(format, device))
    return results


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


def probe_part(format: str) -> list[dict]:
    """The block-scaled instruction of 12.x, or what stands for it on 9.0, under every set of
    selectors that the probe has (csrc/cuda/sm120/mma_probe.cu), against the emulation on the CPU.

    The sums are exact, so the results are equal where the chip reads the lanes and bytes that
    csrc/ptx/block_scale.h says.
    """
    try:
        from ._host import mma_block_scale
    except ImportError as error:  # a library that was built for another Python
        return [{"name": format, "status": NOT_RUN, "detail": str(error)}]
    fmt, registers = FORMATS[format], _registers(format)
    scales = 256 // fmt.bits // fmt.block
    here = [*(t.numpy().view("uint32") for t in registers[:4]), registers[4].numpy()]
    results = []
    for byte_a, thread_b in itertools.product(range(0, 4, scales), range(4)):
        selectors = (byte_a, thread_b % 2, 4 - scales - byte_a, thread_b)
        got = mma_probe(fmt.code, selectors, registers)
        if got is None:
            detail = "this build has no code for it: build for 90a, 120a or 121a"
            return [{"name": format, "status": NOT_RUN, "detail": detail}]
        expected = [mma_block_scale(fmt.code, selectors, *one) for one in zip(*here, strict=True)]
        differing = int((got != torch.from_numpy(np.stack(expected))).sum())
        name = f"{format} selectors {selectors}"
        results.append(_result(name, differing == 0, differing=differing))
    return results


# ---- torch's own ----


def scaled_mm_part(format: str) -> list[dict]:
    """torch.nn.functional.scaled_mm on the same operands, against gemm and float64."""
    functional = torch.nn.functional
    if not hasattr(functional, "scaled_mm"):
        return [{"name": format, "status": NOT_RUN, "detail": f"torch {torch.__version__}"}]
    scaling, swizzle = functional.ScalingType, functional.SwizzleType.SWIZZLE_32_4_4
    m, n, k = 512, 384, 1024
    a, b = _operand(m, k, format, 1, "cuda"), _operand(n, k, format, 2, "cuda")
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
        torch.cuda.synchronize()
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return [{"name": format, "status": NOT_RUN, "detail": f"torch: {error}"[:500]}]
    ours = gemm(a, b)
    left, right = _values(a), _values(b)
    expected, size = left @ right.T, left.abs() @ right.abs().T
    allowed = _bound("", k) * size + UNIT[torch.bfloat16] * expected.abs()
    share = [float(((d.double() - expected).abs() / allowed).max()) for d in (theirs, ours)]
    equal = float((theirs == ours).double().mean())
    name = f"{format} {m}x{n}x{k}"
    return [_result(name, max(share) <= 1, theirs=share[0], ours=share[1], same_bytes=equal)]


# ---- one part, in a process of its own ----


def _result(name: str, passed: bool, **figures) -> dict:
    return {"name": name, "status": PASSED if passed else FAILED, **figures}


def run_part(name: str) -> list[dict]:
    """The results of a part by its name: "gemm:cuda:sm100"."""
    kind, *rest = name.split(":")
    parts = {"quantize": quantize_part, "gemm": gemm_part}
    parts |= {"probe": probe_part, "scaled_mm": scaled_mm_part}
    return parts[kind](*rest)


def part_names(cuda: bool) -> list[str]:
    names = ["quantize:cpu", "gemm:cpu:cpu"]
    if cuda:
        block_scaled = [name for name, f in FORMATS.items() if f.bits != 6]
        names += ["quantize:cuda", *(f"gemm:cuda:{name}" for name in GEMM_BACKENDS)]
        names += [f"probe:{f}" for f in block_scaled]
        names += [f"scaled_mm:{f}" for f in block_scaled]
    return names


def _tail(text: str | bytes | None, lines: int = 3) -> str:
    text = text.decode(errors="replace") if isinstance(text, bytes) else text or ""
    return " | ".join(text.strip().splitlines()[-lines:])[:1000]


def _in_a_process(name: str) -> dict:
    """Run a part; what it answered, or how it ended."""
    start = time.perf_counter()
    part = {"part": name, "status": FAILED, "detail": "", "results": []}
    root = str(Path(__file__).parent.parent)
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "results.json"
        command = [sys.executable, "-m", "mxtrain.selftest", name, str(out)]
        try:
            done = subprocess.run(
                command, capture_output=True, timeout=PART_SECONDS,
                env={**os.environ, "PYTHONPATH": path},
            )  # fmt: skip
            if out.exists() and done.returncode == 0:
                part["results"] = json.loads(out.read_text())
            else:
                part["detail"] = f"exit status {done.returncode}: {_tail(done.stderr)}"
        except subprocess.TimeoutExpired as ended:
            part["detail"] = f"not finished after {PART_SECONDS} s: {_tail(ended.stderr)}"
    states = [r["status"] for r in part["results"]]
    if states and FAILED not in states:
        part["status"] = PASSED if PASSED in states else NOT_RUN
    part["seconds"] = round(time.perf_counter() - start, 1)
    part["detail"] = part["detail"] or _summary(part["results"])
    return part


def _summary(results: list[dict]) -> str:
    """The counts, and the worst figure or the first refusal."""
    ran = [r for r in results if r["status"] != NOT_RUN]
    failed = [r for r in ran if r["status"] == FAILED]
    text = f"{len(ran) - len(failed)} of {len(ran)}" if ran else results[0]["detail"][:150]
    shares = [r["of_bound"] for r in ran if "of_bound" in r and "float32" in r["name"]]
    if shares:
        text += f"; float32 out: at most {max(shares):.2g} of the error allowed"
    return text + (f"; first: {failed[0]['name']}" if failed else "")


def _bench(cuda: bool) -> dict:
    """The quick suite of the benchmark, which a checkout has beside the package."""
    part = {"part": "bench:quick", "status": NOT_RUN, "seconds": 0.0, "results": []}
    if not cuda:
        return {**part, "detail": "needs a GPU"}
    root = Path(__file__).parent.parent
    if not (root / "bench/suites.py").exists():
        return {**part, "detail": "no bench package here: run it in a checkout"}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "bench.json"
        command = [sys.executable, "-m", "bench", "run", "--suite", "quick", "--json", str(out)]
        try:
            done = subprocess.run(
                command, cwd=root, stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE, timeout=BENCH_SECONDS,
            )  # fmt: skip
            part["status"] = PASSED if done.returncode == 0 else FAILED
            part["detail"] = f"exit status {done.returncode}: {_tail(done.stderr, 1)}"
        except subprocess.TimeoutExpired:
            part |= {"status": FAILED, "detail": f"not finished after {BENCH_SECONDS} s"}
        if out.exists():
            part["json"] = json.loads(out.read_text())
    part["seconds"] = round(time.perf_counter() - start, 1)
    return part


def _build(unserved: Sequence[str]) -> dict:
    """Whether the build has code for every visible GPU; unserved names each that it lacks."""
    results = [{"name": text, "status": FAILED} for text in unserved]
    detail = "; ".join(unserved) or "has code for every visible GPU"
    status = FAILED if unserved else PASSED
    return {"part": "build", "status": status, "seconds": 0.0, "results": results, "detail": detail}


def run(
    path: Path, report: dict, cuda: bool, bench: bool = True, unserved: Sequence[str] = ()
) -> int:
    """Run everything, print a line a part, write the JSON; the exit status.

    cuda: whether the build has code for the GPU that "cuda" means; unserved: what to build for each
    visible GPU that it has none for, which is a failure.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        print(f"mxtrain.env: --selftest cannot write {path}: {error.strerror}", file=sys.stderr)
        return 2
    names = [*(["build"] if report["gpus"] else []), *part_names(cuda)]
    names += ["bench:quick"] if bench else []
    print(f"\nself test, {len(names)} parts")
    here, parts = {"build": lambda: _build(unserved), "bench:quick": lambda: _bench(cuda)}, []
    for name in names:
        print(f"  {name:<26}", end="", flush=True)
        part = here[name]() if name in here else _in_a_process(name)
        parts.append(part)
        print(f"{part['status'].upper():<9}{part['seconds']:>6} s  {part['detail']}", flush=True)
        data = {"schema": SCHEMA, "report": report, "parts": parts}
        path.write_text(json.dumps(data, indent=1) + "\n")  # each time: it may be interrupted
    if not cuda:
        print("  not run: all of CUDA, for want of a GPU that this build has code for")
    failed = [part["part"] for part in parts if part["status"] == FAILED]
    print(f"{'FAILED: ' + ', '.join(failed) if failed else 'passed'}; all figures are in {path}")
    return 1 if failed else 0


if __name__ == "__main__":
    found = run_part(sys.argv[1])
    Path(sys.argv[2]).write_text(json.dumps(found))
