"""What a sweep varies: how it is written, and what is refused before anything starts."""

from __future__ import annotations

import pytest

from avalanche_ext.experiments.search_space import (
    distribution,
    examples,
    grid_points,
    parse_axis,
    split_values,
)
from avalanche_ext.experiments.sweep import Sweep


def test_values_are_read():
    assert split_values("1e-4,1e-3") == ("1e-4", "1e-3")
    assert split_values("[100, 100],[64]") == ("[100, 100]", "[64]")
    assert parse_axis("--grid", "hidden=[4, 4]") == ("hidden", "[4, 4]")
    assert grid_points({"a": ("1", "2"), "b": ("x",)}) == [
        {"a": "1", "b": "x"},
        {"a": "2", "b": "x"},
    ]
    assert examples("lam", "loguniform:1e-5:1e-2") == ["1e-05", "0.01"]
    assert examples("mode", "choice:per_group,balanced") == ["per_group", "balanced"]
    log = distribution("lam", "loguniform:1e-5:1e-2")
    assert (log.low, log.high, log.log) == (1e-5, 1e-2, True)
    whole = distribution("mem", "logint:1:64")
    assert (whole.low, whole.high, whole.log) == (1, 64, True)
    assert not distribution("lr", "uniform:0:1").log


def search(trials=1, **spec):
    return {"grid": {}, "search": spec, "trials": trials}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": {}}, "expects a grid or a search; give one"),
        ({"search": {"lr": "uniform:0:1"}}, "expects a grid or a search; give one"),
        (search(None, lr="uniform:0:1"), "a search expects trials >= 1; got trials=None"),
        ({"trials": 3}, r"as many trials as points \(1\); got trials=3"),
        ({"settings": {"mem": "1"}}, r"\['mem'\] are both set and varied"),
        ({"grid": {"lamb": ("1",)}}, r"no field 'lamb'. Close: lam"),
        ({"grid": {"mem": ("5", "many")}}, "'mem' expects int; got 'many'"),
        (search(lr="normal:0:1"), r"lr= expects uniform:LOW:HIGH.*got 'normal:0:1'"),
        (search(lr="uniform:1:0"), r"with LOW < HIGH.*got 'uniform:1:0'"),
        (search(lr="loguniform:0:1"), "LOW > 0 for the logarithmic"),
        (search(mem="int:1:2.5"), r"got 'int:1:2.5'"),
        (search(mem="uniform:1:2"), r"'mem' expects int; got '1.0'"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_before_it_starts(changes, message):
    settings = {"recipe": "er/split_digits", "grid": {"mem": ("5",)}, **changes}
    with pytest.raises(ValueError, match=message):
        Sweep(**settings)
