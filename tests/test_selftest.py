"""`python -m mxtrain.env --selftest`: what it runs, what it writes, and that it can fail."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from common import prefer_pair

import mxtrain
from mxtrain import env, selftest, selftest_parts

# mxtrain.env then asks the library what the GPUs take.
needs_cuda_build = pytest.mark.skipif(
    not env.CATALOGUE["build"]["cuda_archs"], reason="a build with CUDA chooses"
)


@pytest.fixture
def quick(monkeypatch):
    """Two formats and three shapes, in this process; the CPU only."""
    few = {name: mxtrain.FORMATS[name] for name in ("mxfp4", "nvfp4")}
    monkeypatch.setattr(selftest_parts, "FORMATS", few)
    monkeypatch.setattr(selftest_parts, "shapes", lambda: [(5, 7, 33), (64, 32, 64), (9, 8, 100)])
    monkeypatch.setattr(env, "gpus", lambda: [])


def test_there_are_40_shapes_of_every_kind():
    found = selftest_parts.shapes()
    assert len(found) == len(set(found)) == 40
    assert sum(m % 128 == n % 128 == k % 128 == 0 for m, n, k in found) >= 4
    assert sum(k % 32 != 0 for _, _, k in found) >= 10
    assert sum(n % 8 != 0 for _, n, _ in found) >= 10


@pytest.mark.parametrize("multiprocessors", [148, 152, 160])
def test_both_tiles_of_sm100_occur(multiprocessors):
    """bfloat16 out, ragged or not, large or not: see sm100_tile of csrc/dispatch.cpp."""
    wide = [p for p in selftest_parts.products("mxfp4") if p.out_dtype == torch.bfloat16]
    pair = [p for p in wide if prefer_pair(p.m, p.n, multiprocessors)]
    assert not any(p.add for p in pair)
    assert sum(p.m % 256 != 0 and p.n % 8 != 0 for p in pair) >= 2
    assert sum(p.m % 256 == p.n % 256 == 0 for p in pair) >= 1
    assert {p.bias for p in pair} == {p.in_tiles for p in pair} == {True, False}
    assert len(wide) - len(pair) >= 10
    assert any(p.m * p.n > 4e6 for p in wide if p not in pair)


def test_exact_runs_on_a_few_shapes():
    for name in ("mxfp4", "nvfp4"):
        exact = [p for p in selftest_parts.products(name) if p.accumulate == "exact"]
        assert len(exact) == 5 and {p.out_dtype for p in exact} == {torch.float32}
        assert {p.add for p in exact} == {True, False} and max(p.k for p in exact) == 4000
        assert sum(p.k % 64 != 0 for p in exact) >= 3


def test_parts_pass_on_the_cpu(quick):
    results = selftest_parts.run_part("quantize:cpu") + selftest_parts.run_part("gemm:cpu:cpu")
    # 3 rules, 3 roundings and 3 ways for each format, dequantize, quantize_dual; 3 shapes, one of
    # them exact too, NaN.
    assert len(results) == 2 * (27 + 2) + 2 * (3 + 1 + 1)
    assert sum(r["name"].endswith(" exact") for r in results) == 2
    assert {r["status"] for r in results} == {"passed"}, [
        r for r in results if r["status"] != "passed"
    ]
    assert all(r["of_bound"] <= 1 for r in results if "of_bound" in r)


def test_a_wrong_byte_and_a_wrong_product_are_found(quick, monkeypatch):
    real = selftest_parts.quantize

    def one_bit(*args, **options):
        got = real(*args, **options)
        got.data[0, 0] ^= 1
        return got

    monkeypatch.setattr(selftest_parts, "quantize", one_bit)
    wrong = selftest_parts.run_part("quantize:cpu")
    assert all(r["status"] == "failed" and r["differing"] == 1 for r in wrong if "{" in r["name"])
    monkeypatch.setattr(selftest_parts, "quantize", real)
    product = selftest_parts.gemm
    monkeypatch.setattr(selftest_parts, "gemm", lambda *a, **k: product(*a, **k) * 1.01)
    results = selftest_parts.run_part("gemm:cpu:cpu")
    assert any(r["status"] == "failed" for r in results if "of_bound" in r)


def test_the_probe_is_compared_with_the_emulation(monkeypatch):
    host = pytest.importorskip("mxtrain._host", reason="this library was built for another Python")

    def emulated(format, selectors, registers, swap=False):
        words = [t.numpy().view("uint32") for t in registers[:4]] + [registers[4].numpy()]
        if swap and selectors[3] == 2:  # another lane's scales
            selectors = (*selectors[:3], 3)
        every = zip(*words, strict=True)
        return torch.from_numpy(
            np.stack([host.mma_block_scale(format, selectors, *one) for one in every])
        )

    for name, sets in (("mxfp4", 8), ("nvfp4", 4), ("mxfp8_e4m3", 16), ("mxfp8_e5m2", 16)):
        monkeypatch.setattr(selftest_parts, "mma_probe", emulated)
        right = selftest_parts.run_part(f"probe:{name}")
        assert len(right) == sets and {r["status"] for r in right} == {"passed"}
        monkeypatch.setattr(selftest_parts, "mma_probe", lambda *a: emulated(*a, swap=True))
        wrong = [r for r in selftest_parts.run_part(f"probe:{name}") if r["status"] == "failed"]
        assert len(wrong) == sets // 4 and all(r["differing"] > 1000 for r in wrong)
        assert all(r["absolute"] == r["relative"] == 0 for r in right)
        assert all(r["absolute"] > 0.01 and r["relative"] > 0.01 for r in wrong)
    monkeypatch.setattr(selftest_parts, "mma_probe", lambda *a: None)
    assert [r["status"] for r in selftest_parts.run_part("probe:mxfp4")] == ["not run"]


@pytest.mark.skipif(
    not hasattr(torch.nn.functional, "scaled_mm"), reason="this torch has no scaled_mm"
)
def test_torchs_own_product_is_reported_and_ours_is_judged(monkeypatch):
    """scaled_mm's stand-in decodes the operands that it is handed, and is wrong by a factor."""
    factor = 1.0

    def scaled_mm(a, b, *rest, output_dtype):
        product = real(*(selftest_parts._operand(r, 1024, name, i, "cpu") for r, i in sizes))
        assert a.shape[0] == product.shape[0] and b.shape[1] == product.shape[1]
        return (product.float() * factor).to(output_dtype)

    real, sizes = selftest_parts.gemm, ((512, 1), (384, 2))
    monkeypatch.setattr(torch.nn.functional, "scaled_mm", scaled_mm)
    for name in ("mxfp4", "mxfp8_e4m3", "mxfp8_e5m2", "nvfp4"):
        factor = 1.0
        (good,) = list(selftest_parts.scaled_mm_part(name, "cpu"))[1:]
        assert good["status"] == "passed" and good["same_bytes"] == 1 and "note" not in good
        for wrong in (1.1, float("nan")):
            factor = wrong
            (theirs,) = list(selftest_parts.scaled_mm_part(name, "cpu"))[1:]
            assert theirs["status"] == "passed" and theirs["theirs"] > 1 >= theirs["ours"]
            assert "torch's own product is out of the bound" in selftest._summary([theirs])
        factor = 1.0
        monkeypatch.setattr(selftest_parts, "gemm", lambda *a: real(*a) * 1.1)
        (ours,) = list(selftest_parts.scaled_mm_part(name, "cpu"))[1:]
        assert ours["status"] == "failed" and ours["ours"] > 1 >= ours["theirs"]
        monkeypatch.setattr(selftest_parts, "gemm", real)

    def refuses(*args, **options):
        raise NotImplementedError("not on this device")

    monkeypatch.setattr(torch.nn.functional, "scaled_mm", refuses)
    (none,) = list(selftest_parts.scaled_mm_part("mxfp4", "cpu"))[1:]
    assert none["status"] == "not run" and "not on this device" in none["detail"]


