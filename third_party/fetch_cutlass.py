"""Prints the folder of the CUTLASS headers that third_party/cutlass.lock pins, fetching them first.

CMake runs it: fetch_cutlass.py CACHE. Exit status 1, with the reason on stderr, where there are
none: MXTRAIN_CUTLASS=off, no network, or a file that is not the pinned one.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

LOCK = Path(__file__).with_name("cutlass.lock")
HEADER = "cutlass/version.h"  # in the folder that is printed


def lock() -> dict[str, str]:
    """The pins: name, version, sha256 of the wheel, include (the headers' folder in it)."""
    lines = (line.partition("=") for line in LOCK.read_text().splitlines() if line.strip())
    return {key.strip(): value.strip() for key, _, value in lines}


def download(pin: dict[str, str], folder: Path) -> Path:
    """The pinned wheel, by pip, which refuses a file of another hash."""
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{pin['name']}=={pin['version']} --hash=sha256:{pin['sha256']}\n")
    # -I: pip's isolated build environments hide pip itself, by PYTHONPATH.
    pip = [sys.executable, "-I", "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    how = ["--no-deps", "--only-binary=:all:", "--require-hashes", "--retries=1", "--timeout=15"]
    where = ["--dest", str(folder), "--requirement", str(wanted)]
    done = subprocess.run([*pip, *how, *where], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip() or done.stdout.strip()).splitlines() or ["no output"]
        raise SystemExit(f"pip could not fetch {pin['name']}=={pin['version']}: {reason[-1]}")
    return wheels[0]


def unpack(wheel: Path, pin: dict[str, str], target: Path) -> None:
    """The headers and the licence of the wheel, whose hash is checked once more, as target."""
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != pin["sha256"]:
        raise SystemExit(f"{wheel.name} must have sha256 {pin['sha256']}, got {found}")
    work = Path(tempfile.mkdtemp(dir=target.parent))
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(work, [n for n in names if n.startswith(pin["include"] + "/")])
        for name in names:
            if name.endswith("LICENSE.txt") and ".dist-info/" in name:
                (work / "LICENSE.txt").write_bytes(archive.read(name))
    try:
        work.rename(target)  # at once, so that two builds never see half of it
    except OSError:
        if not (target / pin["include"] / HEADER).exists():
            raise
        shutil.rmtree(work)  # another build was faster


def headers(cache: Path) -> Path:
    """The include folder: what MXTRAIN_CUTLASS names, or the pinned headers under cache."""
    asked = os.environ.get("MXTRAIN_CUTLASS", "").strip()
    if asked.lower() in ("off", "none", "0"):
        raise SystemExit(f"MXTRAIN_CUTLASS={asked}")
    if asked:
        for folder in (Path(asked).resolve() / "include", Path(asked).resolve()):
            if (folder / HEADER).exists():
                return folder
        raise SystemExit(f"MXTRAIN_CUTLASS must name a folder with include/{HEADER}, got {asked}")
    pin = lock()
    target = cache.resolve() / f"{pin['name']}-{pin['version']}-{pin['sha256'][:12]}"
    if not (target / pin["include"] / HEADER).exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            unpack(download(pin, Path(folder)), pin, target)
    return target / pin["include"]


if __name__ == "__main__":
    print(headers(Path(sys.argv[1])))
