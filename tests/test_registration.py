"""What makes the ops good citizens of torch.

Schemas, fake kernels, autograd (opcheck), torch.compile, and the built library.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from common import FORMATS, operand, refuses

import mxtrain
from mxtrain import _library, ops, reference, tables
from mxtrain import env as mxtrain_env

X = torch.randn(64, 96)
RNG = torch.tensor([1, 2])


def op_samples(device: str) -> list[tuple[str, tuple, dict]]:
    """Arguments for every op: (op, args, kwargs)."""
    x, rng = X.to(device), RNG.to(device)
    signs = mxtrain.draw_signs(32, device=device)[0]
    samples = []
    for code, name in enumerate(FORMATS):
        a = operand(33, 70, name, device=device)
        ts = a.tensor_scale
        samples += [
            ("quantize", (x.bfloat16(), code), {}),
            ("quantize", (x.T, code, 2, 1, True, rng, 32, signs, 0.75), {}),
            ("quantize", (x.half(), code), {"rounding": 2, "toward": x, "swizzle": True}),
            (
                "quantize_dual",
                (x, rng, code, 1, 1, 0, None, 1.0, None, 0, 0, 0, 32, signs, 0.75, None),
                {},
            ),
            (
                "quantize_dual",
                (x.bfloat16(), rng, *(0, 1, 1, 0, None, 1.0, None) * 2),
                {"column_sum": True},
            ),
            ("requantize", (a.data, a.scale, ts, code, 70, 0, 1, 1, rng), {}),
            ("dequantize", (a.data, a.scale, ts, code, 70, torch.bfloat16), {}),
            (
                "gemm",
                (a.data, a.scale, ts, a.data, a.scale, ts, code, None, 1.0, torch.bfloat16),
                {},
            ),
            (
                "gemm",
                (
                    a.data,
                    a.scale,
                    ts,
                    a.data,
                    a.scale,
                    ts,
                    code,
                    torch.ones(33, device=device),
                    0.5,
                    torch.float32,
                    1,
                ),
                {},
            ),
            (
                "gemm_add_",
                (
                    torch.ones(33, 33, device=device),
                    *(a.data, a.scale, ts),
                    *(a.data, a.scale, ts),
                    code,
                    2.0,
                ),
                {},
            ),
        ]
        made = mxtrain.quantize(x.bfloat16(), name)
        made = (made.data, made.scale, made.tensor_scale, code)
        state = torch.zeros(5, 64, 96, device=device)
        sums = torch.zeros(128, 5, dtype=torch.float64, device=device)
        samples += [
            ("quantization_statistics", (x, *made), {}),
            ("quantization_statistics", (x.T.half().T, *made, 0.75), {}),
            ("oscillation_step_", (state, sums, x.bfloat16(), *made), {}),
        ]
    scale = torch.randint(0, 255, (130, 5), dtype=torch.uint8, device=device)
    samples += optimizer_samples(device)
    samples += [
        ("hadamard", (x.clone().requires_grad_(), 32, signs), {}),
        ("hadamard", (x, 16), {}),
        ("stochastic_round", (x, torch.bfloat16, rng), {}),
        ("stochastic_round", (x.T, torch.float8_e4m3fn, rng), {}),
        ("swizzle_scale", (scale,), {}),
        ("unswizzle_scale", (mxtrain.swizzle_scale(scale), 130, 5), {}),
        ("int8_quantize", (x.bfloat16(),), {}),
        ("int8_quantize", (x.T, 1, rng, 2), {}),
        ("int8_quantize_fallback", (x.half(), torch.full((1,), 3.0, device=device), 1), {}),
        ("int8_gemm", (*int8_parts(x)[:2] * 2, None, torch.bfloat16), {}),
        ("int8_gemm", int8_call(x), {}),
        *int8_pool_samples(x),
        ("column_sum", (x.bfloat16(),), {}),
        ("column_sum", (x.T,), {}),
        *context_samples(x),
    ]
    return samples


def optimizer_samples(device: str) -> list[tuple[str, tuple, dict]]:
    def like(count, dtype=torch.float32, fill=0.5):
        shapes = [(5, 40), (64,)][:count]
        return [torch.full(s, fill, device=device).to(dtype) for s in shapes]

    lr, rows = torch.full((1,), 0.1, dtype=torch.float64, device=device), RNG.to(device)
    steps = [torch.zeros((), device=device) for _ in range(2)]
    numbers = (0.1, 0.9, 0.999, 1e-8, 0.1)
    one = (like(1), like(1), like(1), like(1), steps[:1], *numbers)
    two = (like(2), like(2), like(2), like(2), steps, *numbers)
    bf16 = torch.bfloat16
    half = (like(1, bf16), like(1, bf16), like(1), like(1), steps[:1], *numbers)
    return [
        ("adamw_", (*two, lr, None, [], [], [], []), {}),
        ("adamw_", (*half, None, rows[None], [], [], [], []), {}),
        ("adamw_", (*one, None, None, like(1), [0.1], like(1), like(1), 1, 2), {}),
        (
            "ramped_adamw_",
            (*two, lr, None, like(2), like(2, torch.int16, 2), like(2, torch.int16, 2)),
            {},
        ),
        (
            "ramped_adamw_",
            (*half, None, rows[None], like(1), like(1, torch.uint8, 3), like(1, torch.uint8, 3)),
            {},
        ),
    ]


def context_samples(x: torch.Tensor) -> list[tuple[str, tuple, dict]]:
    w, fwd = torch.ones(x.shape[1], device=x.device), torch.ops.mxtrain
    _, *norm = fwd.rms_norm_forward(x, w, 1e-6, torch.bfloat16)
    _, *glu = fwd.swiglu_forward(x, x)
    return [
        ("rms_norm_forward", (x.bfloat16(), w, 1e-6, torch.bfloat16), {}),
        ("rms_norm_forward", (x.T, None, 0.0, torch.float16, False), {}),
        ("rms_norm_backward", (x.half(), *norm, w.bfloat16(), torch.bfloat16), {}),
        ("rms_norm_backward", (x, *norm, None, torch.float32), {}),
        ("rms_norm_backward", (x, *norm, w, torch.float32, False), {}),
        ("swiglu_forward", (x.bfloat16(), x.bfloat16()), {}),
        ("swiglu_forward", tuple(x.chunk(2, 1)), {"context": False}),
        ("swiglu_backward", (x.half(), *glu, torch.bfloat16), {}),
    ]


def int8_parts(x: torch.Tensor) -> tuple:
    """An operand of whose residual every block is written."""
    return mxtrain.int8_quantize_fallback(x, 1e-9)[0].parts


def int8_call(x: torch.Tensor) -> tuple:
    data, scale, *residual = int8_parts(x)
    bias = torch.ones(len(x), device=x.device)
    return (data, scale, data, scale, bias, torch.float32, *residual, True)


def int8_pool_samples(x: torch.Tensor) -> list[tuple[str, tuple, dict]]:
    """Of a pool that is full."""
    _, scale, residual, _, mask = int8_parts(x.repeat(3, 2))
    pool, slots = torch.ops.mxtrain.int8_pack_residual(residual, scale, mask, 3)
    assert pool.shape == (3, 128, 128) and residual.shape == (192, 256)
    small = (pool, slots[:1, :1], 100, 128)
    codes = residual[:, :128], scale[:, :1]
    return [
        ("int8_gemm", (*codes, *codes, None, torch.float32, pool, scale[:, :1], slots[:, :1]), {}),
        ("int8_pack_residual", (residual, scale, mask, 3), {}),
        ("int8_pack_residual", (residual, scale, mask, 0), {}),
        ("int8_unpack_residual", small, {}),
    ]


@pytest.mark.parametrize("name", ops.OP_NAMES)
@pytest.mark.ops(*ops.OP_NAMES)
def test_opcheck(name, device):
    samples = [s for s in op_samples(device) if s[0] == name]
    assert samples
    for _, args, kwargs in samples:
        torch.library.opcheck(getattr(torch.ops.mxtrain, name), args, kwargs)


def test_every_op_is_named_and_documented():
    registered = {
        schema.name.split("::")[1]
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("mxtrain::")
    }
    assert registered == set(ops.OP_NAMES)
    for name in registered:
        assert f"\n{name}(" in ops.__doc__ or f"; {name}(" in ops.__doc__
    layers = {"rms_norm_forward", "rms_norm_backward", "swiglu_forward", "swiglu_backward"}
    layers |= {"int8_pack_residual", "int8_unpack_residual"}
    for name in set(ops.OP_NAMES) - layers - {"adamw_", "ramped_adamw_"}:  # of nn and optim
        assert getattr(mxtrain, name).__doc__


def test_ops_on_meta_tensors():
    got = torch.ops.mxtrain.quantize(
        torch.empty(100, 200, device="meta"), FORMATS.index("mxfp4"), transpose=True
    )
    assert [tuple(t.shape) for t in got] == [(200, 64), (200, 4), (0,)]


@pytest.mark.ops("quantize", "gemm")
def test_compiled_pipeline_equals_eager_with_dynamic_shapes(device):
    def f(x, w, rng):
        a = mxtrain.quantize(x, "mxfp4", rounding="stochastic", rng=rng)
        return mxtrain.gemm(a, mxtrain.quantize(w, "mxfp4"), out_dtype=torch.float32).relu()

    compiled = torch.compile(f, fullgraph=True, dynamic=True)
    for rows in (16, 33):
        x, w = torch.randn(rows, 96, device=device), torch.randn(40, 96, device=device)
        assert torch.equal(compiled(x, w, RNG.to(device)), f(x, w, RNG.to(device)))


@pytest.mark.skipif(not shutil.which("nm"), reason="needs binutils")
def test_library_has_no_python_and_no_unstable_torch_symbols():
    command = ["nm", "-D", "--undefined-only", "--demangle", str(_library.PATH)]
    symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "aoti_torch_" in symbols, (
        "the stable ABI's shims must be there, or this test reads the wrong table"
    )
    bad = [
        s
        for s in symbols.splitlines()
        if any(p in s for p in (" Py", "_Py", "at::", "c10::", "torch::"))
    ]
    assert not bad, bad
    needed = subprocess.run(["ldd", str(_library.PATH)], capture_output=True, text=True).stdout
    assert "libpython" not in needed


def test_catalogue_agrees_with_the_reference():
    """C++ and the reference define the formats independently."""
    for name, fmt in mxtrain.FORMATS.items():
        other = reference.format_named(name)
        element = other.element
        assert (fmt.ebits, fmt.mbits, fmt.emax, fmt.max, fmt.block) == (
            element.ebits,
            element.mbits,
            element.emax,
            element.max,
            other.block,
        )


def test_host_codecs():
    host = pytest.importorskip("mxtrain._host", reason="this library was built for another Python")
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).float()
    x = x[x.isfinite()].numpy()
    dtypes = {
        "e2m1": "float4_e2m1fn",
        "e2m3": "float6_e2m3fn",
        "e3m2": "float6_e3m2fn",
        "e4m3": "float8_e4m3fn",
        "e5m2": "float8_e5m2",
    }
    for element, name in dtypes.items():
        dtype = getattr(ml_dtypes, name)
        limit = float(ml_dtypes.finfo(dtype).max)
        expected = np.clip(x, -limit, limit).astype(dtype)
        codes = host.encode(element, x)
        assert np.array_equal(codes, expected.view(np.uint8)), element
        every = np.arange(2 ** (1 + sum(map(int, (element[1], element[3])))), dtype=np.uint8)
        got, want = host.decode(element, every), every.view(dtype).astype(np.float32)
        assert np.array_equal(got, want, equal_nan=True), element
    codes = np.arange(255, dtype=np.uint8)
    assert np.array_equal(
        host.e8m0_decode(codes), np.ldexp(np.float64(1), codes.astype(int) - 127).astype(np.float32)
    )
    assert np.isnan(host.e8m0_decode(np.array([255], np.uint8))[0])
    # Random123's known answers for philox4x32-7.
    assert host.philox4x32([0] * 4, [0] * 2) == (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)
    assert host.philox4x32([2**32 - 1] * 4, [2**32 - 1] * 2) == (
        0x5207DDC2,
        0x45165E59,
        0x4D8EE751,
        0x8C52F662,
    )
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    assert host.philox4x32(pi, [0xA4093822, 0x299F31D0]) == (
        0x4DFCCABA,
        0x190A87F0,
        0xC47362BA,
        0xB6B5242A,
    )
    for call, message in (
        (lambda: host.encode("e9m9", x), "element must be one of e2m1"),
        (lambda: host.encode("e2m1", np.array([1, np.inf], np.float32)), "values must be finite"),
        (lambda: host.e8m0_scale("e2m1", x[:1], 7), r"rule must be .* got 7 \(known: 0 to 2\)"),
        (lambda: host.e8m0_scale("e2m1", -x[:9] - 1, 0), "block_max must be finite and not"),
    ):
        with refuses(ValueError, message):
            call()


def test_env_report_and_self_test(capsys):
    assert mxtrain_env.main([]) == 0
    text = capsys.readouterr().out
    assert "FAIL" not in text and "PASS" in text and all(op in text for op in ops.OP_NAMES)
    assert mxtrain_env.main(["--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (
        set(data["backends"]) == set(ops.OP_NAMES)
        and data["build"]["version"] == mxtrain.__version__
    )
    assert mxtrain_env.built_for("9.0", "80;90a") and not mxtrain_env.built_for("8.9", "90a")
    assert mxtrain_env.built_for("8.9", "80") and not mxtrain_env.built_for("9.1", "90a")
    # From 10.0 on the portable kernels are family code, and the suffix says what else is built.
    assert mxtrain_env.built_for("10.3", "100a") and mxtrain_env.built_for("12.0", "121a")
    assert not mxtrain_env.built_for("10.0", "90a;120a") and mxtrain_env.built_for("10.3", "100")
    assert "gemm by compute capability" in text and "never run on the chip" in text
    assert ("native: mxfp4, mxfp8_e4m3, mxfp8_e5m2, nvfp4" in text) and ("folded: mxfp4" in text)


def test_import_is_lean():
    """Importing the package pulls in no test, plotting or compiler package."""
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import mxtrain\n"
        "optional = {'torchao', 'matplotlib', 'sklearn', 'tqdm', 'scipy', "
        "'torch._inductor.compile_fx'}\n"
        "bad = optional & (set(sys.modules) - before)\n"
        "sys.exit(repr(bad) if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_tables_of_the_documentation_are_up_to_date():
    root = Path(__file__).parent.parent
    assert tables.main(["--check", "--root", str(root)]) == 0
