"""Sweeps: the protocol, the record, and trials whose worker is killed."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import signal
import sys
import types
from pathlib import Path

import pytest
import torch

from avalanche_ext.experiments import sweep as sweep_module
from avalanche_ext.experiments.leases import GRACE, FileLock, Lease, _is_locked
from avalanche_ext.experiments.run import run_seed
from avalanche_ext.experiments.search_space import (
    grid_points,
    parse_axis,
)
from avalanche_ext.experiments.selection import FirstExperiences, for_selection
from avalanche_ext.experiments.sweep import TRIES, Sweep, load, open_study, prepare, work
from avalanche_ext.experiments.sweep_record import objective, record, table
from avalanche_ext.experiments.sweep_workers import submit
from avalanche_ext.recipes import RECIPES, find_recipe, with_settings
from avalanche_ext.recipes.streams import BenchmarkSettings, SplitDigits

from .sweep_processes import CONTEXT, holder, stuck_worker, worker

TIMEOUT = 180  # of a wait that ends long before on any machine


def tiny(**changes):
    """Two learning rates by two memories, two seeds, two experiences of 40 images."""
    settings = {"recipe": "er/split_digits", "smoke": True, "seeds": (0, 1)}
    if not {"grid", "search"} & set(changes):
        settings["grid"] = {"lr": ("0.1", "0.5"), "mem": ("5", "20")}
    return Sweep(**{**settings, **changes})


def swept(sweep, folder):
    prepare(sweep, folder)
    work(folder)
    return record(folder)


def scores(data):
    """Accuracies of every complete trial by its values."""
    return [
        (tuple(row["params"].items()), tuple(row["accuracy"]["values"]))
        for row in data["trials"]
        if row["state"] == "complete"
    ]


@pytest.fixture(scope="module")
def unkilled(tmp_path_factory):
    """A finished sweep of one worker."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("sweep") / "unkilled"
    return folder, swept(tiny(), folder)


# the protocol ---------------------------------------------------------------------------------


def test_selection_trains_on_the_first_experiences_and_tests_on_held_out_images():
    recipe = with_settings(find_recipe("er/split_digits"), {"benchmark.validation": "true"})
    chosen = for_selection(recipe, 2)
    cut, whole = chosen.benchmark.build(0), recipe.benchmark.build(0)
    real = find_recipe("er/split_digits").benchmark.build(0)
    assert (len(cut.train_stream), len(cut.test_stream)) == (2, 2)
    assert list(cut.streams) == ["train", "test"]
    for k in range(2):
        for stream in ("train_stream", "test_stream"):
            mine, theirs = (getattr(b, stream)[k].dataset for b in (cut, whole))
            assert torch.equal(
                torch.stack([x for x, *_ in mine]), torch.stack([x for x, *_ in theirs])
            )
    images = {x.numpy().tobytes() for e in real.test_stream for x, *_ in e.dataset}
    mine = {x.numpy().tobytes() for e in cut.test_stream for x, *_ in e.dataset}
    learnt = {x.numpy().tobytes() for e in real.train_stream for x, *_ in e.dataset}
    assert not mine & images
    assert mine <= learnt
    assert (chosen.benchmark.n_outputs, chosen.benchmark.in_shape) == (10, (1, 8, 8))
    assert (chosen.benchmark.n_experiences, chosen.benchmark.validation) == (5, True)
    assert len(for_selection(recipe, None).benchmark.build(0).train_stream) == 5


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_selection_asks_for_the_network_of_the_whole_stream(name):
    """Whatever a benchmark says of itself, its heads and its values, its first part says too."""
    recipe = RECIPES[name]
    held_out = dataclasses.replace(recipe.benchmark, validation=True)
    cut = for_selection(dataclasses.replace(recipe, benchmark=held_out), 1).benchmark
    told = [n for n, v in vars(BenchmarkSettings).items() if isinstance(v, property)]
    assert {"in_shape", "n_outputs", "multi_head", "units", "value_range"} <= {*told}
    for field in told:
        assert getattr(cut, field) == getattr(held_out, field)


