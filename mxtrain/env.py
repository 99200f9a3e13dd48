"""`python -m mxtrain.env`: what this machine and build can do.

Prints versions, GPUs, what this build holds, which backend each op takes and why, and a short self
test; `--selftest` runs the long one of mxtrain/selftest.py instead. `report()` is the same as a
dict (JSON-able), which the benchmark suite stores beside its measurements.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

from . import formats, ops, reference, selftest
from ._library import CATALOGUE, PATH, gemm_backend, int8_gemm_backend
from .operand import gemm, quantize
from .version import __version__

ENVIRONMENT = (
    "MXTRAIN_CUDA_ARCHS",
    "MXTRAIN_CUTLASS",
    "MXTRAIN_GEMM_BACKEND",
    "MXTRAIN_INT8_GEMM",
    "MXTRAIN_SPLIT_K",
    "MXTRAIN_GEMM_OVERLAP",
    "MAX_JOBS",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
)


WITHOUT_CUTLASS = "without CUTLASS: sm100 GEMM absent (third_party/README.md)"


def has_kernel(op: str, key: str) -> bool:
    """Whether this build has a kernel of torch.ops.mxtrain.<op> for "CPU" or "CUDA"."""
    if key == "CUDA" and not CATALOGUE["build"]["cuda_archs"]:
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"mxtrain::{op}", key)


def gpus() -> list[dict]:
    """The visible GPUs: name, compute capability, memory in GiB."""
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": p.name,
                "compute_capability": f"{p.major}.{p.minor}",
                "memory_gib": round(p.total_memory / 2**30, 1),
                "sms": p.multi_processor_count,
            }
        )
    return found


def _answer(*command: str) -> str:
    """What a command prints, or "" where it cannot be run or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def commit() -> str:
    """The commit of the checkout that this runs in, or the version's local part, or ""."""
    root, found = Path(__file__).parent.parent, ""
    if (root / ".git").exists():
        found = _answer("git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12")
    return found or __version__.partition("+")[2]


def driver() -> str:
    """The version of the GPU's driver, or "" where there is none to ask."""
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return _answer(*query).partition("\n")[0] if gpus() else ""


def built_for(capability: str, archs: str) -> bool:
    """Whether one of the built architectures ("80;90a") runs on a compute capability ("9.0").

    The same as built_for in csrc/dispatch.cpp.
    """
    major, minor = (int(part) for part in capability.split("."))
    for arch in filter(None, archs.split(";")):
        number = int(arch.rstrip("af"))
        if number // 10 != major:
            continue
        if arch[-1] in "af":  # from 10.0 on, code for the family
            if major >= 10 or number % 10 == minor:
                return True
        elif number % 10 <= minor:
            return True
    return False


def arch_of(capability: str) -> str:
    """The architecture to build for: "120a" for "12.0", with the suffix from 9.0 on."""
    return capability.replace(".", "") + ("a" if int(capability.split(".")[0]) >= 9 else "")


def remedy(capability: str) -> str:
    """What to do about a GPU that a build has no code for; none can be built before 8.0."""
    if int(capability.split(".")[0]) < 8:
        return "8.0 or newer is needed"
    return f"MXTRAIN_CUDA_ARCHS={arch_of(capability)} pip install -e ."


def unserved() -> list[str]:
    """What to build for each visible GPU that this build has no code for."""
    archs = CATALOGUE["build"]["cuda_archs"]
    return [
        f"{gpu['name']} is {gpu['compute_capability']}, this build has code for "
        f"{archs or 'no GPU'}: {remedy(gpu['compute_capability'])}"
        for gpu in gpus()
        if not built_for(gpu["compute_capability"], archs)
    ]


def cuda_here() -> bool:
    """Whether this build has code for the first GPU, the one that "cuda" means."""
    found = gpus()
    return bool(found) and built_for(
        found[0]["compute_capability"], CATALOGUE["build"]["cuda_archs"]
    )


