"""Build of mxtrain: hands CMake what it needs to know.

Nothing here needs a GPU, and torch is never imported.

MXTRAIN_CUDA_ARCHS  "90a", "80;90a;100a;120a", "native" (the visible GPUs), "all", or "none".
                    Unset: native where a GPU is visible, otherwise CPU only.
MAX_JOBS            compile jobs; unset: as many as the cores and the free memory allow.
MXTRAIN_STRICT      "1": a kernel that spills registers, where none should, fails the build.
MXTRAIN_EMULATED    "1": build/emulated too, the CUDA kernels on the CPU (docs/emulation.md).
MXTRAIN_CUTLASS     where the CUTLASS headers are, or "off" (third_party/README.md); for 10.x only.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
ALL_ARCHS = "80;89;90a;100a;103a;120a;121a"
# What csrc has kernels for: from 9.0 on with a suffix, without which nvcc leaves out the
# instructions of tensor cores; f is the family of minor versions.
KNOWN_ARCHS = (
    *("80", "86", "87", "88", "89", "90a"),
    *(number + suffix for number in ("100", "103", "110", "120", "121") for suffix in "af"),
)
GIB_PER_JOB = 2  # what one compile job may take
GIB_PER_CUTLASS_JOB = 5.5  # one of csrc/cuda/sm100


def package_version() -> str:
    return re.search(r'__version__ = "(.+)"', (ROOT / "mxtrain/version.py").read_text()).group(1)


def torch_dir() -> Path:
    """The torch folder of the environment that installs.

    Also from inside pip's isolated build environment: there site-packages is hidden
    from imports, but sysconfig still names it.
    """
    spec = importlib.util.find_spec("torch")
    candidates = [Path(spec.origin).parent] if spec and spec.origin else []
    candidates += [Path(sysconfig.get_path(name)) / "torch" for name in ("platlib", "purelib")]
    for path in candidates:
        if (path / "include/torch/csrc/stable/library.h").exists():
            return path
    raise SystemExit(
        "mxtrain: torch >= 2.11 must be installed before mxtrain is built, "
        f"got none in {sys.prefix}.\n"
        f"  {sys.executable} -m pip install 'torch>=2.11'"
    )


def torch_version(path: Path) -> str:
    return re.search(r"__version__ = '(.+)'", (path / "version.py").read_text()).group(1)


def gpu_archs() -> list[str]:
    """Compute capabilities of the visible GPUs, as CMake names them; empty without nvidia-smi."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        text = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    numbers = {line.strip().replace(".", "") for line in text.splitlines() if line.strip()}
    return sorted(n + ("a" if int(n) >= 90 else "") for n in numbers if n.isdigit())


def right_spelling(arch: str) -> str:
    """What to ask for in place of an architecture that is none: sm_120, 12.0, 120 -> 120a."""
    number = re.fullmatch(r"(?:sm_?|compute_?)?(\d+)\.?(\d)([a-z]?)", arch)
    if number:
        bare, suffix = number[1] + number[2], number[3]
        for known in (bare + suffix, bare + "a", bare):
            if known in KNOWN_ARCHS:
                return f"Use {known}."
    return 'Other values: "native", "all", "none".'


def cuda_archs() -> str:
    """The CUDA architectures to build; empty for a CPU build. Says loudly what was decided."""
    asked = os.environ.get("MXTRAIN_CUDA_ARCHS", "").strip().lower()
    if asked in ("none", "off", "cpu"):
        return ""
    if asked == "all":
        return ALL_ARCHS
    if asked and asked != "native":
        archs = [a for a in re.split(r"[;,\s]+", asked) if a]
        for arch in archs:
            if arch not in KNOWN_ARCHS:
                raise SystemExit(
                    "mxtrain: MXTRAIN_CUDA_ARCHS must list architectures of "
                    f"{', '.join(KNOWN_ARCHS)} (from 9.0 on with the suffix: there are no "
                    f"tensor-core kernels without it), got {arch!r}. {right_spelling(arch)}"
                )
        return ";".join(archs)
    visible = gpu_archs()
    archs = [a for a in visible if a in KNOWN_ARCHS]
    if archs and (asked or shutil.which(os.environ.get("CUDACXX", "nvcc"))):
        return ";".join(archs)
    none = f"no GPU of {', '.join(KNOWN_ARCHS)} is visible, only {', '.join(visible)}"
    none = none if visible else "no GPU is visible"
    if asked:
        raise SystemExit(
            f"mxtrain: MXTRAIN_CUDA_ARCHS=native needs a visible GPU that has kernels, but {none}. "
            'Name the architecture: "90a".'
        )
    why = "nvcc was not found" if archs else none
    print(
        f"mxtrain: CPU-ONLY BUILD, because {why}. For CUDA: MXTRAIN_CUDA_ARCHS=90a pip install .",
        file=sys.stderr,
    )
    return ""