def test_the_test_stream_is_refused_everywhere():
    refusal = r"never chosen on the test stream.*benchmark.validation=true.*got False"
    with pytest.raises(ValueError, match=refusal):
        for_selection(find_recipe("er/split_digits"), 2)
    with pytest.raises(ValueError, match=refusal):
        FirstExperiences(of=SplitDigits(), stream="SplitDigits", first=2).build(0)
    with pytest.raises(ValueError, match=refusal):
        tiny(settings={"benchmark.validation": "false"})
    with pytest.raises(ValueError, match=r"cannot vary 'benchmark.validation'"):
        parse_axis("--grid", "benchmark.validation=true,false")
    with pytest.raises(ValueError, match="first expects 1 to 5 experiences, or 'all'; got 6"):
        tiny(first=6)


def test_the_score_is_that_of_the_recipe_on_the_protocol(unkilled, tmp_path):
    folder, data = unkilled
    (row,) = [r for r in data["trials"] if r["params"] == {"lr": "0.5", "mem": "5"}]
    recipe = with_settings(
        find_recipe("er/split_digits"), {"benchmark.validation": "true", "lr": "0.5", "mem": "5"}
    )
    values = [
        run_seed(for_selection(recipe.smoke(), 2), seed, tmp_path / str(seed))["average_accuracy"]
        for seed in (0, 1)
    ]
    assert row["accuracy"]["values"] == values
    assert row["accuracy"]["mean"] == pytest.approx(sum(values) / 2)
    assert row["folder"] == f"trials/{row['number']:04d}"
    kept = json.loads((folder / row["folder"] / "seed_1" / "result.json").read_text())
    assert kept["average_accuracy"] == values[1]
    assert len(kept["accuracy_matrix"]) == 2


# the record -----------------------------------------------------------------------------------


def test_the_record_has_every_point_the_best_and_its_command(unkilled):
    folder, data = unkilled
    assert json.loads((folder / "sweep.json").read_text()) == json.loads(json.dumps(data))
    assert data["finished"]
    assert [row["params"] for row in data["trials"]] == grid_points(tiny().grid)
    assert {row["state"] for row in data["trials"]} == {"complete"}
    means = [row["accuracy"]["mean"] for row in data["trials"]]
    assert len(set(means)) > 1
    assert data["best"] == data["trials"][means.index(max(means))]
    assert data["objective"] == objective(tiny()) == (
        "average accuracy on held-out training images after the first 2 of 5 experiences, mean of "
        "seeds 0, 1; the test set is not touched"
    )  # fmt: skip
    best = data["best"]["params"]
    assert shlex.split(data["command"]) == [
        "avalanche-ext", "run", "er/split_digits", "--set", f"lr={best['lr']}",
        f"mem={best['mem']}", "--seeds", "0", "1", "--smoke", "--out", str(folder / "best"),
    ]  # fmt: skip
    lines = table(data).splitlines()
    assert lines[0].split() == ["trial", "lr", "mem", "accuracy", "%", "train", "s", "state"]
    assert lines[2].split()[0] == str(data["best"]["number"])
    assert len(lines) == 2 + 4


def test_a_finished_sweep_is_not_trained_again(unkilled):
    folder, data = unkilled
    before = (folder / "trials" / "0000" / "summary.json").stat().st_mtime_ns
    assert swept(tiny(), folder) == data
    assert (folder / "trials" / "0000" / "summary.json").stat().st_mtime_ns == before


