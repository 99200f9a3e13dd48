"""The text that train_gpt.py learns: Python source that is on this machine, split in two.

`library` is the standard library's top-level modules, every tenth held out for validation.
`packages` is every Python file of the installed packages, in the order of a hash of its path and
each content once (packages carry copies of each other), so that a limit takes a sample of them;
one file in twenty is held out, by the same hash. Files above a megabyte are tables, not source.
"""

from __future__ import annotations

import glob
import hashlib
import os
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from checkpoint import BadInput

Texts = tuple[bytearray, bytearray]  # training, validation
LONGEST = 1_000_000  # bytes of a file
READERS = 32


def read_text(name: str, limit: int, cache: str = "") -> Texts:
    """At most `limit` bytes of "library" or "packages". What was read is kept in the file cache."""
    if name not in ("library", "packages"):
        raise BadInput(f"--text must be library or packages, got {name}. See --help.")
    if cache and os.path.exists(cache):
        return _read_cache(cache)
    texts = _standard_library(limit) if name == "library" else _packages(limit)
    if cache:
        _write_cache(cache, texts)
    return texts


def _standard_library(limit: int) -> Texts:
    texts = bytearray(), bytearray()
    files = sorted(glob.glob(os.path.join(os.path.dirname(os.__file__), "*.py")))
    for i, path in enumerate(files):
        with open(path, "rb") as file:
            texts[i % 10 == 9].extend(file.read(limit - sum(map(len, texts))))
    return texts


def package_folders() -> list[str]:
    """Where packages are installed, for the Python that runs."""
    paths = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path]
    names = ("site-packages", "dist-packages")
    folders = dict.fromkeys(os.path.realpath(p) for p in paths if os.path.basename(p) in names)
    return [folder for folder in folders if os.path.isdir(folder)]


def _packages(limit: int, folders: list[str] | None = None) -> Texts:
    files = []
    for folder in package_folders() if folders is None else folders:
        for path in _python_files(folder):
            name = os.path.relpath(path, folder)
            files.append((hashlib.sha256(name.encode("utf-8", "replace")).digest(), path))
    texts, seen, left = (bytearray(), bytearray()), set(), limit
    with ThreadPoolExecutor(READERS) as pool:
        # In pieces, so that a limit is reached soon after as much was read.
        files.sort()
        for start in range(0, len(files), 1024):
            piece = files[start : start + 1024]
            contents = pool.map(_read, (path for _, path in piece))
            for (digest, _), content in zip(piece, contents, strict=True):
                mark = hashlib.sha256(content).digest()
                if content and left > 0 and mark not in seen:
                    seen.add(mark)
                    texts[int.from_bytes(digest[:8], "big") % 20 == 19].extend(content[:left])
                    left -= len(content)
            if left <= 0:
                break
    return texts


def _python_files(folder: str) -> Iterator[str]:
    for root, _, names in os.walk(folder):
        yield from (os.path.join(root, name) for name in names if name.endswith(".py"))


def _read(path: str) -> bytes:
    try:
        if not 0 < os.stat(path).st_size <= LONGEST:
            return b""
        with open(path, "rb") as file:
            return file.read()
    except OSError:  # a broken link, or no permission
        return b""


def _write_cache(path: str, texts: Texts) -> None:
    """Eight bytes, the length of the training text, then both. Whole or not at all."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    temporary = f"{path}.{os.getpid()}.tmp"
    with open(temporary, "wb") as file:
        file.write(len(texts[0]).to_bytes(8, "little"))
        file.writelines(texts)
    os.replace(temporary, path)


def _read_cache(path: str) -> Texts:
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        training, held_out = bytearray(file.read(length)), bytearray(file.read())
    if len(training) != length or not held_out:
        raise BadInput(f"--cache must name a file that this program wrote whole, got {path}.")
    return training, held_out
