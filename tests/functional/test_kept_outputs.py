"""Drift of outputs and the gradient of a step's effect, against hand-worked values."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from avalanche_ext.functional.kept_outputs import lookahead_gradient, output_drift


def double(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


# drift ------------------------------------------------------------------------------------------


def test_squared_distance_by_hand():
    outputs, targets = torch.tensor([[1.0, 2], [0, 0]]), torch.tensor([[0.0, 0], [0, 4]])
    assert float(output_drift(outputs, targets)) == (5 + 16) / 2
    assert float(output_drift(outputs[:, None], targets[:, None])) == (5 + 16) / 2


def test_divergence_by_hand():
    # At T = 2, logits (2, 0) have probabilities (0.7311, 0.2689) and entropy 0.58220.
    targets, outputs = torch.tensor([[2.0, 0.0]]), torch.zeros(1, 2)
    want = 4 * (0.6931472 - 0.5822031)
    assert float(output_drift(outputs, targets, 2.0)) == pytest.approx(want, rel=1e-5)
    z, y = double(5, 4), double(5, 4, seed=1)
    p, q = (y / 3).softmax(1), (z / 3).softmax(1)
    want = 9 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(output_drift(z, y, 3.0), want)


@pytest.mark.parametrize("temperature", [None, 2.0])
def test_no_drift_has_no_gradient(temperature):
    z = double(3, 4).requires_grad_()
    drift = output_drift(z, z.detach(), temperature)
    drift.backward()
    assert abs(drift.item()) < 1e-15
    assert float(z.grad.abs().max()) < 1e-15


@pytest.mark.parametrize("temperature", [None, 2.0])
def test_masked_units_do_not_count(temperature):
    z, y = double(3, 2), double(3, 2, seed=1)
    mask = torch.full((3, 2), -1000.0, dtype=torch.float64)
    wide = output_drift(torch.cat([z, mask], 1), torch.cat([y, mask], 1), temperature)
    torch.testing.assert_close(wide, output_drift(z, y, temperature))


@pytest.mark.parametrize("temperature", [None, 0.5, 2.0])
def test_gradient_of_the_drift(temperature):
    z, y = double(3, 4).requires_grad_(), double(3, 4, seed=1)
    assert torch.autograd.gradcheck(lambda z: output_drift(z, y, temperature), z)


def test_outputs_of_another_shape_are_an_error():
    with pytest.raises(ValueError, match=r"\(3, 4\) and \(3, 5\)"):
        output_drift(double(3, 4), double(3, 5))


# look-ahead -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "gradient"),
    [
        ("second_order", [-0.18, -0.20]),
        ("first_order", [-0.20, -0.20]),
        ("moving", [0.02, 0.0]),
    ],
)
def test_a_linear_model_by_hand(form, gradient):
    # Current input (1, 0), target 0; input to keep (1, 1); at (1, 0) with rate 0.1.
    current, kept = torch.tensor([1.0, 0.0]), torch.tensor([[1.0, 1.0]])
    theta = torch.tensor([1.0, 0.0], requires_grad=True)
    value, found = lookahead_gradient(
        lambda p: 0.5 * (current @ p["theta"]) ** 2,
        lambda p: (kept @ p["theta"])[:, None],
        {"theta": theta}, {"theta": 0.1}, target=torch.ones(1, 1), form=form,
    )  # fmt: skip
    assert float(value) == pytest.approx(0.01)
    assert found["theta"].tolist() == pytest.approx(gradient)
    assert theta.grad is None
    assert not value.requires_grad


def network(p, x):
    return torch.tanh(x @ p["first"]) @ p["second"]


def problem():
    p = {"first": double(3, 4), "second": double(4, 2, seed=1)}
    x, kept, target = double(5, 3, seed=2), double(6, 3, seed=3), double(6, 2, seed=4)
    y = torch.tensor([0, 1, 0, 1, 1])
    rates = {"first": 0.3, "second": 0.7}
    return p, rates, (lambda q: F.cross_entropy(network(q, x), y)), kept, target


@pytest.mark.parametrize("form", ["second_order", "moving"])
def test_the_gradient_is_the_finite_difference_of_the_objective(form):
    p, rates, loss, kept, target = problem()

    def objective(values):
        values = {k: v.clone().requires_grad_() for k, v in values.items()}
        slopes = torch.autograd.grad(loss(values), list(values.values()))
        ahead = {k: values[k] - rates[k] * s for k, s in zip(values, slopes, strict=True)}
        anchor = target if form == "second_order" else network(values, kept)
        return float((network(ahead, kept) - anchor).square().sum(1).mean().detach())

    leaves = {k: v.clone().requires_grad_() for k, v in p.items()}
    value, found = lookahead_gradient(
        loss, lambda q: network(q, kept), leaves, rates, target=target, form=form
    )
    assert float(value) == pytest.approx(objective(p), rel=1e-12)
    for name in p:
        for k in range(p[name].numel()):
            shift = torch.zeros_like(p[name])
            shift.view(-1)[k] = 1e-5
            up, down = (objective({**p, name: p[name] + s}) for s in (shift, -shift))
            assert float(found[name].flatten()[k]) == pytest.approx((up - down) / 2e-5, abs=1e-7)


def test_first_order_is_the_drifts_gradient_at_the_place_ahead():
    p, rates, loss, kept, target = problem()
    leaves = {k: v.clone().requires_grad_() for k, v in p.items()}
    slopes = torch.autograd.grad(loss(leaves), list(leaves.values()))
    ahead = {k: (p[k] - rates[k] * s).requires_grad_() for k, s in zip(p, slopes, strict=True)}
    want = torch.autograd.grad(output_drift(network(ahead, kept), target), list(ahead.values()))
    _, found = lookahead_gradient(
        loss, lambda q: network(q, kept), leaves, rates, target=target, form="first_order"
    )
    torch.testing.assert_close(list(found.values()), list(want))


def test_a_parameter_that_only_one_side_uses():
    # The current loss knows nothing of ``kept``, and the kept outputs nothing of ``current``.
    p = {name: torch.tensor([2.0], requires_grad=True) for name in ("shared", "current", "kept")}
    value, found = lookahead_gradient(
        lambda q: (q["shared"] * q["current"]).sum(),
        lambda q: (q["shared"] + q["kept"])[None],
        p, dict.fromkeys(p, 0.5), target=torch.tensor([[4.0]]), form="first_order",
    )  # fmt: skip
    # shared steps by -0.5 * 2, kept stays: outputs are 3 instead of 4.
    assert float(value) == 1.0
    assert found["shared"].tolist() == found["kept"].tolist() == [-2.0]
    assert "current" not in found


def test_outputs_that_nothing_trained_has_a_part_in():
    p = {"theta": torch.tensor([2.0], requires_grad=True)}
    value, found = lookahead_gradient(
        lambda q: q["theta"].sum(), lambda q: torch.ones(2, 1), p, {"theta": 0.5},
        target=torch.zeros(2, 1), form="second_order",
    )  # fmt: skip
    assert float(value) == 1.0
    assert found == {}
