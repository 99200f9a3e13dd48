"""setup.py's choice of architectures, without building."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import setuptools


@pytest.fixture
def build(monkeypatch):
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    path = Path(__file__).parent.parent / "setup.py"
    spec = importlib.util.spec_from_file_location("mxtrain_setup", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "gpu_archs", lambda: [])
    return module


@pytest.mark.parametrize(
    ("asked", "archs"),
    [
        ("90a", "90a"),
        ("80; 90a,120a", "80;90a;120a"),
        ("120f", "120f"),
        ("none", ""),
        ("86", "86"),
        ("all", "80;89;90a;100a;103a;120a;121a"),
    ],
)
def test_architectures_are_taken_as_they_are_named(build, monkeypatch, asked, archs):
    monkeypatch.setenv("MXTRAIN_CUDA_ARCHS", asked)
    assert build.cuda_archs() == archs


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("hopper", "must list architectures such as 90a or 80;90a, got 'hopper'"),
        ("80;120", "suffix, without which there are no tensor-core kernels, got '120'. Use 120a"),
        ("90", "got '90'. Use 90a"),
        ("native", "native needs a visible GPU"),
    ],
)
def test_others_are_refused(build, monkeypatch, asked, message):
    monkeypatch.setenv("MXTRAIN_CUDA_ARCHS", asked)
    with pytest.raises(SystemExit, match=message.replace(".", r"\.")):
        build.cuda_archs()


def test_a_visible_gpu_is_built_for_with_its_suffix(build, monkeypatch):
    monkeypatch.delenv("MXTRAIN_CUDA_ARCHS", raising=False)
    monkeypatch.setattr(build.shutil, "which", lambda _: "/bin/nvcc")
    monkeypatch.setattr(build, "gpu_archs", lambda: ["80", "90a"])
    assert build.cuda_archs() == "80;90a"
