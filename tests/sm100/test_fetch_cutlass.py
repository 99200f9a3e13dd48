"""third_party/fetch_cutlass.py: only the pinned file, and a reason where there is none."""

from __future__ import annotations

import hashlib
import zipfile

import pytest
from sm100_common import ROOT, fetch_module

HEADER = "cutlass/version.h"


@pytest.fixture
def fetch(monkeypatch, tmp_path):
    """The module, with a lock of its own; `make_wheel` is what pip would download."""
    monkeypatch.delenv("MXTRAIN_CUTLASS", raising=False)
    module = fetch_module()
    wheel = tmp_path / "other.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"lib/include/{HEADER}", "#define CUTLASS_MAJOR 4\n")
        archive.writestr("lib/python.py", "")
        archive.writestr("other-1.0.dist-info/licenses/LICENSE.txt", "BSD")
    module.LOCK = tmp_path / "cutlass.lock"
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    module.LOCK.write_text(
        f"name = other\nversion = 1.0\nsha256 = {digest}\ninclude = lib/include\n"
    )
    module.download = lambda pin, folder: wheel
    return module


def test_the_lock_pins_one_file():
    pin = fetch_module().lock()
    assert set(pin) == {"name", "version", "sha256", "include"} and len(pin["sha256"]) == 64
    assert not list(ROOT.glob("third_party/**/*.h*")), "no source of others in the repository"


def test_headers_are_unpacked_once(fetch, tmp_path):
    cache = tmp_path / "cache"
    found = fetch.headers(cache)
    assert (found / HEADER).exists() and not list(cache.glob("**/python.py"))
    assert next(cache.glob("*/LICENSE.txt")).read_text() == "BSD"
    fetch.download = None  # not called again
    assert fetch.headers(cache) == found
    assert len(list(cache.iterdir())) == 1


def test_a_file_of_another_hash_is_refused(fetch, tmp_path):
    fetch.LOCK.write_text(fetch.LOCK.read_text().replace("sha256 = ", "sha256 = 0"))
    with pytest.raises(SystemExit, match=r"other\.whl must have sha256 0"):
        fetch.headers(tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_the_variable_names_a_folder_or_turns_it_off(fetch, tmp_path, monkeypatch):
    (tmp_path / "own/include/cutlass").mkdir(parents=True)
    (tmp_path / "own/include" / HEADER).write_text("")
    for value in (tmp_path / "own", tmp_path / "own/include"):
        monkeypatch.setenv("MXTRAIN_CUTLASS", str(value))
        assert fetch.headers(tmp_path / "cache") == (tmp_path / "own/include")
    for value, reason in (("off", "MXTRAIN_CUTLASS=off"), (tmp_path, "must name a folder with")):
        monkeypatch.setenv("MXTRAIN_CUTLASS", str(value))
        with pytest.raises(SystemExit, match=reason):
            fetch.headers(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_no_network_is_a_reason_and_not_a_traceback(tmp_path, monkeypatch):
    monkeypatch.delenv("MXTRAIN_CUTLASS", raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(SystemExit, match="pip could not fetch nvidia-cutlass"):
        fetch_module().headers(tmp_path / "cache")
