"""What the tests share: byte comparison, hard inputs, and the options that formats sweep."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mxtrain
from mxtrain import reference
from mxtrain.env import has_kernel

FORMATS = list(mxtrain.FORMATS)
RULES = ["floor", "ceil", "even"]
ROUNDINGS = ["nearest", "stochastic", "toward"]
FLOATS = [torch.bfloat16, torch.float16, torch.float32]


# mxtrain::<op>: <argument> must <condition>, got <value> (<context>). <what to do>
STYLE = re.compile(r"mxtrain::[\w.]+: [^:]+? must .+, got .+ \(.+\)\. [A-Z].*[.:)\w]", re.DOTALL)


@contextlib.contextmanager
def refuses(error: type[Exception], match: str):
    """pytest.raises of exactly this error, whose message is in the style of the package."""
    with pytest.raises(error, match=match) as caught:
        yield caught
    assert caught.type is error
    message = str(caught.value)
    assert STYLE.fullmatch(message) and "\n" not in message, message


def own_process(*paths: Path, **variables: str) -> dict[str, str]:
    """The environment of another Python, which imports this package, installed or not, and what
    lies in paths.
    """
    before = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    wanted = [*map(str, paths), str(Path(mxtrain.__file__).parents[1]), *before]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, wanted)), **variables}


def cuobjdump() -> str | None:
    """The disassembler: on the PATH, or of the package nvidia-cuda-cuobjdump."""
    found = shutil.which("cuobjdump")
    if found:
        return found
    try:
        import nvidia.cu13 as toolkit
    except ImportError:
        return None
    places = (Path(p) / "bin/cuobjdump" for p in toolkit.__path__)
    return next((str(p) for p in places if p.exists()), None)


def cuda_has(op: str) -> bool:
    """Whether this build has a CUDA kernel for torch.ops.mxtrain.<op>."""
    return has_kernel(op, "CUDA")


def assert_same_bytes(got: Tensor, expected: Tensor, what: str = "") -> None:
    """Bitwise equality; on failure says how many differ and the first difference."""
    assert got.dtype == expected.dtype and got.shape == expected.shape, (
        what,
        got.shape,
        expected.shape,
    )
    if got.numel() == 0:
        return
    a, b = (t.cpu().contiguous().view(torch.uint8).flatten() for t in (got, expected))
    if torch.equal(a, b):
        return
    size = got.element_size()
    index = int((a != b).nonzero()[0]) // size
    where = torch.unravel_index(torch.tensor(index), got.shape)
    raise AssertionError(
        f"{what}: {int((a != b).sum())} bytes differ; first at {[int(i) for i in where]}: "
        f"got {got.cpu().flatten()[index]}, expected {expected.cpu().flatten()[index]}"
    )


def assert_same_operand(got: mxtrain.Operand, expected: tuple, what: str = "") -> None:
    """An Operand against what the reference returned."""
    data, scale, tensor_scale = expected
    if tensor_scale is not None:
        assert_same_bytes(got.tensor_scale, tensor_scale.reshape(1), f"{what} tensor_scale")
    else:
        assert got.tensor_scale is None
    assert_same_bytes(got.scale, scale, f"{what} scale")
    assert_same_bytes(got.data, data, f"{what} data")


def check_quantize(x: Tensor, format: str, device: str = "cpu", **options) -> mxtrain.Operand:
    """mxtrain.quantize on the device against the reference on the CPU, byte for byte."""

    def to(t):
        return t.to(device) if isinstance(t, Tensor) else t

    got = mxtrain.quantize(_like(x, device), format, **{k: to(v) for k, v in options.items()})
    assert_same_operand(got, reference.quantize(x, format, **options), f"{format} {options.keys()}")
    return got


def _like(x: Tensor, device: str) -> Tensor:
    """x on the device with the same strides and storage offset."""
    if device == "cpu":
        return x
    storage = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()).to(device)
    return storage.as_strided(x.shape, x.stride(), x.storage_offset())


def all_bfloat16(order: str) -> Tensor:
    """Every one of the 65,536 bfloat16 values, as [512, 128].

    "natural": neighbours in value share blocks.
    "shuffled": magnitudes mix (and most blocks hold a NaN).
    "finite": shuffled, NaN and Inf left at the end, so that mixed blocks are quantized.
    """
    x = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    if order != "natural":
        x = x[torch.randperm(65536, generator=torch.Generator().manual_seed(1))]
    if order == "finite":
        x = torch.cat([x[x.isfinite()], x[~x.isfinite()]])
    return x.reshape(512, 128)


def options_for(rounding: str, x: Tensor, seed: int = 5) -> dict:
    """The tensors that a rounding needs: rng, or a perturbed copy of x as `toward`."""
    if rounding == "stochastic":
        return {"rounding": rounding, "rng": torch.tensor([seed, 7 + ((seed & 0xFFFF) << 33)])}
    if rounding == "toward":
        generator = torch.Generator().manual_seed(seed)
        noise = 1 + 0.3 * torch.randn(x.shape, generator=generator)
        return {"rounding": rounding, "toward": x.float() * noise}
    return {"rounding": rounding}


def operand(
    rows: int, k: int, format: str, spread: float = 2.0, seed: int = 0, device: str = "cpu"
) -> mxtrain.Operand:
    """A random operand whose block scales spread over 2 * spread binades or so."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, k, generator=generator)
    x *= torch.exp2(spread * torch.randn(rows, -(-k // 32), generator=generator)).repeat_interleave(
        32, 1
    )[:, :k]
    return mxtrain.quantize(x.to(device), format)


def parts(a: mxtrain.Operand) -> tuple:
    """An operand as the reference takes it."""
    return a.data.cpu(), a.scale.cpu(), None if a.tensor_scale is None else a.tensor_scale.cpu()


def wide_range(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    """Blocks of every exponent, from subnormals to the largest, some zero, NaN or Inf."""
    g = torch.Generator().manual_seed(seed)
    exponent = torch.randint(-140, 128, (rows, -(-cols // 32)), generator=g).repeat_interleave(
        32, 1
    )
    x = torch.randn(rows, cols, generator=g, dtype=torch.float64).clamp(-3.9, 3.9)
    x = (x * 2.0 ** exponent[:, :cols].double()).bfloat16()
    if x.numel() > 400:
        x.view(-1)[::397] = torch.tensor([float("nan"), float("inf"), -0.0, 0.0])[
            torch.arange(x.view(-1)[::397].numel()) % 4
        ].bfloat16()
    return x


def prefer_pair(m: int, n: int, multiprocessors: int) -> bool:
    """prefer_pair of csrc/cuda/sm100/gemm.h; tests/sm100/test_sm100_gemm.py compares the two."""
    pair = -(-(-(-m // 256) * -(-n // 256)) // (multiprocessors // 2))
    single = -(-(-(-m // 128) * -(-n // 128)) // multiprocessors)
    return pair * 20 <= single * 12
