"""Runs on the CORe50 tracks: what they are tested on, and what the record says."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from avalanche_ext.benchmarks import write_core50_tree
from avalanche_ext.experiments.build import build_model
from avalanche_ext.experiments.provenance import commit
from avalanche_ext.experiments.run import run_recipe, run_seed
from avalanche_ext.experiments.run_folder import read_run
from avalanche_ext.recipes import find_recipe
from avalanche_ext.recipes.streams import CORe50Track


def toy(track, method="drl_er", **changes):
    recipe = find_recipe(f"{method}/toy_core50_{track}").smoke()
    return dataclasses.replace(recipe, **changes)


@pytest.mark.parametrize(("track", "rows", "columns"), [("ni", 8, 1), ("nc", 3, 3), ("nic", 71, 1)])
def test_the_valid_stream_is_watched_and_the_test_stream_comes_last(track, rows, columns, tmp_path):
    result = run_seed(toy(track), 0, tmp_path / "run")
    matrix = result["accuracy_matrix"]
    assert (len(matrix), len(matrix[0])) == (rows, columns)
    assert result["accuracy_matrix_stream"] == "valid"
    mean = sum(map(sum, matrix)) / (rows * columns)
    assert result["average_validation_accuracy"] == pytest.approx(mean)
    assert result["challenge"]["ChallengeAverageValidationAccuracy"] == pytest.approx(mean)
    assert result["challenge"]["ChallengeTestAccuracy"] == pytest.approx(result["test_accuracy"])
    assert ("forgetting" in result) == (columns > 1)
    assert result["flops_per_sample"] > 1e6
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").open()]
    tested = [k for k, e in enumerate(events) if "test_stream" in e.get("metric", "")]
    watched = [k for k, e in enumerate(events) if "valid_stream" in e.get("metric", "")]
    assert max(watched) < min(tested)
    assert "NaN" not in (tmp_path / "run" / "result.json").read_text()


def test_on_core50s_files(tmp_path):
    root = write_core50_tree(tmp_path / "core50", frames=1, size=32, mini=True)
    recipe = dataclasses.replace(
        find_recipe("drl_ber/core50_ni"), backbone="small_convnet", pretrained=False, freeze=(),
        benchmark=CORe50Track(track="ni", mini=True, root=str(root), train_per_experience=20),
        baselines=(), seeds=(0,),
    )  # fmt: skip
    summary = run_recipe(recipe, tmp_path / "run")
    (row,) = summary["rows"]
    assert row["title"] == "DRL+BER ResNet-50 mem 300 batch 16 lam 0.001"
    assert 0 <= row["test_accuracy"]["mean"] <= 1
    assert row["samples_trained"]["mean"] == sum(20 + 20 * 0 + 32 * t for t in range(8))
    (read,) = read_run(tmp_path / "run").rows
    # The paper's figures stand beside, with what this run changed in the protocol.
    assert {"backbone", "pretrained", "benchmark.mini"} <= set(read["changed"])


def test_missing_weights_stop_the_run_with_one_clear_error(monkeypatch):
    import timm

    def unreachable(*args, **options):
        raise OSError("no route")

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(FileNotFoundError, match="another protocol"):
        build_model(find_recipe("drl_ber/core50_ni"))


@pytest.mark.parametrize(("track", "frozen"), [("ni", "layer1"), ("nic", "layer2")])
def test_the_submissions_first_stages_are_frozen(track, frozen):
    name = {"ni": "drl_ber/core50_ni", "nic": "drl_shuffle_replay/core50_nic"}[track]
    model = build_model(dataclasses.replace(find_recipe(name), pretrained=False))
    still = {n.split(".")[0] for n, p in model.named_parameters() if not p.requires_grad}
    assert still == {"conv1", "bn1", "layer1", frozen}
    assert model.fc.out_features == 50


# seeds, records -------------------------------------------------------------------------------


def test_orders_and_initialisations_are_seeds_of_their_own(tmp_path):
    recipe = dataclasses.replace(
        find_recipe("er/split_digits").smoke(), seeds=(0,), order_seeds=(3, 4)
    )
    run_recipe(recipe, tmp_path / "orders")
    homes = sorted(p.name for p in (tmp_path / "orders").glob("seed_*"))
    assert homes == ["seed_0_order_3", "seed_0_order_4"]
    results = [json.loads((tmp_path / "orders" / h / "result.json").read_text()) for h in homes]
    assert [(r["seed"], r["order_seed"]) for r in results] == [(0, 3), (0, 4)]
    assert results[0]["accuracy_matrix"] != results[1]["accuracy_matrix"]
    again = run_seed(recipe, 0, tmp_path / "again", order_seed=4)
    assert again["accuracy_matrix"] == results[1]["accuracy_matrix"]


def test_the_record_names_commit_and_versions():
    found = commit()
    if not (Path(__file__).parents[2] / ".git").exists():
        assert found is None
    else:
        assert len(found["hash"]) == 40
        assert isinstance(found["modified"], bool)
