"""Where the pinned CUTLASS headers and the objects built with them are, if they are."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]


def fetch_module() -> ModuleType:
    """third_party/fetch_cutlass.py, which is a script."""
    spec = importlib.util.spec_from_file_location("fetch", ROOT / "third_party/fetch_cutlass.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cutlass_headers() -> Path | None:
    """The headers that a build fetched, or that MXTRAIN_CUTLASS names; nothing is fetched here."""
    fetch = fetch_module()
    fetch.download = lambda *_: (_ for _ in ()).throw(SystemExit("not fetched"))
    try:
        return fetch.headers(ROOT / "build/third_party")
    except SystemExit:
        return None


def objects() -> dict[str, Path]:
    """The newest object of each CUTLASS source, in any build folder: "gemm_mxfp4_pair" -> path."""
    found = sorted(
        ROOT.glob("build/*/CMakeFiles/mxt_cuda_sm100.dir/csrc/cuda/sm100/*.cu.o"),
        key=lambda path: path.stat().st_mtime,
    )
    return {path.name.removesuffix(".cu.o"): path for path in found}