def backends(op: str) -> dict[str, str]:
    """What serves an op on the CPU and on the first GPU, and why."""
    isa = CATALOGUE["build"]["cpu_isa"]
    chosen = {"cpu": f"cpu ({isa} kernels, {torch.get_num_threads()} threads)"}
    archs, found = CATALOGUE["build"]["cuda_archs"], gpus()
    if not archs:
        chosen["cuda"] = (
            "none: this build has no CUDA kernels (MXTRAIN_CUDA_ARCHS=native pip install .)"
        )
    elif not has_kernel(op, "CUDA"):
        chosen["cuda"] = "none: not implemented on CUDA yet"
    elif not found:
        chosen["cuda"] = f"built for {archs}; no GPU is visible"
    elif not built_for(found[0]["compute_capability"], archs):
        capability = found[0]["compute_capability"]
        chosen["cuda"] = f"none: built for {archs}, the GPU is {capability} ({remedy(capability)})"
    else:
        chosen["cuda"] = f"portable kernel, for {archs}"
        if op == "gemm":
            chosen["cuda"] = _gemm_backends(found[0]["compute_capability"])
        elif op == "int8_gemm":
            chosen["cuda"] = int8_gemm_backend(*map(int, found[0]["compute_capability"].split(".")))
    return chosen


def gemm_backend_here(format: str) -> str:
    """The backend that gemm takes for a format on the first GPU ("fold", "dequant"), or ""."""
    if not cuda_here():
        return ""
    major, minor = (int(part) for part in gpus()[0]["compute_capability"].split("."))
    return gemm_backend(major, minor, formats.FORMATS[format].code).split(":")[0]


def _gemm_backends(capability: str) -> str:
    """Which backend gemm takes for each format: "mxfp4: fold: ...; the others: dequant: ..."."""
    major, minor = (int(part) for part in capability.split("."))
    served: dict[str, list[str]] = {}
    for name, row in formats.FORMATS.items():
        served.setdefault(gemm_backend(major, minor, row.code), []).append(name)
    if len(served) == 1:
        return next(iter(served))
    return "; ".join(f"{', '.join(names)}: {backend}" for backend, names in served.items())


def gemm_by_architecture() -> list[str]:
    """What gemm is on each architecture, whether this build has its code, where it has run."""
    mxfp4, lines = formats.FORMATS["mxfp4"].code, []
    for row in formats.GEMM_ROWS:
        served = ", ".join(name for name in formats.FORMATS if name in row["formats"])
        others = ", ".join(name for name in formats.FORMATS if name not in row["formats"])
        major, minor = (int(part) for part in row["capability"].split("."))
        archs = CATALOGUE["build"]["cuda_archs"]
        chosen = gemm_backend(major, minor, mxfp4) if archs else ""
        here = f"not built (MXTRAIN_CUDA_ARCHS={row['arch']})"
        if chosen.split(":")[0] == row["backend"]:
            here = "built"
        elif "CUTLASS" in chosen:  # the architecture is built
            here = "not built (needs CUTLASS: third_party/README.md)"
        where = f"{row['capability']}  {row['gpus']}"
        kinds = f"{row['kind']}: {served}; dequantized: {others}"
        lines.append(f"{where:<34}{kinds}; {row['proof']}; {here}")
    return [*lines, f"{'all else':<34}dequantized to BF16: every format"]


def report() -> dict:
    """Everything that `python -m mxtrain.env` prints, but the self test.

    The keys commit and driver are there only where they are known.
    """
    known = {"commit": commit(), "driver": driver()}
    return {
        "mxtrain": __version__,
        **{key: text for key, text in known.items() if text},
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_threads": torch.get_num_threads(),
        "build": CATALOGUE["build"],
        "library": PATH.name,
        "gpus": gpus(),
        "backends": {op: backends(op) for op in ops.OP_NAMES},
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
    }


