"""``avalanche-ext doctor`` and ``avalanche-ext sweep``, end to end on few images."""

from __future__ import annotations

import json
import os
import shlex
import sys

import pytest

from avalanche_ext.cli.main import main

SWEEP = ["sweep", "ber/split_digits", "--smoke", "--seeds", "0"]


def test_a_healthy_recipe_gives_findings_a_forecast_and_0(capsys):
    assert main(["doctor", "er/split_digits", "--smoke", "--set", "mem=20"]) == 0
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    assert lines[0] == "ok      device     cpu is there"
    assert "ok      memory     ERPlugin: 20 samples for 5 groups (experience)" in lines
    start = lines.index("experience  samples  steps  rows  seconds")
    assert [line.split()[:4] for line in lines[start + 2 : start + 7]] == [
        [str(k), "40", "4", "10" if k == 0 else "20"] for k in range(5)
    ]
    assert "held at once" in shown
    assert lines[-1] == "0 errors, 0 warnings"


def test_an_error_gives_1_and_no_forecast(capsys):
    assert main(["doctor", "ber/split_digits", "--smoke", "--set", "mem=3"]) == 1
    lines = capsys.readouterr().out.splitlines()
    (error,) = [line for line in lines if line.startswith("error")]
    assert "BERPlugin expects room for each of 5 groups" in error
    assert not any(line.startswith("experience") for line in lines)
    assert lines[-1] == "1 errors, 0 warnings"
    assert main(["doctor", "naive/split_digits", "--device", "abacus"]) == 1
    assert capsys.readouterr().out.startswith("error   device     'abacus' cannot be used here")


def test_two_workers_sweep_a_grid_and_the_best_can_be_run(tmp_path, capfd):
    out = tmp_path / "sweep"
    command = [*SWEEP, "--grid", "mem=5,20", "mode=per_group", "--out", str(out), "--workers", "2",
               "--set", "benchmark.validation=true", "lr=0.2"]  # fmt: skip
    assert main(command) == 0
    shown = capfd.readouterr().out
    data = json.loads((out / "sweep.json").read_text())
    assert [row["params"] for row in data["trials"]] == [
        {"mem": "5", "mode": "per_group"},
        {"mem": "20", "mode": "per_group"},
    ]
    assert {row["state"] for row in data["trials"]} == {"complete"}
    assert not any(f"-{os.getpid()}-" in row["worker"] for row in data["trials"])
    assert "held-out training images after the first 2 of 5 experiences" in shown
    assert data["command"] in shown
    program, *run = shlex.split(data["command"])
    assert program == "avalanche-ext"
    assert main(run) == 0
    resolved = json.loads((out / "best" / "recipe.json").read_text())
    assert resolved["lr"] == 0.2
    assert str(resolved["mem"]) == data["best"]["params"]["mem"]
    assert resolved["benchmark"]["validation"] is False
    assert resolved["benchmark"]["n_experiences"] == 5
    result = json.loads((out / "best" / "seed_0" / "result.json").read_text())
    assert len(result["accuracy_matrix"]) == 5
    for again in (command, ["sweep", "--join", str(out)]):
        assert main(again) == 0
        assert "this sweep is finished" in capfd.readouterr().out


def test_a_search_of_one_worker_prints_its_trials(tmp_path, capsys):
    command = [*SWEEP, "--search", "mem=int:5:20", "--trials", "2", "--first", "1"]
    assert main([*command, "--out", str(tmp_path / "sweep")]) == 0
    shown = capsys.readouterr().out
    assert "trial 0: mem=" in shown
    assert "trial 1: mem=" in shown
    assert "after the first 1 of 5 experiences, mean of seeds 0" in shown


def test_a_sweep_of_which_every_trial_fails_gives_1(tmp_path, capsys):
    assert main([*SWEEP, "--grid", "mem=1", "--out", str(tmp_path / "sweep")]) == 1
    assert "failed: ValueError: mem=1 in total cannot hold" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ber/split_digits"], "expects a grid or a search"),
        ([], "expects a RECIPE, or --join DIR"),
        (["ber/split_digits", "--join", "x"], "got both"),
        (["--join", "nowhere"], "nowhere holds no sweep"),
        (["ber/split_digits", "--grid", "mem"], "--grid expects FIELD=VALUE,VALUE"),
        (["ber/split_digits", "--search", "mem"], "--search expects FIELD=DISTRIBUTION"),
        (["ber/split_digits", "--grid", "seeds=1,2"], "cannot vary 'seeds'"),
        (["ber/split_digits", "--grid", "mem=1", "mem=2"], "['mem'] are given twice"),
        (["ber/split_digits", "--grid", "mem=5", "--first", "some"], "or 'all'; got some"),
        (["ber/split_digits", "--grid", "mem=5", "--workers", "0"], "--workers expects 1 or more"),
        (["ber/split_digits", "--grid", "mem=5", "--device", "abacus"], "--device 'abacus'"),
        (["ber/split_digits", "--grid", "mem=5", "--slurm", "gpu"], "timeout_min=60; got 'gpu'"),
        (["ber/split_digits", "--grid", "mem=5", "--set", "benchmark.validation=false"],
         "never chosen on the test stream"),
        (["ber/split_digit", "--grid", "mem=5"], "Close: ber/split_digits"),
    ],
)  # fmt: skip
def test_a_mistake_gives_one_clear_line(words, message, capsys, tmp_path):
    out = [] if "--join" in words else ["--out", str(tmp_path / "sweep")]
    assert main(["sweep", *words, *out]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("avalanche-ext: ")
    assert message in lines[-1]
    assert not (tmp_path / "sweep").exists()


def test_a_cluster_without_submitit_is_one_clear_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    command = [*SWEEP, "--grid", "mem=5", "--out", str(tmp_path / "sweep"), "--slurm"]
    assert main(command) == 2
    assert "pip install 'avalanche-ext[slurm]'" in capsys.readouterr().err