def jobs(archs: str) -> tuple[int, int]:
    """How many compile jobs, and how many of them may be files that include CUTLASS."""
    cores = os.cpu_count() or 1
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (ValueError, OSError):
        free = GIB_PER_JOB * cores
    if not re.search(r"\b10\d[af]", archs):
        large = 0
    else:  # half of the memory for those, so that the other cores have work too
        large = max(1, min(cores, int(free / 2 / GIB_PER_CUTLASS_JOB)))
    small = max(0, int((free - large * GIB_PER_CUTLASS_JOB) / GIB_PER_JOB))
    if os.environ.get("MAX_JOBS"):
        return max(1, int(os.environ["MAX_JOBS"])), max(1, large)
    return max(1, min(cores, large + small)), max(1, large)


class CMakeBuild(build_ext):
    """One CMake project makes both libraries.

    setuptools sees them as the extension mxtrain._host.
    """

    def build_extension(self, ext: Extension) -> None:
        torch = torch_dir()
        archs = cuda_archs()
        host_output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        # Editable: setuptools copies the extension that it knows next to the sources, so the op
        # library goes there at once.
        editable = self.inplace or getattr(self, "editable_mode", False)
        output = ROOT / "mxtrain" if editable else host_output
        # One folder per (Python, torch, architectures): switching between them never mixes objects.
        suffix = archs.replace(";", "_") or "cpu"
        tag = f"{sys.implementation.cache_tag}-torch{torch_version(torch)}-{suffix}"
        build = ROOT / "build" / tag
        build.mkdir(parents=True, exist_ok=True)
        host_output.mkdir(parents=True, exist_ok=True)
        cmake, ninja = shutil.which("cmake"), shutil.which("ninja")
        if not cmake or not ninja:
            raise SystemExit(
                "mxtrain: cmake and ninja must be on the PATH. pip install cmake ninja pybind11"
            )
        launchers = []
        if ccache := shutil.which("ccache"):
            launchers = [f"-DCMAKE_{lang}_COMPILER_LAUNCHER={ccache}" for lang in ("CXX", "CUDA")]
        at_once, with_cutlass = jobs(archs)
        subprocess.run(
            [
                cmake,
                "-S",
                str(ROOT),
                "-B",
                str(build),
                "-GNinja",
                # pip's isolated environments are temporary: a cached path to their ninja goes
                # stale.
                f"-DCMAKE_MAKE_PROGRAM={ninja}",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={self.pybind11_dir()}",
                f"-DMXT_TORCH_DIR={torch}",
                f"-DMXT_TORCH_VERSION={torch_version(torch)}",
                f"-DMXT_VERSION={package_version()}",
                f"-DMXT_CUDA_ARCHS={archs}",
                f"-DMXT_CUTLASS_JOBS={with_cutlass}",
                f"-DMXT_STRICT={'ON' if os.environ.get('MXTRAIN_STRICT') == '1' else 'OFF'}",
                f"-DMXT_OUTPUT_DIR={output}",
                f"-DMXT_HOST_OUTPUT_DIR={host_output}",
                *launchers,
            ],
            check=True,
        )
        make = [cmake, "--build", str(build), "--parallel", str(at_once)]
        subprocess.run(make, check=True)
        if os.environ.get("MXTRAIN_EMULATED") == "1":
            subprocess.run([*make, "--target", "mxtrain_emulated"], check=True)

    @staticmethod
    def pybind11_dir() -> str:
        import pybind11

        return pybind11.get_cmake_dir()


setup(
    version=package_version(),
    ext_modules=[Extension("mxtrain._host", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