def self_test() -> list[tuple[str, bool, str]]:
    """(name, passed, detail) of a few checks against the reference; about a second."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 256, generator=generator).bfloat16()
    rng = torch.tensor([1, 2])
    results = []
    devices = ["cpu", "cuda"] if cuda_here() else ["cpu"]
    for device in devices:
        for name in formats.FORMATS:
            got = quantize(x.to(device), name, rounding="stochastic", rng=rng.to(device))
            data, scale, _ = reference.quantize(x, name, rounding="stochastic", rng=rng)
            same = torch.equal(got.data.cpu(), data) and torch.equal(got.scale.cpu(), scale)
            results.append(
                (
                    f"{device} quantize {name}",
                    same,
                    "bytes equal the reference" if same else "bytes differ",
                )
            )
        if not has_kernel("gemm", device.upper()):
            continue
        a = quantize(x.to(device), "mxfp4")
        got = gemm(a, a, out_dtype=torch.float32).double().cpu()
        values = a.dequantize().double().cpu()
        error = (
            (got - values @ values.T).abs() / (values.abs() @ values.abs().T).clamp_min(1e-30)
        ).max()
        results.append(
            (
                f"{device} gemm mxfp4",
                bool(error <= 256 * 2**-24),
                f"error {float(error):.1e} of |A||B|",
            )
        )
    return results


def _print_report(data: dict) -> None:
    at = f" ({data['commit']})" if "commit" in data else ""
    print(
        f"mxtrain {data['mxtrain']}{at}   torch {data['torch']}   "
        f"Python {data['python']}   {data['platform']}"
    )
    build = data["build"]
    archs = build["cuda_archs"] or "none (CPU-only build)"
    print(
        f"build   CUDA architectures: {archs}   nvcc: {build['nvcc'] or '-'}   "
        f"compiler: {build['cxx']}"
    )
    print(
        f"        torch ABI {build['torch_abi']}, built with torch {build['built_with_torch']}; "
        f"CPU kernels: {build['cpu_isa']}"
    )
    if re.search(r"\b10\d[af]", archs):
        text = f"CUTLASS {build['cutlass']}" if build["cutlass"] else WITHOUT_CUTLASS
        print(f"        {text}")
    driven = f", driver {data['driver']}" if "driver" in data else ""
    for gpu in data["gpus"] or [None]:
        text = (
            f"{gpu['name']}, compute capability {gpu['compute_capability']}, "
            f"{gpu['memory_gib']} GiB{driven}"
            if gpu
            else "none visible"
        )
        print(f"GPU     {text}")
    for name, value in data["environment"].items():
        print(f"set     {name}={value}")
    width = max(map(len, data["backends"])) + 2
    print(f"\n{'op':<{width}}{'on the CPU':<34}on CUDA")
    for op, chosen in data["backends"].items():
        print(f"{op:<{width}}{chosen['cpu']:<34}{chosen['cuda']}")
    print("\ngemm by compute capability")
    for line in gemm_by_architecture():
        print(f"  {line}")


def main(argv: list[str] | None = None) -> int:
    """Print the report and run a self test; 0 if it passes, 2 for an unusable argument."""
    parser = argparse.ArgumentParser(prog="python -m mxtrain.env", description=__doc__)
    parser.add_argument(
        "--json", action="store_true", help="print the report as JSON, without the self test"
    )
    parser.add_argument(
        "--selftest",
        nargs="?",
        const=selftest.FILE,
        metavar="FILE",
        help=f"the long self test, minutes; writes one JSON to send back (default {selftest.FILE})",
    )
    parser.add_argument(
        "--no-bench", action="store_true", help="with --selftest: leave the bench suite out"
    )
    options = parser.parse_args(argv)
    data = report()
    if options.selftest:
        _print_report(data)
        return selftest.run(
            Path(options.selftest), data, cuda_here(), not options.no_bench, unserved()
        )
    if options.json:
        print(json.dumps(data, indent=2))
        return 0
    _print_report(data)
    start = time.perf_counter()
    results = self_test()
    print(f"\nself test ({time.perf_counter() - start:.1f} s)")
    for name, passed, detail in results:
        print(f"  {'PASS' if passed else 'FAIL'}  {name:<26}{detail}")
    return 0 if all(passed for _, passed, _ in results) else 1


if __name__ == "__main__":
    sys.exit(main())
