"""Transfer of the representation on Split digits: what the record holds follows from its runs."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from avalanche_ext.recipes import find_recipe

SCRIPT = Path(__file__).parents[2] / "examples" / "representation_transfer.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[SCRIPT.stem] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[SCRIPT.stem]


@pytest.fixture(scope="module")
def record(script):
    recipe = find_recipe(script.METHODS["Shuffle replay"]).smoke()
    return script.measure({"Shuffle replay": recipe}, [6], [3, 4])


def test_both_transfers_follow_from_the_matrices(record):
    (row,) = record["rows"]
    measured = zip(
        row["runs"], row["representation_bwt"]["values"], row["representation_fwt"]["values"],
        strict=True,
    )  # fmt: skip
    for run, bwt, fwt in measured:
        a, alone = run["representation_matrix"], run["alone"]
        assert [len(r) for r in a] == [1, 2, 3, 4, 5]
        lost = [sum(a[i][j] - a[j][j] for j in range(i + 1)) / (i + 1) for i in range(1, 5)]
        assert bwt == pytest.approx(sum(lost) / 4)
        assert fwt == pytest.approx(sum(a[i][i] - alone[i] for i in range(1, 5)) / 4)
        assert run["representation_accuracy"] == pytest.approx(sum(a[4]) / 5)


def test_what_a_record_and_its_table_say(script, record):
    (row,) = record["rows"]
    assert (row["title"], row["settings"]["method"]) == ("Shuffle replay", "shuffle_replay")
    assert row["settings"]["hidden"] == [row["width"]] == [6]
    assert [run["seed"] for run in row["runs"]] == record["seeds"] == [3, 4]
    assert {"hash", "modified"} <= (record["commit"] or {"hash": 0, "modified": 0}).keys()
    printed = script.table(record)
    bwt = row["representation_bwt"]
    assert f"{100 * bwt['mean']:+.2f} ± {100 * bwt['sd']:.2f}" in printed
    head, published = printed.split("\n\n")
    assert "not comparable" in published.splitlines()[0]
    assert published.splitlines()[-1].split() == ["ExpandableDER", "+1.36", "+1.49"]
    assert "PODNet" not in head


def test_the_network_that_comes_first_is_trained_on_all_parts(script):
    recipe = find_recipe("naive/split_digits_expandable").smoke()
    recipe = recipe.__class__(**{**vars(recipe), "epochs": 30, "hidden": (20,), "lr": 0.05})
    g = torch.Generator().manual_seed(0)
    x = torch.rand(64, 1, 8, 8, generator=g)
    y = torch.arange(64) % 2
    x[:, 0, 0, 0] = 3.0 * y
    memory = x[:16].clone(), torch.full((16,), 7)
    memory[0][:, 0, 0, 0] = -3.0
    model = script.train_alone(recipe, [(x, y), memory], seed=1)
    with torch.no_grad():
        assert float((model(x).argmax(1) == y).double().mean()) == 1.0
        assert model(memory[0]).argmax(1).tolist() == [7] * 16
    again = script.train_alone(recipe, [(x, y), memory], seed=1)
    other = script.train_alone(recipe, [(x, y), memory], seed=2)
    first, second, third = (
        torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (model, again, other)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_each_experience_is_met_first_with_the_memory_of_its_time(script, monkeypatch):
    met = []

    def train_alone(recipe, parts, seed):
        met.append([len(x) for x, _ in parts])

    def accuracies(model, train, test):
        assert len(train) == len(test)
        return [10 * len(train) + j for j in range(len(train))]

    monkeypatch.setattr(script, "train_alone", train_alone)
    monkeypatch.setattr(script, "representation_accuracies", accuracies)
    recipe = find_recipe(script.METHODS["Shuffle replay"]).smoke()
    sizes = [len(e.dataset) for e in recipe.benchmark.build(3, None).train_stream]
    run = script.run(recipe, 3)
    assert run["alone"] == [10, 21, 32, 43, 54]
    assert met[0] == sizes[:1]
    memories = [part for _, part in met[1:]]
    assert [own for own, _ in met[1:]] == sizes[1:]
    assert memories == [min(recipe.mem, sum(sizes[:k])) for k in range(1, 5)]


def test_the_memory_that_the_next_experience_is_trained_with(script):
    recipe = find_recipe("expandable_der/split_digits").smoke()
    strategy = script.build_strategy(recipe)
    benchmark = recipe.benchmark.build(0, None)
    strategy.train(benchmark.train_stream[0])
    x, y = script.memory_of(strategy)
    assert x.shape[1:] == (1, 8, 8)
    assert len(x) == len(strategy.memory) > 0
    assert {*y.tolist()} == {*benchmark.train_stream[0].classes_in_this_experience}
    stored = {
        tuple(image.flatten().tolist()) for image in script.images(benchmark.train_stream[0])[0]
    }
    assert all(tuple(image.flatten().tolist()) in stored for image in x)
    naive = script.build_strategy(find_recipe("naive/split_digits_expandable").smoke())
    assert script.memory_of(naive) is None