def test_the_device_own_dequantize_is_checked_and_not_relied_on(quick, monkeypatch):
    real = mxtrain.Operand.dequantize
    monkeypatch.setattr(mxtrain.Operand, "dequantize", lambda *a: real(*a) * 1.5)
    wrong = [r for r in selftest_parts.run_part("quantize:cpu") if r["status"] == "failed"]
    assert [r["name"] for r in wrong] == ["mxfp4 dequantize", "nvfp4 dequantize"]
    assert {r["status"] for r in selftest_parts.run_part("gemm:cpu:cpu")} == {"passed"}


def test_a_build_without_the_gpus_own_gemm_is_a_failure(quick, monkeypatch):
    monkeypatch.setattr(selftest_parts, "set_gemm_backend", lambda name: None)
    real = selftest_parts._operand
    monkeypatch.setattr(selftest_parts, "_operand", lambda *a: real(*a[:4], "cpu"))
    monkeypatch.setattr(selftest_parts, "_one_product", lambda *a: {"name": "", "status": "passed"})
    monkeypatch.setattr(selftest_parts, "_nan_stays", lambda *a: {"name": "", "status": "passed"})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (12, 0))
    lacks = "dequant: decode to BF16, cuBLAS; sm120 needs a build with 120a"
    for chosen, status in ((lacks, "failed"), ("sm120: block-scaled tensor cores", "passed")):
        monkeypatch.setattr(selftest_parts, "gemm_backend", lambda *a, chosen=chosen: chosen)
        results = selftest_parts.run_part("gemm:cuda:auto")
        found = [r for r in results if "auto takes" in r["name"]]
        assert [r["status"] for r in found] == [status] * 2 and chosen in found[0]["name"]


