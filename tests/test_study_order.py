"""The study with sums in one order: what is set, what is recorded, what is not mixed."""

from __future__ import annotations

import os

import examples_study
import fixed_order
import pytest
import study
import study_report
import study_rows
import study_run
import torch
from checkpoint import BadInput
from examples_study import SMALL, record
from harness import digest

queue, _one_thread = examples_study.queue, examples_study._one_thread


def test_a_deterministic_run_ends_in_the_same_bits_again(tmp_path, monkeypatch):
    """And its record says so, whatever the process made before."""
    said = []
    monkeypatch.setattr(study_run, "say", lambda event, **fields: said.append((event, fields)))
    worker = study_run.Worker("cpu", str(tmp_path))
    for seed in (0, 1, 0):
        options = f"{SMALL} --deterministic"
        worker.run({"run": f"digits/tetrajet@{seed}", "options": options, "compile": False})
    first, other, again = (fields["record"] for event, fields in said if event == "done")
    assert first["deterministic"] and first["data"] == other["data"] != 0
    assert len(first["weights"]) == 64 and first["weights"] != other["weights"]
    assert again["weights"] == first["weights"] and again["rows"] == first["rows"]
    assert not torch.are_deterministic_algorithms_enabled()


def test_what_cublas_reads_is_there_before_a_worker_starts(queue, monkeypatch):
    started = []
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(study.Study, "listen", lambda self, worker: None)
    monkeypatch.setattr(
        study.subprocess, "Popen", lambda *args, env, **options: started.append(env)
    )
    queue(["a@0"], fixed={"a@0"}).start_worker(0)
    queue(["a@0"]).start_worker(0)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")  # the user's
    queue(["a@0"], fixed={"a@0"}).start_worker(0)
    assert [env.get("CUBLAS_WORKSPACE_CONFIG") for env in started] == [":4096:8", None, ":16:8"]


def test_a_digest_is_that_of_all_the_bytes():
    model = torch.nn.ModuleList([torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2).bfloat16()])
    before = digest(model)
    assert before == digest(model) and len(before) == 64
    for tensor in model.state_dict().values():
        kept = tensor.clone()
        tensor.add_(1)
        assert digest(model) != before
        tensor.copy_(kept)
    assert digest(model) == before


def test_a_fixed_order_is_undone(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)

    def state():
        return [get() for _, get, _ in fixed_order._SWITCHES] + [
            getattr(owner, name) for owner, name, _ in fixed_order._attributes()
        ]

    torch.use_deterministic_algorithms(True, warn_only=True)  # the caller's
    try:
        before = state()
        with fixed_order.fixed_order(True):
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert state() == before and torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    before = state()
    with fixed_order.fixed_order(False):
        assert state() == before and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    with pytest.raises(KeyError), fixed_order.fixed_order(True):
        wanted = [value for *_, value in (*fixed_order._SWITCHES, *fixed_order._attributes())]
        assert state() == wanted and torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        raise KeyError
    assert state() == before


def test_runs_of_the_plan_repeat_have_a_fixed_order(queue):
    args = study.make_parser().parse_args(["run", "--plan", "repeat", "--out", "x"])
    study.check(args)
    assert args.fixed == set(study_rows.PLANS["repeat"]) == set(args.runs)
    args = study.make_parser().parse_args(["run", "--runs", "gpt/bf16@0", "--out", "x"])
    study.check(args)
    assert args.fixed == set()
    jobs = queue(["a@0", "b@0"], fixed={"b@0"}).jobs
    assert [job.options for job in jobs] == ["", "--deterministic"]


@pytest.mark.parametrize("file", ["results.json", "other.json"])
@pytest.mark.parametrize("made", [True, False, None])
def test_a_run_made_in_another_order_is_not_taken_for_it(queue, tmp_path, file, made):
    """None: a record from before there was the option."""
    fields = {} if made is None else {"deterministic": made}
    path = str(tmp_path / file)
    study_report.write_results(path, [record("gpt/bf16@0", 1.0, **fields)])
    runs, more = ["gpt/bf16@0", "gpt/bf16@1"], {"done": [path]}
    same, other = ({*runs}, set()) if made else (set(), {*runs})
    assert [job.run for job in queue(runs, fixed=same, **more).jobs] == ["gpt/bf16@1"]
    with pytest.raises(BadInput, match="--out and --done must hold gpt/bf16@0 with") as refused:
        queue(runs, fixed=other, **more)
    assert str(refused.value).count("without") == 1
    assert [job.run for job in queue(runs[1:], fixed=other, **more).jobs] == ["gpt/bf16@1"]


def test_a_gap_and_a_speed_are_between_runs_of_one_order():
    fixed = {"deterministic": True}
    tetrajet = record("gpt/tetrajet@0", 1.04, **fixed)
    plain, ordered = record("gpt/bf16@0", 1.0), record("gpt/bf16@0", 1.0, **fixed)
    assert study_report.gap_of(tetrajet, [tetrajet, plain]) is None
    assert study_report.gap_of(tetrajet, [tetrajet, ordered]) == pytest.approx(4.0)
    assert study_report.gap_of(record("gpt/tetrajet@0", 1.04), [ordered]) is None
    assert study_report.speeds([tetrajet], [plain]) == (1000.0, None)
    assert study_report.speeds([tetrajet], [plain, ordered]) == (1000.0, 1000.0)
    later = record("gpt/tetrajet@1", 1.04, units_per_second=500.0, deterministic=False)
    assert study_report.speeds([tetrajet, later], [plain, ordered]) == (1000.0, 1000.0)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({}, "no"), ({"weights": "a"}, "yes"), ({"weights": "a", "device": "another"}, "yes"),
        ({"device": "another"}, "not comparable"), ({"torch": "3"}, "not comparable"),
        ({"compiled": False}, "not comparable"), ({"deterministic": False}, "not comparable"),
        ({"weights": None}, "unknown"),
    ],
)  # fmt: skip
def test_other_bits_say_something_where_nothing_else_differs(changes, said):
    how = {"compiled": True, "deterministic": True}
    mine = record("gpt/bf16@0", 1.0, weights="a", **how)
    other = record("gpt/bf16@0", 1.0, **{**how, "weights": "b", **changes})
    assert study_report.comparison([mine], [other]).splitlines()[-1].endswith(f" | {said} |")
