"""The study: what a run measures, the queue, resuming and the budget."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path

import examples_study
import pytest
import study
import study_report
import study_rows
import study_run
import text
import torch
from examples_study import SMALL, FakeProcess, record
from harness import Run

import mxtrain

queue, _one_thread = examples_study.queue, examples_study._one_thread
DIGITS = ["digits/bf16@0", "digits/tetrajet_qramping@0"]


def make_run(name: str, seed: int = 0, more: str = "", row=None) -> study_run.StudyRun:
    row = row or study_rows.ROWS[name]
    task, args = study_run.task_of(row, [*row.options.split(), *SMALL.split(), *more.split()], "")
    args.device = "cpu"
    task.load(args)
    return study_run.StudyRun(row, task, args, seed, fresh=True)


# ---- rows ----


def test_plans_are_made_of_rows_with_valid_options():
    for plan, runs in study_rows.PLANS.items():
        assert len(set(runs)) == len(runs) > 0, plan
        for run in runs:
            name, _, seed = run.rpartition("@")
            row = study_rows.ROWS[name]
            assert seed in "012" and row.baseline in study_rows.ROWS
            study_run.task_of(row, row.options.split(), "")
    parameters = 12 * 8 * 512**2
    args = study_run.task_of(study_rows.ROWS["gpt/bf16"], study_rows.GPT.split(), "")[1]
    assert parameters > 20e6 and args.steps * args.batch * args.context > 80e6


def test_every_candidate_is_4_bits_or_half_of_it():
    for name in study_rows.WHOLE:
        recipe = study_rows.ROWS[name].recipe
        quantizers = [q for gemm in ("fprop", "dgrad", "wgrad") for q in recipe.pair(gemm)]
        assert all(q.format in ("mxfp4", "nvfp4") for q in quantizers)
    for name in study_rows.HALVES:
        recipe = study_rows.ROWS[name].recipe
        forward, backward = recipe.fprop_x.format, recipe.dgrad_dy.format
        assert (forward is None) != (backward is None)
        assert all(recipe.misfit(*shape) is None for shape in ((512, 2048), (2048, 512)))


# ---- one run ----


def test_oscillation_is_measured_and_changes_nothing():
    row = study_rows.ROWS["digits/tetrajet_ema"]
    run = make_run(row.name)
    assert sum(1 for _ in run.train()) == 2
    plain = make_run("", row=dataclasses.replace(row, watch=False))
    assert sum(1 for _ in plain.train()) == 2
    assert run.record["rows"][-1][:4] == plain.record["rows"][-1][:4]
    assert plain.record["oscillation"] == {} and set(run.record["oscillation"]) == {"middle", "end"}
    for measured in run.record["oscillation"].values():
        assert measured["steps"] == 2 and 0 <= measured["oscillating"] <= 1
        assert measured["rate_w"] > 0 and measured["ratio"] >= 0


def test_q_ramping_calibrates_on_batches_of_its_own(monkeypatch):
    """The order of the data is that of every other row."""
    monkeypatch.setattr(study_run, "CALIBRATION", 2)
    seen, runs = [], []
    for name in ("digits/tetrajet_qramping", "digits/tetrajet"):
        r, mine = make_run(name), []

        def batch(size, generator, mine=mine, original=r.task.batch):
            out = original(size, generator)
            if generator.initial_seed() == 0:  # the seed of the run
                mine.append(out[0])
            return out

        r.task.batch = batch
        for _ in range(6):
            r.advance()
        seen.append(mine)
        runs.append(r)
    assert [set(r.record["periods"]) for r in runs] == [{0, 3}, set()]
    assert len(seen[0]) == len(seen[1]) == 6 and all(map(torch.equal, *seen))


def test_the_tail_is_bf16_and_timed_anew():
    row = study_rows.Row("digits/x", "tetrajet", ("train_vit", "ImageClasses"), "", tail=0.25)
    run = make_run("", row=row)
    recipes = []
    while run.step < 12:
        recipes.append(run.model.blocks[0].qkv.recipe.name)
        run.advance()
    assert recipes == ["tetrajet"] * 9 + ["bf16"] * 3 and run.warmed == 3


def test_a_run_that_diverges_ends(monkeypatch):
    run = make_run("digits/tetrajet")
    monkeypatch.setattr(run, "gradients", lambda: torch.tensor(float("nan")))
    monkeypatch.setattr(run.optimizer, "step", lambda: None)
    assert list(run.train()) == [] and run.record["diverged"] == 1 and not run.record["rows"]


def test_a_row_is_the_run_of_the_script_but_for_the_optimizer():
    row = study_rows.Row("digits/x", "bf16", ("train_vit", "ImageClasses"), "")
    run = make_run("", row=row)
    task, args = study_run.task_of(row, SMALL.split(), "")
    args.device = "cpu"
    task.load(args)
    other = Run(task, args, "bf16", 0)
    for r in (run, other):
        torch.manual_seed(0)
        while r.step < 12:
            r.advance()
    assert run.record["rows"][-1][2] == pytest.approx(other.record["rows"][-1][2], rel=1e-3)


def test_rates_of_fallback_are_recorded_and_drawn(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the text that it reads is kept in a file there
    compiled = []  # how such layers compile is tested elsewhere, and takes 15 seconds
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block, **how: compiled.append(how))
    text = "--context 32 --text library --megabytes 0.5 --windows 16"
    run = make_run("llama/int8_fallback", more=text)
    for _ in run.train():
        pass
    assert compiled == [{"dynamic": False}]  # of one block
    names = [f"blocks.0.{name}" for name in ("qkv", "proj", "gate_up", "down")]
    assert run.record["fallback_layers"] == names
    rates = torch.tensor(run.record["fallback"])
    assert rates[:, 0].tolist() == list(range(1, 13))  # four times a validation: here every step
    assert rates.shape[1] == 5 and ((rates[:, 1:] >= 0) & (rates[:, 1:] <= 1)).all()
    assert rates[:, 1:].any()
    made = record("llama/int8_fallback@0", 2.0, fallback_layers=names)
    study_report.write_report([{**made, "fallback": run.record["fallback"]}], tmp_path, True)
    assert (tmp_path / "llama-int8_fallback-rates.png").stat().st_size > 10_000
    assert (tmp_path / "llama-main.png").exists()
    assert make_run("llama/int8_block", more=text).falling == {}


def test_every_kind_of_outlier_has_its_own_baseline():
    for name in study_rows.LLAMAS:
        row = study_rows.ROWS[name]
        twin = study_rows.ROWS[row.baseline]
        assert twin.options == row.options and twin.recipe == "bf16"
        assert ("--outliers none" in row.options) == (row.task == "llama")


# ---- the queue ----


def done(queue, worker, loss=1.0):
    queue.handle(worker, "@" + json.dumps(
        {"event": "done", "record": record(worker.job.run, loss)}) + "\n")  # fmt: skip


def test_runs_of_a_row_stay_together_and_rows_spread(queue):
    q = queue(["a@0", "a@1", "b@0", "b@1"])
    first, second = q.workers
    q.assign()
    assert (first.job.run, second.job.run) == ("a@0", "b@0")
    assert first.process.given == [{"run": "a@0", "options": "", "compile": True}]
    done(q, second)
    q.assign()
    assert second.job.run == "b@1"
    done(q, second)
    q.assign()
    assert second.job.run == "a@1"  # nothing else is left
    done(q, first), done(q, second)
    assert not q.jobs and [r["run"] for r in study_report.read_results([q.results_path])] == [
        "b@0", "b@1", "a@0", "a@1"]  # fmt: skip


def test_no_run_begins_that_would_not_end_in_time(queue):
    q = queue(["t/a@0", "t/b@0", "t/b@1"])
    first, second = q.workers
    q.deadline = time.monotonic() + 85
    q.assign()
    assert first.job is None  # 100 seconds are expected
    q.seconds = {"t/b": [60.0, 80.0], "t": [60.0, 100.0, 80.0]}
    q.assign()
    assert (first.job.run, second.job.run) == ("t/b@0", "t/b@1")  # t/a is expected to take 88
    assert q.estimate(study.Job("t/a@0", "", True)) == pytest.approx(88.0)
    assert q.estimate(study.Job("t/b@0", "", True)) == 80.0
    assert q.estimate(study.Job("u/a@0", "", True)) == 100.0


def test_a_failed_run_is_tried_once_more_without_compile(queue):
    q = queue(["a@0", "b@0"])
    first = q.workers[0]
    q.assign()
    failure = '@{"event": "failed", "run": "a@0", "error": "RuntimeError: no"}\n'
    q.handle(first, failure)
    q.assign()
    assert [line["compile"] for line in first.process.given] == [True, False]
    q.handle(first, failure)
    q.assign()
    assert first.job is None and not q.jobs and not q.records


def test_a_lost_worker_is_replaced_and_its_run_made_again(queue, monkeypatch):
    q = queue(["a@0", "b@0"])
    first = q.workers[0]
    q.assign()
    monkeypatch.setattr(q, "start_worker", lambda index: study.Worker(index, FakeProcess()))
    q.handle(first, None)
    assert len(q.workers) == 2 and first not in q.workers and q.jobs[0].run == "a@0"
    q.handle(first, "@nonsense\n")  # what it still says is not read
    q.handle(q.workers[-1], '@{"event": "re')  # cut off
    assert not q.workers[-1].ready


# ---- the command ----


def test_run_resume_report(tmp_path, capsys, monkeypatch):
    here = str(Path(mxtrain.__file__).parents[1])  # the workers import what this process did
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([here, os.environ.get("PYTHONPATH", "")]))
    command = ["run", "--runs", *DIGITS, "--out", str(tmp_path), "--options", SMALL]
    assert study.main(command) == 0
    out = capsys.readouterr().out
    assert "0 runs left" in out and "| tetrajet_qramping | 0 |" in out
    records = study_report.read_results([str(tmp_path / "results.json")])
    assert [r["run"] for r in records] == DIGITS
    assert all(len(r["rows"]) == 2 and r["alone"] and r["steps"] == 12 for r in records)
    assert records[0]["data"] == records[1]["data"] != 0
    assert set(records[1]["periods"]) == {"0", "3", "6", "9"}
    before = (tmp_path / "results.json").read_bytes()

    assert study.main(command) == 0  # starts nothing
    assert (tmp_path / "results.json").read_bytes() == before
    other = tmp_path / "other"
    more = ["--done", str(tmp_path / "results.json"), "--out", str(other)]
    assert study.main([*command, *more]) == 0 and not (other / "results.json").exists()
    assert study.main(["report", *more]) == 0
    assert (other / "digits-main.png").read_bytes().startswith(b"\x89PNG")
    assert "| bf16 | 0 |" in (other / "table.md").read_text()


def test_the_budget_ends_it(tmp_path, capsys):
    started = time.monotonic()
    command = ["run", "--runs", *DIGITS, "--out", str(tmp_path), "--budget", "9"]
    assert study.main([*command, "--options", SMALL]) == 0
    assert time.monotonic() - started < 8  # 1 second of work: no run was begun
    out = capsys.readouterr().out
    assert "2 runs left" in out
    said = [line for line in out.splitlines() if "none begins" in line]
    assert len(said) == 1 and "by --expect one takes 120 s" in said[0]


@pytest.mark.parametrize(
    "options, message",
    [
        (
            ["--runs", "gpt/bf17@0"],
            "--runs must be a row of `study.py list`, @ and a seed, got gpt",
        ),
        (["--runs", "gpt/bf16"], "--runs must be a row"),
        (
            ["--runs", "gpt/ema_share_0.0005@0"],
            "--runs must be of rows that have a recipe, got gpt",
        ),
        ([], "--plan or --runs must name a run"),
        (["--plan", "repeat", "--per-gpu", "0"], "--per-gpu must be positive, got 0"),
        (["--plan", "repeat", "--budget", "-1"], "--budget must be positive, got -1"),
        (["--plan", "repeat", "--done", "nowhere"], "--done must name results.json files, got"),
    ],
)
def test_refused_options(options, message, tmp_path, capsys):
    assert study.main(["run", "--out", str(tmp_path), *options]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


# ---- the text ----


def test_packages_are_split_by_path_and_no_content_occurs_twice(tmp_path):
    for i in range(100):
        path = tmp_path / f"package{i % 7}" / f"module{i}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"x = {i}\n" * 20)
    (tmp_path / "package0" / "copy.py").write_text("x = 1\n" * 20)
    (tmp_path / "package0" / "data.txt").write_text("no source")
    (tmp_path / "package0" / "table.py").write_bytes(b"#" * (text.LONGEST + 1))
    (tmp_path / "package0" / "broken.py").symlink_to(tmp_path / "nowhere")
    everything = [b"x = %d\n" % i * 20 for i in range(100)]
    training, held_out = text._packages(10**6, [str(tmp_path)])
    assert len(training) + len(held_out) == sum(map(len, everything)) and len(held_out) > 0
    assert all((content in training) != (content in held_out) for content in everything)
    again = text._packages(10**6, [str(tmp_path)])
    assert again == (training, held_out)
    limited = text._packages(1000, [str(tmp_path)])
    assert sum(map(len, limited)) == 1000
    assert training.startswith(limited[0]) and held_out.startswith(limited[1])


def test_the_cache_holds_both_texts(tmp_path):
    cache = str(tmp_path / "text.bin")
    texts = text.read_text("library", 400_000, cache)
    assert text.read_text("library", 400_000, cache) == texts and len(texts[1]) > 0
    Path(cache).write_bytes(Path(cache).read_bytes()[:100])
    with pytest.raises(text.BadInput, match="--cache must name a file"):
        text.read_text("library", 400_000, cache)
    with pytest.raises(text.BadInput, match="--text must be library or packages, got novel"):
        text.read_text("novel", 20000)