def test_a_part_that_crashes_or_hangs_ends_alone(monkeypatch):
    crashed = selftest._in_a_process("gemm:nowhere:cpu")
    first = selftest_parts.products("mxfp4")[0].name
    assert crashed["status"] == "failed" and "nowhere" in crashed["detail"]
    assert crashed["detail"].startswith(f"exit status 1 in {first}: ")
    assert [(r["name"], r["status"]) for r in crashed["results"]] == [(first, "failed")]
    monkeypatch.setattr(selftest, "PART_SECONDS", 0.05)
    hung = selftest._in_a_process("quantize:cpu")
    assert hung["status"] == "failed" and "not finished after 0.05 s" in hung["detail"]


def test_what_a_part_got_to_before_it_hung_or_died_is_kept(monkeypatch):
    done = [{"name": "a", "status": "passed", "of_bound": 0.5}]
    lines = '"a"\n' + json.dumps(done[0]) + '\n"b"\n'
    wrote, ends = lines, subprocess.TimeoutExpired("", 600, stderr=b"last words")

    def run(command, **options):
        Path(command[-1]).write_text(wrote)
        if isinstance(ends, Exception):
            raise ends
        return ends

    monkeypatch.setattr(selftest.subprocess, "run", run)
    part = selftest._in_a_process("gemm:cuda:auto")
    assert part["status"] == "failed" and part["results"][:1] == done
    assert part["detail"] == "not finished after 600 s in b: last words"
    unfinished = {"name": "b", "status": "failed", "detail": "unfinished: not finished after 600 s"}
    assert part["results"][1:] == [unfinished]
    ends = subprocess.CompletedProcess("", -11, b"", b"")
    for text, after, count in ((lines, "-11 in b: ", 2), (lines[:-4] + '{"na', "-11: ", 1)):
        wrote = text
        part = selftest._in_a_process("gemm:cuda:auto")
        assert part["detail"] == f"exit status {after}" and len(part["results"]) == count
        assert part["status"] == "failed"
    ends, wrote = subprocess.CompletedProcess("", 0, b"", b""), ""
    assert selftest._in_a_process("gemm:cuda:auto")["status"] == "failed"  # nothing ran


def test_each_result_is_in_the_file_before_the_next_check_starts(tmp_path, monkeypatch):
    out, result = tmp_path / "out", {"name": "a", "status": "passed"}
    seen = []

    def steps(name):
        for step in ("a", result, "b"):
            yield step
            seen.append(selftest.read_part(out))

    monkeypatch.setattr(selftest, "steps", steps)
    selftest.write_part("any", out)
    assert seen == [([], "a"), ([result], ""), ([result], "b")]


def test_the_names_before_and_after_a_check_are_the_same(quick):
    for part in ("quantize:cpu", "gemm:cpu:cpu"):
        steps = list(selftest_parts.steps(part))
        assert steps[0::2] == [result["name"] for result in steps[1::2]]


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


def passes(name: str) -> dict:
    results = [{"name": "x", "status": "passed"}]
    return dict(part=name, status="passed", detail="1 of 1", seconds=0.1, results=results)


def fake_gpus(monkeypatch, archs: str, *capabilities: str) -> None:
    """GPUs of these compute capabilities, and a build for archs."""
    found = [
        dict(name=f"GPU{i}", compute_capability=c, memory_gib=1.0, sms=148)
        for i, c in enumerate(capabilities)
    ]
    build = {**env.CATALOGUE["build"], "cuda_archs": archs}
    monkeypatch.setattr(env, "CATALOGUE", {**env.CATALOGUE, "build": build})
    monkeypatch.setattr(env, "gpus", lambda: found)


@needs_cuda_build
@pytest.mark.parametrize("capability, arch", [("12.0", "120a"), ("10.3", "103a"), ("8.6", "86")])
@pytest.mark.parametrize("archs", ["90a", ""])
def test_a_gpu_that_the_build_has_no_code_for_is_a_failure(
    tmp_path, capsys, monkeypatch, capability, arch, archs
):
    fake_gpus(monkeypatch, archs, capability)
    status, data, text = write_report(tmp_path, capsys, monkeypatch, passes)
    assert status == 1 and "FAILED: build; all figures" in text
    assert [p["part"] for p in data["parts"]] == ["build", "quantize:cpu", "gemm:cpu:cpu"]
    advice = f"MXTRAIN_CUDA_ARCHS={arch} pip install -e ."
    assert data["parts"][0]["status"] == "failed" and advice in data["parts"][0]["detail"]
    assert f"GPU0 is {capability}, this build has code for {archs or 'no GPU'}: {advice}" in text


