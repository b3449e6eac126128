"""The rules of the house, executed: who imports whom, what importing costs, how long files are."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import avalanche_ext

PACKAGE = Path(avalanche_ext.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
ORDER = ["functional", "models", "training", "evaluation", "benchmarks", "recipes", "catalog",
         "experiments", "cli"]  # fmt: skip
ALLOWED = {
    "functional": {"functional"},
    "models": {"functional", "models"},
    "training": {"functional", "models", "training"},
    "evaluation": {"functional", "models", "training", "evaluation"},
    "benchmarks": {"training", "benchmarks"},
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module


def layer_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_layer_imports_only_what_stands_before_it(path):
    layer = layer_of(path)
    if layer not in ORDER:
        return
    allowed = ALLOWED.get(layer, set(ORDER[: ORDER.index(layer) + 1]))
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "avalanche_ext" and len(parts) > 1:
            assert parts[1] in allowed, f"{layer} imports {name}"


@pytest.mark.parametrize("path", [p for p in FILES if layer_of(p) == "functional"],
                         ids=lambda p: p.name)  # fmt: skip
def test_functional_needs_torch_and_the_standard_library_alone(path):
    for name in imports(path):
        top = name.split(".")[0]
        assert top in {"torch", "avalanche_ext"} or top in sys.stdlib_module_names, name


@pytest.mark.parametrize("path", [p for p in FILES if p.parent.name == "plugins"],
                         ids=lambda p: p.name)  # fmt: skip
def test_no_method_imports_another_method(path):
    shared = {"avalanche_ext.training.plugins.replay_template"}
    for name in imports(path):
        assert not name.startswith("avalanche_ext.training.plugins.") or name in shared


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_file_holds_two_things(path):
    assert len(path.read_text("utf-8").splitlines()) <= 400
    assert path.stem not in {"utils", "misc", "helpers"}


def test_importing_the_package_loads_neither_torch_nor_avalanche():
    code = (
        "import sys, avalanche_ext, avalanche_ext.recipes, avalanche_ext.catalog, "
        "avalanche_ext.cli.main\n"
        "assert not {'torch', 'avalanche', 'numpy'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", [n for n in avalanche_ext.__all__ if n != "__version__"])
def test_every_public_name_loads_and_is_documented(name):
    assert getattr(avalanche_ext, name).__doc__
    assert name in dir(avalanche_ext)


def test_the_list_of_public_names_is_complete():
    assert sorted([*avalanche_ext._PUBLIC, "__version__"]) == sorted(avalanche_ext.__all__)


def test_an_unknown_name_says_what_there_is():
    with pytest.raises(AttributeError, match="DRLPlugin"):
        avalanche_ext.DRLPlugn  # noqa: B018
