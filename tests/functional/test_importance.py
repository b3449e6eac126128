"""The anchor's term, per-sample gradients and path scores against values worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from avalanche_ext.functional.importance import (
    anchor_term,
    grown,
    largest_to_one,
    path_importance,
    path_score,
    per_sample_sums,
    quantiles,
    sampled_labels,
)


def doubles(*shapes):
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


# the term ---------------------------------------------------------------------------------------


def test_the_term_of_three_numbers():
    value, pulls = anchor_term(
        [torch.tensor([1.0, 2.0]), torch.tensor([[3.0]])],
        [torch.tensor([0.0, 5.0]), torch.tensor([[1.0]])],
        [torch.tensor([4.0, 2.0]), torch.tensor([[0.5]])],
    )
    assert float(value) == 4 * 1 + 2 * 9 + 0.5 * 4
    assert [p.tolist() for p in pulls] == [[4.0, -6.0], [[1.0]]]


def test_the_pull_is_half_of_autograds_gradient():
    shapes = [(3, 4), (4,), (2, 3, 2, 2)]
    parameters, anchors = doubles(*shapes), doubles(*shapes)
    parameters = [p.requires_grad_() for p in parameters]
    importances = [t.abs() for t in doubles(*shapes)]
    triples = zip(parameters, anchors, importances, strict=True)
    want = sum((w * (p - a) ** 2).sum() for p, a, w in triples)
    gradients = torch.autograd.grad(want, parameters)
    value, pulls = anchor_term(parameters, anchors, importances)
    torch.testing.assert_close(value, want.detach())
    assert not value.requires_grad
    for pull, gradient in zip(pulls, gradients, strict=True):
        torch.testing.assert_close(2 * pull, gradient)


def test_what_a_tensor_has_gained_is_zero():
    old = torch.arange(1.0, 7).view(2, 3)
    wide = grown(old, torch.ones(4, 5, dtype=torch.float64))
    assert wide.dtype == torch.float64
    assert torch.equal(wide[:2, :3], old.double())
    assert float(wide.sum()) == 21
    assert grown(old, torch.zeros(2, 3)) is old


@pytest.mark.parametrize("shape", [(1, 3), (2, 2), (6,), (2, 3, 1)])
def test_a_tensor_may_not_shrink(shape):
    with pytest.raises(ValueError, match=r"contains \(2, 3\)"):
        grown(torch.zeros(2, 3), torch.zeros(shape))


def test_quantiles_are_those_of_all_numbers_together():
    parts = [torch.randn(7, 3), torch.randn(20), torch.randn(())]
    q = [0.0, 0.13, 0.5, 0.999, 1.0]
    together = torch.cat([p.flatten() for p in parts]).double()
    want = torch.quantile(together, torch.tensor(q, dtype=torch.float64))
    assert quantiles(parts, q) == pytest.approx(want.tolist(), rel=1e-6)
    assert quantiles([torch.tensor([3.0])], [0.2]) == [3.0]


# on data ----------------------------------------------------------------------------------------


def test_labels_are_drawn_with_the_softmaxs_probabilities():
    p = torch.tensor([0.0, 0.1, 0.25, 0.65, 0.0])
    uniform = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    labels = sampled_labels(p.log().expand(1000, 5), uniform)
    assert labels.bincount(minlength=5).tolist() == [0, 100, 250, 650, 0]


def test_a_label_without_probability_is_never_drawn():
    edges = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    masked = torch.tensor([[-1000.0, 1.0, 1.3, -1000.0]]).expand(2, 4)
    assert sampled_labels(masked, edges).tolist() == [1, 2]


@pytest.fixture
def linear():
    """A linear softmax classifier in float64, samples and labels."""
    model = nn.Linear(4, 3).double()
    x, y = torch.randn(11, 4, dtype=torch.float64), torch.randint(3, (11,))

    def objective(parameters, sample, label):
        return F.cross_entropy(functional_call(model, parameters, (sample,)), label)

    return model, x, y, objective


@pytest.mark.parametrize("chunk", [0, 1, 4, 50])
def test_squares_of_a_softmax_classifiers_gradients_in_closed_form(linear, chunk):
    model, x, y, objective = linear
    sums = per_sample_sums(
        objective, dict(model.named_parameters()), [x, y], of=torch.square, chunk=chunk
    )
    error = torch.softmax(model(x), 1).detach() - F.one_hot(y, 3)
    torch.testing.assert_close(sums["weight"], (error**2).T @ x**2)
    torch.testing.assert_close(sums["bias"], (error**2).sum(0))


@pytest.mark.parametrize("chunk", [0, 4])
def test_absolute_values_are_taken_per_sample(linear, chunk):
    model, x, _, _ = linear
    sums = per_sample_sums(
        lambda p, sample: functional_call(model, p, (sample,)).square().sum(),
        dict(model.named_parameters()), [x], of=torch.abs, chunk=chunk,
    )  # fmt: skip
    torch.testing.assert_close(sums["weight"], 2 * model(x).abs().T.detach() @ x.abs())


@pytest.mark.parametrize("chunk", [0, 4])
def test_a_parameter_out_of_reach_has_zero_and_gradients_stay_as_they_were(linear, chunk):
    model, x, y, objective = linear
    parameters = {**dict(model.named_parameters()), "other": nn.Parameter(torch.ones(2))}
    sums = per_sample_sums(objective, parameters, [x, y], of=torch.square, chunk=chunk)
    assert sums["other"].tolist() == [0, 0]
    assert all(p.grad is None for p in parameters.values())
    assert not any(total.requires_grad for total in sums.values())


# along the way ----------------------------------------------------------------------------------


def test_path_importance_by_hand():
    drop, moved = torch.tensor([0.6, -0.6, 0.0, 2.0]), torch.tensor([1.0, 1.0, 3.0, 0.0])
    got = path_importance(drop, moved, 0.5)
    torch.testing.assert_close(got, torch.tensor([0.4, 0.0, 0.0, 4.0]))


def test_path_score_by_hand():
    drop, moved = torch.tensor([3.0, -3.0, 1.0]), torch.tensor([2.0, 2.0, 0.0])
    got = path_score(drop, moved, torch.tensor([0.5, 0.5, 7.0]), 0.5)
    torch.testing.assert_close(got, torch.tensor([2.0, 0.0, 2.0]))


def test_the_score_of_newtons_step_is_two():
    # On a parabola a t^2 / 2 the step is -t: to first order a t^2 off the loss, over a t^2 / 2.
    a, theta = 3.0, torch.tensor([0.7])
    score = path_score(a * theta * theta, -theta, torch.tensor([a]), 1e-9)
    torch.testing.assert_close(score, torch.tensor([2.0]))


def test_the_largest_of_all_becomes_one():
    got = largest_to_one({"a": torch.tensor([1.0, 4.0]), "b": torch.tensor([[2.0]])})
    assert got["a"].tolist() == [0.25, 1.0]
    assert got["b"].tolist() == [[0.5]]
    assert largest_to_one({"a": torch.zeros(2)})["a"].tolist() == [0, 0]
    assert largest_to_one({}) == {}
