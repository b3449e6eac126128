"""Layers around a strategy's methods: their order, their copies, and what they leave behind."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest

from avalanche_ext.training.wrapping import can_wrap, unwrap, wrap


class Base:
    def __init__(self):
        self.calls = []

    def forward(self, *args, **kwargs):
        self.calls.append("base")
        return ("base", args, kwargs)


class Child(Base):
    def forward(self, *args, **kwargs):
        self.calls.append("child")
        return super().forward(*args, **kwargs)


class Layer:
    """A plugin whose bound method is the layer."""

    def __init__(self, name):
        self.name = name

    def around(self, strategy, inner, *args, **kwargs):
        strategy.calls.append(f"+{self.name}")
        result = inner(*args, **kwargs)
        strategy.calls.append(f"-{self.name}")
        return (self.name, result)


def double(strategy, inner):
    return inner(), inner()


@pytest.mark.parametrize("kind", [Base, Child])
@pytest.mark.parametrize("names", list(itertools.permutations("abc")))
def test_higher_orders_are_further_out_whatever_came_first(names, kind):
    orders = {"a": -1, "b": 0, "c": 5}
    strategy, layers = kind(), {n: Layer(n) for n in "abc"}
    for name in names:
        wrap(strategy, "forward", layers[name].around, order=orders[name])
    assert strategy.forward(1, k=2) == ("c", ("b", ("a", ("base", (1,), {"k": 2}))))
    own = ["child", "base"] if kind is Child else ["base"]
    assert strategy.calls == ["+c", "+b", "+a", *own, "-a", "-b", "-c"]
    for name in names[:-1]:
        unwrap(strategy, "forward", layers[name].around)
        assert "forward" in vars(strategy)
    assert strategy.forward() == (names[-1], ("base", (), {}))
    unwrap(strategy, "forward", layers[names[-1]].around)
    assert vars(strategy).keys() == {"calls"}
    assert strategy.forward() == ("base", (), {})


def test_equal_orders_keep_the_order_in_which_they_came():
    strategy, one, two = Base(), Layer("one"), Layer("two")
    wrap(strategy, "forward", one.around)
    wrap(strategy, "forward", two.around)
    assert strategy.forward() == ("two", ("one", ("base", (), {})))


@pytest.mark.parametrize("order", [0, 7])
def test_the_same_layer_is_added_once(order):
    strategy, layer = Base(), Layer("one")
    for _ in range(3):
        wrap(strategy, "forward", layer.around, order=order)
        wrap(strategy, "forward", double, order=-1)
    assert strategy.forward() == ("one", (("base", (), {}),) * 2)
    unwrap(strategy, "forward", layer.around)
    unwrap(strategy, "forward", double)
    assert vars(strategy).keys() == {"calls"}


def test_equal_layers_of_two_plugins_are_two():
    strategy = Base()
    wrap(strategy, "forward", Layer("one").around)
    wrap(strategy, "forward", Layer("one").around)
    assert strategy.forward() == ("one", ("one", ("base", (), {})))


def test_another_instance_and_the_class_stay_as_they_are():
    strategy, other = Base(), Base()
    wrap(strategy, "forward", Layer("one").around)
    assert vars(other).keys() == {"calls"}
    assert other.forward() == ("base", (), {})
    assert Base.__dict__["forward"] is Base.forward


def test_a_method_that_is_put_into_the_class_later_is_the_one_that_is_called():
    class Late(Base):
        pass

    strategy = Late()
    wrap(strategy, "forward", Layer("one").around)
    Late.forward = lambda self: "late"
    assert strategy.forward() == ("one", "late")


def test_a_method_that_was_replaced_on_the_instance_is_an_error():
    strategy = Base()
    strategy.forward = mine = lambda: 1
    assert not can_wrap(strategy, "forward")
    with pytest.raises(ValueError, match=r"strategy\.forward has been replaced by .*<lambda>"):
        wrap(strategy, "forward", double)
    unwrap(strategy, "forward", double)
    assert strategy.forward is mine


def test_what_can_be_wrapped():
    strategy = Base()
    assert can_wrap(strategy, "forward")
    wrap(strategy, "forward", double)
    assert can_wrap(strategy, "forward")


def test_taking_away_a_layer_that_is_not_there():
    strategy, layer = Base(), Layer("one")
    unwrap(strategy, "forward", double)
    assert vars(strategy).keys() == {"calls"}
    wrap(strategy, "forward", layer.around)
    unwrap(strategy, "forward", double)
    unwrap(strategy, "forward", Layer("one").around)
    assert strategy.forward() == ("one", ("base", (), {}))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_a_copy_refers_to_itself_and_to_its_own_plugins(clone):
    strategy, layer = Child(), Layer("one")
    strategy.plugins = [layer]
    wrap(strategy, "forward", layer.around)
    twin = clone(strategy)
    layer.name = "original"
    twin.plugins[0].name = "copied"
    assert twin.forward() == ("copied", ("base", (), {}))
    assert twin.calls == ["+copied", "child", "base", "-copied"]
    assert strategy.calls == []
    assert strategy.forward() == ("original", ("base", (), {}))
    unwrap(twin, "forward", layer.around)  # that of the original is not there
    assert "forward" in vars(twin)
    unwrap(twin, "forward", twin.plugins[0].around)
    assert vars(twin).keys() == {"calls", "plugins"}
    assert "forward" in vars(strategy)
