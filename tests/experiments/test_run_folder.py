"""Reading run folders: what is on record, what a recipe is held to, what is missing."""

from __future__ import annotations

import json

import pytest

from avalanche_ext.evaluation.accuracy_matrix import backward_transfer_gem
from avalanche_ext.evaluation.tables import aggregate
from avalanche_ext.experiments.run_folder import (
    changed_settings,
    protocol_of,
    read_run,
    with_all_metrics,
)
from avalanche_ext.recipes import find_recipe
from avalanche_ext.recipes.settings import to_json
from tests.experiments.run_folders import SYSTEMS, VERSIONS, dump, published, write_run

NAIVE, ER, MAIN = SYSTEMS


def test_rows_are_the_summarys_with_their_seeds_results(tmp_path):
    summary = write_run(tmp_path, seeds=(0, 2, 10))
    run = read_run(tmp_path)
    assert [r["recipe"] for r in run.rows] == list(SYSTEMS)
    for read, written in zip(run.rows, summary["rows"], strict=True):
        assert {k: read[k] for k in written} == written
        results = run.results[read["recipe"]]
        assert [r["seed"] for r in results] == [0, 2, 10]
        assert [r["accuracy_matrix"] for r in results] == written["accuracy_matrices"]
    assert run.settings[ER]["method"] == "er"
    assert "published" not in run.rows[0]


def test_results_of_seeds_that_are_not_the_runs_are_left_alone(tmp_path):
    write_run(tmp_path, seeds=(0, 1))
    dump(tmp_path / "seed_7" / "result.json", {"recipe": MAIN, "seed": 7})
    dump(tmp_path / "seed_8" / "result.json", {"recipe": "other", "seed": 0})
    assert [r["seed"] for r in read_run(tmp_path).results[MAIN]] == [0, 1]


def test_every_metric_follows_from_the_matrices(tmp_path):
    summary = write_run(tmp_path)
    rows = with_all_metrics(read_run(tmp_path))
    for row, written in zip(rows, summary["rows"], strict=True):
        matrices = written["accuracy_matrices"]
        expected = aggregate([backward_transfer_gem(m) for m in matrices])
        assert row["backward_transfer_gem"] == expected
        assert row["flops_per_sample"]["mean"] == 34_800
        assert row["average_accuracy"] == written["average_accuracy"]
        assert "peak_device_bytes" not in row


def test_published_figures_come_from_the_recorded_recipe(tmp_path):
    changes = {
        MAIN: {"published": [published(0.9, 0.01)]},
        ER: {"published": [published(0.8)], "epochs": 3},
    }
    write_run(tmp_path, settings=changes)
    naive, er, main = read_run(tmp_path).rows
    assert (main["published"], main["changed"]) == ([published(0.9, 0.01)], [])
    assert er["changed"] == ["epochs"]
    assert "published" not in naive


def test_a_summary_with_settings_needs_no_other_file(tmp_path):
    summary = write_run(tmp_path)
    for row in summary["rows"]:
        row["settings"] = {**to_json(find_recipe(row["recipe"])), "published": [published(0.9)]}
    alone = tmp_path / "alone"
    dump(alone / "summary.json", summary)
    rows = read_run(alone).rows
    assert [r["published"][0]["value"] for r in rows] == [0.9] * 3
    assert rows[0]["protocol"]["epochs"] == 10


def test_what_a_smoke_run_changes_is_named():
    for name in ("drl_ber/split_digits", "er/split_mnist_small"):
        assert changed_settings(to_json(find_recipe(name))) == []
    smoke = to_json(find_recipe(MAIN).smoke())
    assert changed_settings(smoke) == ["benchmark.train_per_experience", "epochs"]
    assert changed_settings({**smoke, "name": "my/own"}) == []
    assert changed_settings({**to_json(find_recipe(MAIN)), "seeds": [9], "source": "me"}) == []


def test_the_protocol_is_what_the_base_recipe_and_the_memory_say():
    protocol = protocol_of(to_json(find_recipe(MAIN)), VERSIONS)
    assert protocol["benchmark.kind"] == "SplitDigits"
    assert protocol["mem"] == 50
    assert protocol["versions.torch"] == "2.9"
    assert not {"lam", "mode", "name", "method", "seeds", "versions.numpy"} & set(protocol)
    assert {"hidden", "lr", "momentum", "batch_size", "epochs", "mem_scope"} <= set(protocol)


def test_a_folder_without_a_run_says_what_it_is(tmp_path):
    write_run(tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for folder, message in (
        ("nowhere", "does not exist"),
        ("file", "is a file"),
        ("empty", r"no summary.json\). 'avalanche-ext run"),
        ("run", "a recipe, 3 finished seeds and no summary.json"),
        ("run/seed_0", "is one seed"),
        ("run/baselines/er__split_digits", "baseline of the run above"),
    ):
        with pytest.raises(FileNotFoundError, match=message) as refused:
            read_run(tmp_path / folder)
        assert "no finished run" in str(refused.value)


def test_a_broken_record_is_named(tmp_path):
    write_run(tmp_path)
    (tmp_path / "seed_1" / "result.json").write_text('{"recipe": ')
    with pytest.raises(ValueError, match=r"seed_1/result\.json is not valid JSON"):
        read_run(tmp_path)
    (tmp_path / "summary.json").write_text(json.dumps([1]))
    with pytest.raises(ValueError, match="has no 'rows'"):
        read_run(tmp_path)
