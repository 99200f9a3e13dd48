"""`python -m mxtrain.env --selftest`: what it runs, what it writes, and that it can fail."""

from __future__ import annotations

import json
import sys

import pytest
import torch

import mxtrain
from mxtrain import env, selftest


@pytest.fixture
def quick(monkeypatch):
    """Two formats and three shapes, in this process; the CPU only."""
    few = {name: mxtrain.FORMATS[name] for name in ("mxfp4", "nvfp4")}
    monkeypatch.setattr(selftest, "FORMATS", few)
    monkeypatch.setattr(selftest, "shapes", lambda: [(5, 7, 33), (64, 32, 64), (9, 8, 100)])
    monkeypatch.setattr(env, "gpus", lambda: [])


def test_there_are_40_shapes_of_every_kind():
    found = selftest.shapes()
    assert len(found) == len(set(found)) == 40
    assert sum(m % 128 == n % 128 == k % 128 == 0 for m, n, k in found) >= 4
    assert sum(k % 32 != 0 for _, _, k in found) >= 10
    assert sum(n % 8 != 0 for _, n, _ in found) >= 10


def test_parts_pass_on_the_cpu(quick):
    results = selftest.run_part("quantize:cpu") + selftest.run_part("gemm:cpu:cpu")
    # 3 rules, 3 roundings and 3 ways for each format, quantize_dual; 3 shapes, NaN.
    assert len(results) == 2 * (27 + 1) + 2 * (3 + 1)
    assert {r["status"] for r in results} == {"passed"}, [
        r for r in results if r["status"] != "passed"
    ]
    assert all(r["of_bound"] <= 1 for r in results if "of_bound" in r)


def test_a_wrong_byte_and_a_wrong_product_are_found(quick, monkeypatch):
    real = selftest.quantize

    def one_bit(*args, **options):
        got = real(*args, **options)
        got.data[0, 0] ^= 1
        return got

    monkeypatch.setattr(selftest, "quantize", one_bit)
    wrong = selftest.run_part("quantize:cpu")
    assert all(r["status"] == "failed" and r["differing"] == 1 for r in wrong if "{" in r["name"])
    monkeypatch.setattr(selftest, "quantize", real)
    product = selftest.gemm
    monkeypatch.setattr(selftest, "gemm", lambda *a, **k: product(*a, **k) * 1.01)
    results = selftest.run_part("gemm:cpu:cpu")
    assert any(r["status"] == "failed" for r in results if "of_bound" in r)


def test_a_part_that_crashes_or_hangs_ends_alone(monkeypatch):
    crashed = selftest._in_a_process("gemm:nowhere:cpu")
    assert crashed["status"] == "failed" and "exit status 1" in crashed["detail"]
    assert "nowhere" in crashed["detail"] and crashed["results"] == []
    monkeypatch.setattr(selftest, "PART_SECONDS", 0.05)
    hung = selftest._in_a_process("quantize:cpu")
    assert hung["status"] == "failed" and "not finished after 0.05 s" in hung["detail"]


def write_report(folder, capsys, monkeypatch, part) -> tuple[int, dict, str]:
    monkeypatch.setattr(selftest, "_in_a_process", part)
    status = env.main(["--selftest", str(folder / "deep/out.json"), "--no-bench"])
    return status, json.loads((folder / "deep/out.json").read_text()), capsys.readouterr().out


def test_the_json_and_the_exit_status(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(env, "gpus", lambda: [])

    def part(name, status="passed"):
        results = [{"name": "x", "status": status, "of_bound": 0.5}]
        detail = selftest._summary(results)
        return dict(part=name, status=status, detail=detail, seconds=0.1, results=results)

    status, data, text = write_report(tmp_path, capsys, monkeypatch, part)
    assert status == 0 and "passed; all figures are in" in text and "not run: all of CUDA" in text
    assert data["schema"] == 1 and data["report"]["build"] == mxtrain.env.report()["build"]
    assert [p["part"] for p in data["parts"]] == ["quantize:cpu", "gemm:cpu:cpu"]
    status, _, text = write_report(tmp_path, capsys, monkeypatch, lambda name: part(name, "failed"))
    assert status == 1 and "FAILED: quantize:cpu, gemm:cpu:cpu" in text


def test_a_file_that_cannot_be_written_is_said_before_minutes_pass(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert env.main(["--selftest", str(tmp_path / "file/out.json")]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_without_a_gpu_or_a_checkout_the_bench_is_not_run(monkeypatch):
    assert selftest._bench(cuda=False)["status"] == "not run"
    monkeypatch.setattr(selftest, "__file__", "/nowhere/mxtrain/selftest.py")
    part = selftest._bench(cuda=True)
    assert part["status"] == "not run" and "run it in a checkout" in part["detail"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.ops("quantize", "gemm")
def test_the_parts_of_this_gpu_pass(device):
    if device == "cpu":
        pytest.skip("above")
    for name in ("quantize:cuda", "gemm:cuda:dequant"):
        part = selftest._in_a_process(name)
        assert part["status"] == "passed", part["detail"]
    refused = selftest._in_a_process("gemm:cuda:fold")
    assert refused["status"] in ("passed", "not run"), refused["detail"]


def test_it_runs_as_a_command(tmp_path):
    """The quantize part in a process of its own, from any folder."""
    assert sys.executable
    part = selftest._in_a_process("quantize:cpu")
    assert part["status"] == "passed", part
    assert "of" in part["detail"] and part["seconds"] > 0
