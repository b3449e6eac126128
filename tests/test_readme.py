"""What README shows is what is: its code runs, its tables follow from the records."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

from avalanche_ext.catalog import CATALOG
from avalanche_ext.cli.main import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")


def test_every_table_follows_from_its_record():
    filled = runpy.run_path(str(ROOT / "examples" / "update_readme.py"))["filled"]
    assert filled(README) == README


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL))
def test_python_code_runs(code, capsys):
    exec(compile(code, "README.md", "exec"), {})


def test_the_method_table_is_the_catalog():
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| .+ \| (.+?) \|$", README, flags=re.MULTILINE)
    assert rows == [
        (key, card.summary, "here" if card.ours else "Avalanche") for key, card in CATALOG.items()
    ]


def test_every_command_is_understood(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"avalanche-ext ((?:run|doctor|sweep)[^`#\n]*)", README)
    commands = [words for command in commands if len(words := command.split()) > 1]
    assert len(commands) >= 10  # list, card and report are tested by themselves
    for words in commands:
        with pytest.raises(SystemExit) as stop:
            main([*words, "--help"])
        assert stop.value.code == 0
        from avalanche_ext.recipes import find_recipe

        if not words[1].startswith("--"):
            assert find_recipe(words[1]).name == words[1]


@pytest.mark.parametrize(
    "script", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name
)
def test_every_example_runs_with_smoke(script, tmp_path, monkeypatch, capsys):
    if script.name == "update_readme.py":
        return  # it writes README; what it would write is compared above
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script), "--smoke", "--out", str(tmp_path / "out")])
    runpy.run_path(str(script), run_name="__main__")
    assert list((tmp_path / "out").rglob("*.json"))