@needs_cuda_build
def test_a_gpu_older_than_any_build_is_told_so(monkeypatch):
    fake_gpus(monkeypatch, "90a", "7.5")
    assert env.unserved() == ["GPU0 is 7.5, this build has code for 90a: 8.0 or newer is needed"]
    text = env.backends("gemm")["cuda"]
    assert text == "none: built for 90a, the GPU is 7.5 (8.0 or newer is needed)"


@needs_cuda_build
def test_the_build_is_judged_for_every_visible_gpu(tmp_path, capsys, monkeypatch):
    fake_gpus(monkeypatch, "90a", "9.0")
    status, data, _ = write_report(tmp_path, capsys, monkeypatch, passes)
    assert status == 0 and data["parts"][0]["status"] == "passed"
    assert "gemm:cuda:auto" in [p["part"] for p in data["parts"]]
    fake_gpus(monkeypatch, "90a", "9.0", "12.0")
    status, data, _ = write_report(tmp_path, capsys, monkeypatch, passes)
    assert status == 1 and data["parts"][0]["detail"].startswith("GPU1 is 12.0")


@needs_cuda_build
def test_the_short_one_leaves_a_gpu_without_code_alone(capsys, monkeypatch):
    fake_gpus(monkeypatch, "90a", "12.0")
    assert env.main([]) == 0
    text = capsys.readouterr().out
    assert "none: built for 90a, the GPU is 12.0 (MXTRAIN_CUDA_ARCHS=120a" in text
    assert "PASS  cpu gemm mxfp4" in text and "cuda quantize" not in text


@needs_cuda_build
def test_what_is_not_built_says_what_it_needs(monkeypatch):
    fake_gpus(monkeypatch, "100a")
    lacks = "dequant: decode to BF16, cuBLAS; sm100 needs a build with "
    needs = {10: "CUTLASS: third_party/README.md", 12: "120a, the suffix included: ..."}
    monkeypatch.setattr(env, "gemm_backend", lambda major, minor, f: lacks + needs.get(major, ""))
    lines = {line.split()[0]: line for line in env.gemm_by_architecture()}
    for capability in ("10.0", "10.3"):
        assert lines[capability].endswith("not built (needs CUTLASS: third_party/README.md)")
    assert lines["12.0"].endswith("not built (MXTRAIN_CUDA_ARCHS=120a)")
    monkeypatch.setattr(env, "gemm_backend", lambda *a: "sm100: block-scaled tensor cores")
    lines = {line.split()[0]: line for line in env.gemm_by_architecture()}
    assert (
        lines["10.0"].endswith("; built") and "dequantized: mxfp6_e3m2, mxfp6_e2m3" in lines["10.0"]
    )
    assert "dequantized: mxfp6_e3m2, mxfp6_e2m3, mxfp8_e4m3" in lines["8.9"]


def test_the_report_has_commit_and_driver_where_they_are_known(tmp_path, capsys, monkeypatch):
    def answer(*command):
        return "v1-2-gabc-dirty" if command[0] == "git" else "580.65.06\n580.65.06"

    (tmp_path / ".git").touch()
    monkeypatch.setattr(env, "_answer", answer)
    monkeypatch.setattr(env, "__file__", str(tmp_path / "mxtrain/env.py"))
    fake_gpus(monkeypatch, env.CATALOGUE["build"]["cuda_archs"], "7.5", "7.5")
    data = env.report()
    assert (data["commit"], data["driver"]) == ("v1-2-gabc-dirty", "580.65.06")
    env._print_report(data)
    text = capsys.readouterr().out
    assert "(v1-2-gabc-dirty)   torch" in text and "GiB, driver 580.65.06" in text
    monkeypatch.setattr(env, "_answer", lambda *command: "")
    monkeypatch.setattr(env, "__version__", "0.1.0+g123")
    assert env.report()["commit"] == "g123" and "driver" not in env.report()
    monkeypatch.setattr(env, "__version__", "0.1.0")
    assert "commit" not in env.report()
    monkeypatch.setattr(env, "_answer", answer)
    (tmp_path / ".git").unlink()
    monkeypatch.setattr(env, "gpus", lambda: [])
    assert not {"commit", "driver"} & set(env.report())


def test_a_command_that_cannot_run_answers_nothing():
    assert env._answer(sys.executable, "-c", "print(5)") == "5"
    assert env._answer(sys.executable, "-c", "print(5); exit(1)") == ""
    assert env._answer("/nowhere/nvidia-smi") == ""


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
    for name in ("gemm:cuda:fold", "probe:mxfp4"):  # not of every GPU
        part = selftest._in_a_process(name)
        assert part["status"] in ("passed", "not run"), part["detail"]


def test_it_runs_as_a_command(tmp_path):
    """The quantize part in a process of its own, from any folder."""
    assert sys.executable
    part = selftest._in_a_process("quantize:cpu")
    assert part["status"] == "passed", part
    assert "of" in part["detail"] and part["seconds"] > 0
