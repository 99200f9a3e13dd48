"""The table of a run, its JSON file, and the comparison of two files. Needs no torch."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCHEMA = 1
Row = dict[str, Any]


class BadInput(Exception):
    """A command line or a file that cannot be used; the message says why."""


# ---- files ----


def rounded(value: Any) -> Any:
    """The same with floats to six significant digits, and None for those that JSON cannot hold."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    return value


def document(env: dict[str, Any], outcome: Any) -> dict[str, Any]:
    """What a JSON file holds, of a runner.Outcome."""

    def named(pairs: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
        return [{"name": name, "reason": reason} for name, reason in pairs]

    return rounded(
        {
            "schema": SCHEMA,
            "env": env,
            "peaks": outcome.peaks,
            "results": outcome.rows,
            "skipped": named(outcome.skipped),
            "failed": named(outcome.failed),
        }
    )


def check_writable(path: Path) -> None:
    """Raise BadInput where a file could not be written, before the time is spent on measuring."""
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise BadInput(f"--json {path}: its folder must exist and be writable")


def write(path: Path, data: dict[str, Any]) -> None:
    """Write a document, whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")
    part.replace(path)


def read(path: Path) -> dict[str, Any]:
    """A document that `write` wrote. Raises BadInput for anything else."""
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise BadInput(f"{path}: is not JSON ({error})") from None
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise BadInput(
            f"{path}: is not a measurement of schema {SCHEMA} (python -m bench run --json)"
        )
    try:
        for row in data["results"]:
            if not (isinstance(row["name"], str) and row["us"]["p50"] > 0):
                raise ValueError
    except (KeyError, TypeError, ValueError):
        raise BadInput(f"{path}: its results are damaged") from None
    return data


# ---- tables ----


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells under a heading row: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def _number(digits: int, suffix: str = "") -> Callable[[Any], str]:
    return lambda value: "" if value is None else f"{value:.{digits}f}{suffix}"


def _rate(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _microseconds(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.1f}"


def _error(row: Row) -> str:
    if row.get("error") is None:
        return ""
    return ("0" if row["error"] == 0 else f"{row['error']:.2g}") + (
        " WRONG" if row.get("wrong") else ""
    )


COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("us", lambda r: _microseconds(r["us"]["p50"])),
    ("spread", lambda r: f"{100 * (r['us']['p80'] - r['us']['p20']) / r['us']['p50']:.1f}%"),
    ("eager us", lambda r: _microseconds(r["eager_us"])),
    ("GB/s", lambda r: _rate(r.get("gbps"))),
    ("of copy", lambda r: _number(3)(r.get("of_copy"))),
    ("x floor", lambda r: _number(2)(r.get("over_floor"))),
    ("TFLOP/s", lambda r: _rate(r.get("tflops"))),
    ("vs bf16", lambda r: _number(2, "x")(r.get("vs_bf16"))),
    ("vs peer", lambda r: _number(2, "x")(r.get("vs_peer"))),
    ("tokens/s", lambda r: _number(0)(r.get("tokens_per_second"))),
    ("saved", lambda r: _number(2, "x less")(r.get("saved_vs_bf16"))),
    ("error", _error),
    ("", lambda r: "noisy" if r.get("noisy") else ""),
)


def table(data: dict[str, Any]) -> str:
    """A document for the terminal: peaks, rows with the columns that hold anything, what did not
    run, the headline.
    """
    peaks = {
        "copy_gbps": ("copy", "GB/s"),
        "bf16_tflops": ("BF16 GEMM", "TFLOP/s"),
        "fp8_tflops": ("FP8 GEMM", "TFLOP/s"),
    }
    known = [
        f"{label} {data['peaks'][key]:.4g} {unit}"
        for key, (label, unit) in peaks.items()
        if data["peaks"].get(key)
    ]
    lines = [
        f"{data['env'].get('device', 'unknown device')}   peaks: {', '.join(known) or 'none'}",
        "",
    ]
    columns = [(head, [show(row) for row in data["results"]]) for head, show in COLUMNS]
    columns = [(head, cells) for head, cells in columns if any(cells)]
    body = [["row", *(head for head, _ in columns)]]
    for index, row in enumerate(data["results"]):
        body.append([row["name"], *(cells[index] for _, cells in columns)])
    lines.append(aligned(body))
    for word in ("skipped", "failed"):
        lines += [f"{word}: {item['name']}: {item['reason']}" for item in data.get(word, ())]
    lines += [f"note: {row['name']}: {row['note']}" for row in data["results"] if row.get("note")]
    headlines = [
        f"{row['name']}: {row['vs_peer']:.2f} times the throughput of {row['peer']} in the same run"
        for row in data["results"]
        if row.get("vs_peer")
    ]
    return "\n".join([*lines, *([""] if headlines else []), *headlines])


def describe(row: Row) -> str:
    """One measured row in a few words, for the progress."""
    parts = [f"{row['us']['p50']:.1f} us"]
    parts += [f"{row['gbps']:.4g} GB/s"] if row["gbps"] else []
    parts += [f"{row['tflops']:.4g} TFLOP/s"] if row["tflops"] else []
    parts += [f"{row['vs_peer']:.2f}x its peer"] if row["vs_peer"] else []
    parts += [f"ERROR {row['error']:.2g}"] if row["wrong"] else []
    parts += ["noisy"] if row["noisy"] else []
    return "  ".join(parts)


# ---- comparison ----


@dataclass(frozen=True)
class Change:
    """One row in two files. `slower` is the fraction by which B is slower, negative where it is
    faster.
    """

    name: str
    metric: str
    a: float
    b: float
    slower: float
    notes: tuple[str, ...]
    counts: bool  # whether it can be a regression: peers cannot
    broken: bool  # right in A, wrong in B


def change(a: Row, b: Row) -> Change:
    """Compare two rows of a name by the ratio that both have (measured against a ceiling of the
    same run), else by time.
    """
    for metric in ("of_copy", "vs_bf16"):
        if a.get(metric) and b.get(metric):
            before, after = a[metric], b[metric]
            slower = before / after - 1
            break
    else:
        metric, before, after = "us", a["us"]["p50"], b["us"]["p50"]
        slower = after / before - 1
    notes = [f"noisy in {side}" for side, row in (("A", a), ("B", b)) if row.get("noisy")]
    broken = bool(b.get("wrong")) and not a.get("wrong")
    notes += ["WRONG in B"] if b.get("wrong") else []
    counts = not a["name"].startswith("peer/")
    return Change(a["name"], metric, before, after, slower, tuple(notes), counts, broken and counts)


def compare(
    a: dict[str, Any], b: dict[str, Any], fail_above: float | None = None
) -> tuple[str, list[str]]:
    """The comparison of two documents as text, and the names of the rows that are worse in B.

    Args:
        a, b: documents; a is the baseline.
        fail_above: percent by which a row may be slower; None for any. A row that is right in A and
            wrong in B, or that failed in B, is worse however fast it is.

    Raises:
        BadInput: where they share no row.
    """
    rows_a, rows_b = ({row["name"]: row for row in data["results"]} for data in (a, b))
    failed = {item["name"]: item["reason"] for item in b.get("failed", ())}
    changes = [change(row, rows_b[name]) for name, row in rows_a.items() if name in rows_b]
    crashed = [name for name in rows_a if name in failed]
    if not changes and not crashed:
        raise BadInput("the two files have no row in common")
    limit = math.inf if fail_above is None else fail_above / 100
    worse = [c.name for c in changes if c.broken or (c.counts and c.slower > limit)] + crashed
    body = [["row", "by", "A", "B", "change", ""]]
    for c in changes:
        verdict = ["REGRESSION"] if c.name in worse and fail_above is not None else []
        speed = f"{100 * abs(c.slower):.1f}% {'slower' if c.slower > 0 else 'faster'}"
        digits = (f"{c.a:.3f}", f"{c.b:.3f}") if c.metric != "us" else (f"{c.a:.2f}", f"{c.b:.2f}")
        body.append([c.name, c.metric, *digits, speed, ", ".join([*verdict, *c.notes])])
    devices = [data.get("env", {}).get("device", "unknown device") for data in (a, b)]
    lines = [f"A: {devices[0]}   B: {devices[1]}"]
    if devices[0] != devices[1]:
        lines.append("The devices differ: only ratios (of_copy, vs_bf16) mean anything here.")
    lines += ["", aligned(body)]
    lines += [f"failed in B: {name}: {failed[name]}" for name in crashed]
    lines += [f"only in A: {name}" for name in rows_a if name not in rows_b and name not in failed]
    lines += [f"only in B: {name}" for name in rows_b if name not in rows_a]
    return "\n".join(lines), worse
