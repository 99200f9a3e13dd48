"""setup.py's choice of architectures, without building."""

from __future__ import annotations

import importlib.util
import re
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
        ("hopper", 'got \'hopper\'. Other values: "native", "all", "none".'),
        ("80;120", "no tensor-core kernels without it), got '120'. Use 120a."),
        ("90", "got '90'. Use 90a."),
        ("12.0", "got '12.0'. Use 120a."),
        ("sm_120", "got 'sm_120'. Use 120a."),
        ("SM_121A", "got 'sm_121a'. Use 121a."),
        ("10.3f", "got '10.3f'. Use 103f."),
        ("compute_90", "got 'compute_90'. Use 90a."),
        ("80a", "got '80a'. Use 80."),
        ("86f", "got '86f'. Use 86."),
        ("8.9", "got '8.9'. Use 89."),
        ("90f", "got '90f'. Use 90a."),
        ("999a", "must list architectures of 80, 86, 87, 88, 89, 90a, 100a, 100f, "),
        ("60", "got '60'. Other values"),
        ("native", "native needs a visible GPU that has kernels, but no GPU is visible. Name"),
    ],
)
def test_others_are_refused(build, monkeypatch, asked, message):
    monkeypatch.setenv("MXTRAIN_CUDA_ARCHS", asked)
    with pytest.raises(SystemExit, match=re.escape(message)):
        build.cuda_archs()


def test_every_architecture_of_the_list_is_taken(build, monkeypatch):
    monkeypatch.setenv("MXTRAIN_CUDA_ARCHS", " ".join(build.KNOWN_ARCHS))
    assert build.cuda_archs() == ";".join(build.KNOWN_ARCHS)
    assert set(build.ALL_ARCHS.split(";")) < set(build.KNOWN_ARCHS)


def test_a_gpu_without_kernels_is_not_built_for(build, monkeypatch, capsys):
    monkeypatch.setattr(build.shutil, "which", lambda _: "/bin/nvcc")
    monkeypatch.setattr(build, "gpu_archs", lambda: ["75", "90a"])
    monkeypatch.setenv("MXTRAIN_CUDA_ARCHS", "native")
    assert build.cuda_archs() == "90a"
    monkeypatch.setattr(build, "gpu_archs", lambda: ["75"])
    with pytest.raises(SystemExit, match=r"is visible, only 75\. Name the architecture"):
        build.cuda_archs()
    monkeypatch.delenv("MXTRAIN_CUDA_ARCHS")
    assert build.cuda_archs() == ""
    assert "CPU-ONLY BUILD, because no GPU of 80, " in capsys.readouterr().err


def test_a_visible_gpu_is_built_for_with_its_suffix(build, monkeypatch):
    monkeypatch.delenv("MXTRAIN_CUDA_ARCHS", raising=False)
    monkeypatch.setattr(build.shutil, "which", lambda _: "/bin/nvcc")
    monkeypatch.setattr(build, "gpu_archs", lambda: ["80", "90a"])
    assert build.cuda_archs() == "80;90a"
