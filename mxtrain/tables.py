"""The documentation's tables, made from the code.

`python -m mxtrain.tables` rewrites them, `--check` only compares.

A table stands between `<!-- table: NAME -->` and `<!-- end -->` in README.md and docs/*.md.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from . import recipe
from .formats import FORMATS


def formats_table() -> str:
    """One row per block format."""
    rows = [
        "| format | element | largest | block | scale | bits an element |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for f in FORMATS.values():
        scale = "E4M3, and a float32 for the tensor" if f.two_level else "E8M0"
        rows.append(
            f"| `{f.name}` | E{f.ebits}M{f.mbits} | {f.max:g} | {f.block} | {scale} | "
            f"{f.bits_per_element:g} |"
        )
    return "\n".join(rows)


TABLES = {"formats": formats_table, "recipes": recipe.table}


def filled(text: str) -> str:
    """The text of a page with every marked table made anew. Raises KeyError for an unknown name."""

    def replace(match: re.Match) -> str:
        return f"<!-- table: {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", replace, text, flags=re.DOTALL)


def main(argv: list[str] | None = None) -> int:
    """Rewrite the pages, or with --check say which are out of date and return 1."""
    parser = argparse.ArgumentParser(prog="python -m mxtrain.tables", description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit 1 if out of date"
    )
    parser.add_argument("--root", type=Path, default=Path(), help="the repository")
    options = parser.parse_args(argv)
    stale = []
    for page in [options.root / "README.md", *sorted((options.root / "docs").glob("*.md"))]:
        text = page.read_text()
        if filled(text) == text:
            continue
        stale.append(str(page))
        if not options.check:
            page.write_text(filled(text))
    if stale:
        print("out of date:" if options.check else "rewritten:", *stale)
    return 1 if stale and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
