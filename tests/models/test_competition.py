"""Maxout and winner-takes-all blocks, by hand."""

from __future__ import annotations

import pytest
import torch

from avalanche_ext.models.competition import LWTA, CompetitiveMLP, Maxout

H = torch.tensor([[-1.0, -3, 2, 2]])


def test_the_worked_example():
    assert LWTA(2)(H).tolist() == [[-1, 0, 2, 0]]
    assert Maxout(2)(H).tolist() == [[-1, 2]]


@pytest.mark.parametrize(("layer", "want"), [(LWTA(2), [1, 0, 1, 0]), (Maxout(2), [1, 0, 1, 0])])
def test_only_winners_get_a_gradient_and_the_first_of_equals_wins(layer, want):
    h = H.clone().requires_grad_()
    layer(h).sum().backward()
    assert h.grad.tolist() == [want]


def test_losers_are_zero_whatever_they_were():
    h = torch.tensor([[float("-inf"), 1.0, -5.0, -2.0]])
    out = LWTA(2)(h)
    assert out.tolist() == [[0, 1, 0, -2]]
    assert not torch.signbit(out[0, [0, 2]]).any()


@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_blocks_of_channels_at_each_position(k):
    h = torch.randn(4, 6, 2, 3)
    maxout, lwta = Maxout(k)(h), LWTA(k)(h)
    assert maxout.shape == (4, 6 // k, 2, 3)
    for block in range(6 // k):
        part = h[:, block * k : (block + 1) * k]
        torch.testing.assert_close(maxout[:, block], part.amax(1))
        kept = lwta[:, block * k : (block + 1) * k]
        assert torch.equal(kept, torch.where(part == part.amax(1, keepdim=True), part, 0.0))
    if k == 1:
        assert torch.equal(lwta, h)


@pytest.mark.parametrize("kind", [Maxout, LWTA])
def test_widths_that_do_not_divide_are_refused(kind):
    with pytest.raises(ValueError, match=rf"{kind.__name__}\(k=4\).*multiple of 4.*\(2, 6\)"):
        kind(4)(torch.zeros(2, 6))
    with pytest.raises(ValueError, match="k >= 1; got 0"):
        kind(0)
    for k in (True, 2.0):
        with pytest.raises(TypeError, match="a whole number k"):
            kind(k)
    assert repr(kind(3)) == f"{kind.__name__}(k=3)"


def test_the_released_maxout_network():
    net = CompetitiveMLP(784, (256, 128), 10)
    shapes = [tuple(p.shape) for p in net.parameters() if p.ndim == 2]
    assert shapes == [(256, 784), (128, 128), (10, 64)]
    assert net(torch.randn(5, 1, 28, 28)).shape == (5, 10)
    assert net.num_features == 64


def test_winner_takes_all_keeps_the_width():
    net = CompetitiveMLP(8, (6, 4), 3, activation="lwta")
    x = torch.randn(7, 8)
    want = x
    for layer in (net.features[0], net.features[2]):
        h = layer(want)
        pairs = h.unflatten(1, (-1, 2))
        want = torch.where(pairs == pairs.amax(2, keepdim=True), pairs, 0.0).flatten(1)
    torch.testing.assert_close(net(x), net.classifier(want))
    assert ((net.features(x) != 0).sum(1) == 2).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((8, (5,), 3), r"multiples of k >= 1; got k=2, 8, \[5\]"),
        ((8, (), 3), "positive widths"),
        ((8, (4,), 0), "0 classes"),
        ((0, (4,), 3), "positive widths"),
    ],
)
def test_bad_widths(arguments, message):
    with pytest.raises(ValueError, match=message):
        CompetitiveMLP(*arguments)
    with pytest.raises(ValueError, match="'maxout' or 'lwta'; got 'relu'"):
        CompetitiveMLP(8, (4,), 3, activation="relu")
