"""Figs. 1 and 2 of the DRL paper: what of them is stable enough to be held to."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "drl_similarity_figures.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[SCRIPT.stem] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[SCRIPT.stem]


def test_a_smoke_run_writes_the_record_and_both_pictures(script, tmp_path, capsys):
    script.main(["--smoke", "--seeds", "3", "4", "--out", str(tmp_path)])
    record = json.loads((tmp_path / "similarity.json").read_text("utf-8"))
    assert record["seeds"] == [3]
    assert "smoke" in record["protocol"]["data"]
    assert set(record["fig1"]) == {"7,9", "0,1"}
    for group in record["fig1"].values():
        assert group["published"].keys() <= group["measured"].keys()
        assert len(group["measured"]["r_input_same"]["values"]) == 1
    assert {"torch", "avalanche-lib"} <= record["versions"].keys()
    for name in ("fig1.png", "fig2.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
    printed = capsys.readouterr().out
    assert "published" in printed
    assert all(text in printed for text in record["statements"])


def test_without_mnist_the_script_says_what_to_do(script, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(["--root", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert "MNIST is not in" in message
    assert "--smoke" in message
    assert not (tmp_path / "out").exists()


def test_a_statement_holds_only_where_every_seed_agrees(script):
    assert script.in_words([True, True]) == "holds"
    assert script.in_words([True, False]) == "holds in 1 of 2 seeds"
    assert script.in_words([False, False]) == "does not hold"


@pytest.mark.slow
@pytest.mark.data
def test_the_figures_on_mnist(script, mnist_root):
    record, _ = script.measure(script.Protocol(), (0, 1, 2, 3), str(mnist_root))
    print(script.table(record))

    for group in record["fig1"].values():
        measured = group["measured"]
        for what in ("input", "representation"):
            assert all(r < 0 for r in measured[f"r_{what}_different"]["values"])
            assert all(r > 0 for r in measured[f"r_{what}_same"]["values"])
        assert measured["r_representation_different"]["mean"] <= -0.7
        pairs = zip(
            measured["r_representation_different"]["values"],
            measured["r_input_different"]["values"],
            strict=True,
        )
        assert all(abs(representation) > abs(pixels) for representation, pixels in pairs)
    hard, easy = record["fig1"]["7,9"]["measured"], record["fig1"]["0,1"]["measured"]
    assert hard["accuracy"]["mean"] >= 0.97
    assert easy["accuracy"]["mean"] >= 0.998
    # One hard image among the 100 drawn breaks {0, 1}'s separability: not every draw has none.
    assert any(easy["separable"])
    assert min(easy["order"]["values"]) >= 0.999
    assert not any(hard["separable"])

    without = record["fig2"]["measured"]["without_drl"]
    with_drl = record["fig2"]["measured"]["with_drl"]

    def drop(name):
        return without[name]["mean"] - with_drl[name]["mean"]

    assert drop("representation_different") >= 0.1
    assert drop("representation_same") >= 0
    assert drop("sd_gradient_different") >= 0.2 * without["sd_gradient_different"]["mean"]
    assert drop("gradient_same") >= 0.05
