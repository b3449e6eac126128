"""Projected steps against hand-worked values and slow float64 solutions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from avalanche_ext.functional.step_projection import (
    RowSpace,
    conv_rows,
    damped_step,
    linear_rows,
    project_step,
    row_space,
)

SHAPES = [(3, 7, 4), (7, 3, 4), (1, 5, 1), (6, 6, 2)]


def draw(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def bisected(rows, step, eps):
    """The nearest step by bisection on the multiplier, with a solve for each candidate."""
    eye = torch.eye(rows.shape[1], dtype=torch.float64)

    def at(mu):
        return torch.linalg.solve(eye + mu * rows.T @ rows, step)

    low, high = 0.0, 1.0
    while (rows @ at(high)).norm() > eps:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (rows @ at(middle)).norm() > eps else (low, middle)
    return at(high)


# by hand ----------------------------------------------------------------------------------------


def test_two_inputs_by_hand():
    rows, step = torch.tensor([[1.0, 0, 0], [0, 2, 0]]), torch.ones(3, 2)
    space = row_space(rows)
    assert torch.equal(project_step(step, space, 0.0), torch.tensor([[0.0, 0], [0, 0], [1, 1]]))
    damped = damped_step(step, space, 1.0)
    torch.testing.assert_close(damped, torch.tensor([[0.5, 0.5], [0.2, 0.2], [1, 1]]))
    assert float((rows @ damped).norm()) == pytest.approx(0.90554, abs=1e-5)
    torch.testing.assert_close(project_step(step, space, 0.905538513813742), damped)


def test_the_spectral_cut_by_hand():
    # A = diag(1, 2): sigma_1 is 2, so what lies in its rows is cut to eps / 2.
    rows = torch.tensor([[1.0, 0, 0], [0, 2, 0]])
    step = torch.tensor([[3.0, 0], [0, 0.25], [5, 5]])
    taken = project_step(step, row_space(rows), 1.0, norm="spectral")
    torch.testing.assert_close(taken, torch.tensor([[0.5, 0], [0, 0.25], [5, 5]]))


# against slow solutions -------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "d", "o"), SHAPES)
def test_no_change_is_the_projection_onto_the_null_space(n, d, o):
    rows, step = draw(n, d), draw(d, o, seed=1)
    taken = project_step(step, row_space(rows), 0.0)
    want = step - torch.linalg.pinv(rows) @ rows @ step
    torch.testing.assert_close(taken, want, rtol=0, atol=1e-10)
    assert float((rows @ taken).abs().max()) < 1e-10
    torch.testing.assert_close(project_step(taken, row_space(rows), 0.0), taken)


@pytest.mark.parametrize(("n", "d", "o"), SHAPES)
@pytest.mark.parametrize("mu", [0.0, 0.3, 50.0])
def test_the_ridge_form_is_a_linear_solve(n, d, o, mu):
    rows, step = draw(n, d), draw(d, o, seed=1)
    want = torch.linalg.solve(torch.eye(d, dtype=torch.float64) + mu * rows.T @ rows, step)
    torch.testing.assert_close(damped_step(step, row_space(rows), mu), want, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("n", "d", "o"), SHAPES)
@pytest.mark.parametrize("eps", [1e-6, 0.05, 1.0])
def test_the_bound_is_met_by_the_nearest_step(n, d, o, eps):
    rows, step = draw(n, d), draw(d, o, seed=1)
    taken = project_step(step, row_space(rows), eps)
    assert float((rows @ taken).norm()) == pytest.approx(eps, rel=1e-8)
    torch.testing.assert_close(taken, bisected(rows, step, eps), rtol=0, atol=1e-8)
    # Variational inequality: from the projection no feasible step lies in the step's direction.
    for seed in range(20):
        other = draw(d, o, seed=seed + 2)
        other = other * min(1.0, eps / float((rows @ other).norm()))
        assert float(((step - taken) * (other - taken)).sum()) < 1e-9


@pytest.mark.parametrize("eps", [1e-12, 1e-3, 1e3])
def test_sizes_that_differ_by_ten_thousand(eps):
    left, right = torch.linalg.qr(draw(9, 9))[0], torch.linalg.qr(draw(9, 9, seed=1))[0]
    rows = left @ torch.diag(torch.logspace(4, 0, 9, dtype=torch.float64)) @ right
    step = 10 * draw(9, 3, seed=2)
    taken = project_step(step, row_space(rows), eps)
    # Squared sizes span 1e8, which leaves half of float64's digits to the smallest direction.
    rounding = 1e-11 * float((rows @ step).norm())
    assert float((rows @ taken).norm()) == pytest.approx(eps, rel=1e-8, abs=rounding)


@pytest.mark.parametrize("eps", [0.01, 0.5])
def test_the_spectral_form_keeps_its_bound_and_shortens_the_step(eps):
    rows, step = draw(4, 7), draw(7, 5, seed=1)
    taken = project_step(step, row_space(rows), eps, norm="spectral")
    assert float(torch.linalg.matrix_norm(rows @ taken, 2)) <= eps * (1 + 1e-9)
    assert float(taken.norm()) < float(step.norm())
    values = torch.linalg.svdvals(row_space(rows).directions.mT @ taken)
    assert float(values[0]) == pytest.approx(eps / float(torch.linalg.svdvals(rows)[0]), rel=1e-9)
    no_change = project_step(step, row_space(rows), 0.0)
    away = torch.linalg.pinv(rows) @ rows
    torch.testing.assert_close(taken - away @ taken, no_change)  # what changes nothing stays


@pytest.mark.parametrize("norm", ["frobenius", "spectral"])
def test_a_step_within_the_bound_is_returned_as_it_is(norm):
    rows, step = draw(4, 7), draw(7, 5, seed=1)
    change = rows @ step
    size = change.norm() if norm == "frobenius" else torch.linalg.matrix_norm(change, 2)
    above, below = float(size) * (1 + 1e-6), float(size) * (1 - 1e-6)
    assert project_step(step, row_space(rows), above, norm=norm) is step
    assert project_step(step, row_space(rows), below, norm=norm) is not step
    assert project_step(step, row_space(rows), math.inf, norm=norm) is step


# row spaces -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "d"), [(3, 7), (7, 3)])
def test_directions_and_sizes_are_those_of_the_singular_values(n, d):
    rows = draw(n, d)
    directions, sizes = row_space(rows)
    torch.testing.assert_close(sizes.sort(descending=True)[0], torch.linalg.svdvals(rows))
    torch.testing.assert_close(directions @ torch.diag(sizes**2) @ directions.mT, rows.T @ rows)


def test_repeated_inputs_count_once():
    rows = draw(2, 6)
    twice = torch.cat([rows, rows, 2 * rows[:1]])
    assert int((row_space(twice).sizes > 0).sum()) == 2
    step = draw(6, 3, seed=1)
    want = project_step(step, row_space(rows), 0.0)
    torch.testing.assert_close(project_step(step, row_space(twice), 0.0), want)


def test_a_direction_below_the_cutoff_is_no_constraint():
    rows = torch.diag(torch.tensor([1.0, 1e-4, 1e-7], dtype=torch.float64))
    space = row_space(rows)
    assert sorted(space.sizes.tolist()) == pytest.approx([0.0, 1e-4, 1.0])
    taken = project_step(torch.ones(3, 1, dtype=torch.float64), space, 0.0)
    torch.testing.assert_close(taken[:, 0], torch.tensor([0, 0, 1.0], dtype=torch.float64))
    assert int((row_space(rows, cutoff=1e-8).sizes > 0).sum()) == 3


@pytest.mark.parametrize("norm", ["frobenius", "spectral"])
@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_inputs_of_zero_constrain_nothing(norm, eps):
    step = draw(5, 2)
    taken = project_step(step, row_space(torch.zeros(3, 5)), eps, norm=norm)
    assert torch.equal(taken, step)


def test_blocks_are_constrained_together():
    rows, step = draw(2, 3, 5), draw(2, 5, 4, seed=1)
    taken = project_step(step, row_space(rows), 0.2)
    joined = torch.block_diag(*rows)
    want = bisected(joined, torch.block_diag(*step), 0.2)
    torch.testing.assert_close(torch.block_diag(*taken), want, rtol=0, atol=1e-8)
    cut = project_step(step, row_space(rows), 0.2, norm="spectral")
    for block in range(2):
        alone = project_step(step[block], row_space(rows[block]), 0.2, norm="spectral")
        torch.testing.assert_close(cut[block], alone)


def test_more_rows_than_are_taken_at_once():
    rows = draw(20_000, 3)
    torch.testing.assert_close(
        row_space(rows).sizes.sort(descending=True)[0], torch.linalg.svdvals(rows)
    )


@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_float32_under_autocast_is_as_exact_as_without(eps):
    rows, step = draw(4, 9).float(), draw(9, 3, seed=1).float()
    plain = project_step(step, row_space(rows), eps)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = project_step(step, row_space(rows), eps)
    assert torch.equal(mixed, plain)
    assert plain.dtype == torch.float32


# inputs of layers -------------------------------------------------------------------------------


def test_rows_of_a_linear_layer():
    layer, x = nn.Linear(3, 2), draw(4, 5, 3).float()
    with torch.no_grad():
        whole = torch.cat([layer.weight.T, layer.bias[None]])
        torch.testing.assert_close((linear_rows(x) @ whole)[0], layer(x).flatten(0, 1))
    assert torch.equal(linear_rows(x, bias=False)[0], x.flatten(0, 1))
    assert torch.equal(linear_rows(x, weight=False)[0], torch.ones(20, 1))


@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_size": 3},
        {"kernel_size": (3, 2), "stride": (2, 1), "dilation": (1, 2)},
        {"kernel_size": 1, "groups": 2},
        {"kernel_size": 3, "groups": 4, "stride": 2},
    ],
)
def test_rows_of_a_convolution(settings):
    torch.manual_seed(0)
    layer, x = nn.Conv2d(4, 8, **settings), torch.randn(3, 4, 7, 6)
    rows = conv_rows(
        x, layer.kernel_size, stride=layer.stride, dilation=layer.dilation, groups=layer.groups
    )
    weight = layer.weight.unflatten(0, (layer.groups, -1)).flatten(2)
    whole = torch.cat([weight.mT, layer.bias.view(layer.groups, 1, -1)], dim=1)
    outputs = (rows @ whole).permute(0, 2, 1).flatten(0, 1)  # channels, then samples and positions
    torch.testing.assert_close(outputs, layer(x).transpose(0, 1).flatten(1), rtol=0, atol=1e-5)


def test_a_projected_step_of_a_convolution_leaves_its_output():
    torch.manual_seed(0)
    x, weight = torch.randn(1, 4, 5, 5), torch.randn(6, 2, 3, 3)
    rows = conv_rows(x, (3, 3), stride=(2, 2), dilation=(1, 1), groups=2, bias=False)
    step = torch.randn(6, 2, 3, 3)
    blocks = step.reshape(2, 3, -1).mT
    taken = project_step(blocks, row_space(rows), 0.0).mT.reshape(step.shape)
    before, after = (F.conv2d(x, w, stride=2, groups=2) for w in (weight, weight + 100 * taken))
    torch.testing.assert_close(after, before, rtol=0, atol=1e-3)
    assert float(taken.norm()) > 0.5 * float(step.norm())


# errors -----------------------------------------------------------------------------------------


def test_bad_arguments():
    space = row_space(draw(2, 3))
    for eps in (-1.0, math.nan):
        with pytest.raises(ValueError, match=r"eps >= 0.*got (-1|nan)"):
            project_step(draw(3, 1), space, eps)
    with pytest.raises(ValueError, match="'nuclear'"):
        project_step(draw(3, 1), space, 0.1, norm="nuclear")
    with pytest.raises(ValueError, match=r"\(0, 3\)"):
        row_space(draw(0, 3))
    with pytest.raises(ValueError, match="finite"):
        row_space(torch.tensor([[1.0, math.inf]]))
    assert isinstance(space, RowSpace)