def test_other_settings_and_other_files_are_refused(unkilled, tmp_path):
    folder, _ = unkilled
    with pytest.raises(ValueError, match=r"holds another sweep \(first, smoke differ\)"):
        prepare(tiny(first=3, smoke=False), folder)
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match=r"holds files, but no sweep.*Nothing of it was touched"):
        prepare(tiny(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(ValueError, match="is a file"):
        prepare(tiny(), tmp_path / "thesis.tex")
    with pytest.raises(FileNotFoundError, match="holds no sweep"):
        load(tmp_path)


def test_values_that_do_not_fit_fail_their_trial_alone(tmp_path):
    data = swept(tiny(recipe="ber/split_digits", grid={"mem": ("1", "20")}), tmp_path)
    assert [row["state"] for row in data["trials"]] == ["failed", "complete"]
    assert "ValueError: mem=1 in total cannot hold" in data["trials"][0]["error"]
    assert data["best"]["params"] == {"mem": "20"}
    assert data["finished"]
    assert "failed: ValueError" in table(data)


def test_a_search_is_the_same_again_and_can_be_made_longer(tmp_path):
    search = {"lr": "loguniform:0.01:1", "mem": "int:5:20", "mem_scope": "choice:total,experience"}
    short = tiny(search=search, trials=2, seeds=(0,), first=1)
    first = swept(short, tmp_path / "a")
    longer = swept(dataclasses.replace(short, trials=3), tmp_path / "a")
    again = swept(dataclasses.replace(short, trials=3), tmp_path / "b")
    assert [r["params"] for r in longer["trials"]] == [r["params"] for r in again["trials"]]
    assert longer["trials"][:2] == first["trials"]
    assert len(longer["trials"]) == 3
    for row in longer["trials"]:
        assert 0.01 <= float(row["params"]["lr"]) <= 1
        assert 5 <= int(row["params"]["mem"]) <= 20
        assert row["params"]["mem_scope"] in ("total", "experience")
    assert len({row["params"]["lr"] for row in longer["trials"]}) == 3
    other = swept(dataclasses.replace(short, seed=1, trials=1), tmp_path / "c")
    assert other["trials"][0]["params"]["lr"] != longer["trials"][0]["params"]["lr"]


# workers that go ------------------------------------------------------------------------------


@contextlib.contextmanager
def running(target, *arguments):
    process = CONTEXT.Process(target=target, args=arguments, daemon=True)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join(TIMEOUT)


@pytest.mark.parametrize("storage", ["journal", "database"])
def test_the_trial_of_a_killed_worker_is_taken_up_again(storage, unkilled, tmp_path):
    folder = tmp_path / "sweep"
    url = None if storage == "journal" else f"sqlite:///{tmp_path}/trials.db"
    prepare(tiny(storage=url), folder)
    ours, theirs = CONTEXT.Pipe()
    with running(stuck_worker, folder, theirs) as victim:
        assert ours.poll(TIMEOUT), "the first worker never got to the middle of a trial"
        with running(worker, folder) as second:
            mark = f"-{victim.pid}-"
            trials = open_study(folder).trials
            (held,) = [t for t in trials if mark in t.user_attrs.get("worker", "")]
            seed_0 = folder / "trials" / f"{held.number:04d}" / "seed_0" / "result.json"
            finished_before = seed_0.stat().st_mtime_ns
            os.kill(victim.pid, signal.SIGKILL)
            victim.join(TIMEOUT)
            assert victim.exitcode == -signal.SIGKILL
            with running(worker, folder) as third:
                for process in (second, third):
                    process.join(TIMEOUT)
                    assert process.exitcode == 0
    data = record(folder)
    assert data["finished"]
    assert sorted(scores(data)) == sorted(scores(unkilled[1]))
    assert len(data["trials"]) == 5
    (lost,) = [row for row in data["trials"] if row["state"] == "lost"]
    (again,) = [row for row in data["trials"] if row["retried_from"] is not None]
    assert lost["number"] == held.number
    assert again["retried_from"] == lost["number"]
    assert (again["params"], again["folder"]) == (lost["params"], lost["folder"])
    assert again["worker"] != lost["worker"]
    assert seed_0.stat().st_mtime_ns == finished_before  # the seed that was done is kept
    assert len(table(data).splitlines()) == 2 + 4


def test_a_trial_that_is_stopped_by_hand_is_taken_up_and_not_counted(tmp_path, monkeypatch):
    prepare(tiny(grid={"mem": ("5",)}, seeds=(0,)), tmp_path)
    whole = sweep_module.run_recipe

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep_module, "run_recipe", stop)
    for _ in range(TRIES + 1):
        with pytest.raises(KeyboardInterrupt):
            work(tmp_path)
    assert not record(tmp_path)["finished"]
    monkeypatch.setattr(sweep_module, "run_recipe", whole)
    work(tmp_path)
    data = record(tmp_path)
    assert [row["state"] for row in data["trials"]] == ["lost"] * (TRIES + 1) + ["complete"]
    assert data["trials"][-1]["retried_from"] == TRIES
    assert data["trials"][-1]["folder"] == "trials/0000"
    assert list((tmp_path / "workers").iterdir()) == []


def test_a_trial_that_kills_every_worker_is_left_alone_in_the_end(tmp_path, monkeypatch):
    prepare(tiny(grid={"mem": ("5",)}, seeds=(0,)), tmp_path)

    def die(*args, **kwargs):
        raise SystemExit

    monkeypatch.setattr(sweep_module, "run_recipe", die)
    for _ in range(TRIES):
        with pytest.raises(SystemExit):
            work(tmp_path)
    work(tmp_path)
    data = record(tmp_path)
    assert [row["state"] for row in data["trials"]] == ["lost"] * TRIES
    assert data["finished"]
    assert data["best"] is None
    assert data["command"] is None


def test_a_worker_that_was_taken_for_dead_drops_its_result(tmp_path, monkeypatch):
    prepare(tiny(grid={"mem": ("5",)}, seeds=(0,)), tmp_path)
    whole = sweep_module.run_recipe

    def taken_over(*args, **kwargs):
        summary = whole(*args, **kwargs)
        study = open_study(tmp_path)
        study.tell(0, state=type(study.trials[0].state).FAIL)
        return summary

    said = []
    monkeypatch.setattr(sweep_module, "run_recipe", taken_over)
    with monkeypatch.context() as once:
        once.setattr(sweep_module, "TRIES", 1)
        work(tmp_path, said.append)
    assert said == ["trial 0 was taken over by another worker; this result is dropped"]
    assert record(tmp_path)["trials"][0]["state"] == "lost"


def test_a_lock_ends_with_its_process(tmp_path):
    ours, theirs = CONTEXT.Pipe()
    with running(holder, tmp_path, theirs) as process, Lease(tmp_path) as mine:
        assert ours.poll(TIMEOUT)
        name = ours.recv()
        assert mine.is_alive(name)
        assert mine.is_alive(mine.name)
        assert _is_locked(tmp_path / "lock")
        os.kill(process.pid, signal.SIGSTOP)  # a worker that only stands still is not dead
        assert mine.is_alive(name)
        os.kill(process.pid, signal.SIGKILL)
        process.join(TIMEOUT)
        assert not mine.is_alive(name)
        assert not mine.is_alive("never-1-0")
        with FileLock(tmp_path / "lock"):
            pass
    assert not mine.is_alive(mine.name)


def test_a_worker_elsewhere_is_dead_when_it_has_not_been_heard_of(tmp_path):
    with Lease(tmp_path) as mine:
        there = tmp_path / "another-machine-1-00000000"
        there.touch()
        now = (tmp_path / mine.name).stat().st_mtime
        os.utime(there, (now, now - GRACE / 2))
        assert mine.is_alive(there.name)
        os.utime(there, (now, now - 2 * GRACE))
        assert not mine.is_alive(there.name)


# clusters -------------------------------------------------------------------------------------


def test_jobs_of_a_cluster_do_the_work(tmp_path, monkeypatch):
    calls = []

    class AutoExecutor:
        def __init__(self, folder, cluster):
            calls.append((Path(folder).name, cluster))

        def update_parameters(self, **parameters):
            calls.append(parameters)

        def batch(self):
            return contextlib.nullcontext()

        def submit(self, function, *arguments):
            function(*arguments)
            return types.SimpleNamespace(job_id=7)

    monkeypatch.setitem(sys.modules, "submitit", types.SimpleNamespace(AutoExecutor=AutoExecutor))
    prepare(tiny(grid={"mem": ("5",)}, seeds=(0,)), tmp_path)
    assert submit(tmp_path, 2, {"timeout_min": 5}) == ["7", "7"]
    assert calls == [("slurm", "slurm"), {"name": "avalanche-ext-sweep", "timeout_min": 5}]
    assert record(tmp_path)["finished"]


def test_a_missing_engine_is_named_with_the_command_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'avalanche-ext\[slurm\]'"):
        submit(tmp_path, 1, {})
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'avalanche-ext\[sweep\]'"):
        prepare(tiny(), tmp_path / "new")
    assert not (tmp_path / "new").exists()
