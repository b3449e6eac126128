"""Channel masks: closed forms worked by hand, slow oracles in Python floats, gradients."""

from __future__ import annotations

import math

import pytest
import torch

from avalanche_ext.functional.channel_mask import (
    ambiguous_share,
    anneal,
    compensate_hat,
    compensation_factor,
    gate,
    hard_gate,
    hat_gradient_mask,
    hat_sparsity,
    sparsity_loss,
    weight_counts,
)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def gradient(e, s, upstream, compensation, **kwargs):
    e = torch.tensor(e, requires_grad=True)
    gate(e, s, compensation, **kwargs).backward(torch.tensor(upstream))
    return e.grad


# the scale ------------------------------------------------------------------------------------


def test_the_scale_grows_in_equal_steps_from_its_inverse():
    values = [anneal(b, 5, 10.0) for b in range(1, 6)]
    assert values == pytest.approx([0.1, 2.575, 5.05, 7.525, 10.0], abs=1e-12)
    assert values[-1] == 10.0


def test_the_scale_of_a_single_batch_is_the_largest():
    assert anneal(1, 1, 400.0) == 400.0


@pytest.mark.parametrize(("batch", "batches", "s_max", "match"), [
    (0, 5, 10, "0 of 5"), (6, 5, 10, "6 of 5"), (1, 0, 10, "1 of 0"), (1, 5, 0, "s_max > 0"),
    (1, 5, math.inf, "finite"), (1, 5, math.nan, "finite"),
])  # fmt: skip
def test_a_scale_outside_the_epoch_is_an_error(batch, batches, s_max, match):
    with pytest.raises(ValueError, match=match):
        anneal(batch, batches, s_max)


# gates ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("e", "s", "factor"), [
    (0.0, 10.0, 0.1), (0.5, 10.0, 3.5349234), (1.0, 10.0, 433.10593), (0.5, 0.1, 9.4060248),
])  # fmt: skip
def test_the_compensation_factor_in_numbers(e, s, factor):
    both = compensation_factor(torch.tensor([e, -e], dtype=torch.float64), s)
    assert both.tolist() == pytest.approx([factor, factor], rel=1e-7)
    slopes = sigmoid(e) * sigmoid(-e), s * sigmoid(s * e) * sigmoid(-s * e)
    assert both[0].item() == pytest.approx(slopes[0] / slopes[1], rel=1e-9)


def test_hats_compensation_is_the_factor_times_s_max_up_to_its_clamp():
    e, grad = torch.tensor([-1.0, 0.5, 0.0]).double(), torch.tensor([2.0, 1.0, -3.0]).double()
    ours = compensate_hat(grad, e, 10.0, 25.0)
    torch.testing.assert_close(ours, 25 * grad * compensation_factor(e, 10.0))
    clamped = compensate_hat(torch.ones(1).double(), torch.tensor([2.0]).double(), 400.0, 400.0)
    assert clamped.item() == pytest.approx((math.cosh(50) + 1) / (math.cosh(2) + 1), rel=1e-12)
    assert compensate_hat(torch.ones(1), torch.tensor([6.0]), 400.0, 400.0).isfinite().all()


@pytest.mark.parametrize("compensation", ["exact", "hat", "none"])
@pytest.mark.parametrize("s", [0.01, 1.0, 10.0, 400.0])
def test_the_value_is_the_sigmoid_to_the_last_bit(compensation, s):
    e = torch.linspace(-6, 6, 101)
    assert torch.equal(gate(e, s, compensation), torch.sigmoid(s * e))
    assert torch.equal(gate(e, torch.tensor(s), compensation), torch.sigmoid(s * e))


def test_the_compensated_gradient_in_numbers():
    grad = gradient([-1.0, 0.0, 0.5, 2.0], 10.0, [1.0, 2.0, 3.0, 4.0], "exact")
    assert grad.tolist() == pytest.approx([0.1966119, 0.5, 0.7050111, 0.4199743], rel=1e-6)


@pytest.mark.parametrize("s", [0.01, 3.0, 400.0])
def test_the_compensated_gradient_does_not_depend_on_the_scale(s):
    e = torch.linspace(-6, 6, 25).tolist()
    expected = [sigmoid(x) * sigmoid(-x) for x in e]
    assert gradient(e, s, [1.0] * 25, "exact").tolist() == pytest.approx(expected, rel=1e-4)


def test_hats_form_is_the_same_until_float32_rounds_the_gate_to_one():
    args = [-1.0, 0.0, 0.5, 2.0], 10.0, [1.0, 2.0, 3.0, 4.0]
    grad = gradient(*args, "hat", s_max=7.0).tolist()
    expected = [7 * g for g in (0.1966119, 0.5, 0.7050111)]
    assert grad[:3] == pytest.approx(expected, rel=1e-3)
    assert grad[3] == 0  # s e = 20
    by_hand = gradient(*args, "none")
    by_hand = compensate_hat(by_hand, torch.tensor(args[0]), 10.0, 7.0)
    assert grad == pytest.approx(by_hand.tolist(), rel=1e-6)


def test_without_compensation_the_gradient_is_the_derivative():
    e = torch.linspace(-1, 1, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gate(x, 3.0, "none"), e)


def test_with_a_scale_of_one_all_compensations_agree():
    e, up = [-2.0, 0.3, 1.0], [1.0, -2.0, 0.5]
    plain = gradient(e, 1.0, up, "none")
    torch.testing.assert_close(gradient(e, 1.0, up, "exact"), plain)
    torch.testing.assert_close(gradient(e, 1.0, up, "hat"), plain)
    value = torch.tensor(e, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gate(x, 1.0, "exact"), value)


@pytest.mark.parametrize("compensation", ["exact", "hat", "none"])
def test_half_precision_does_not_round_gates(compensation):
    e = torch.tensor([0.75, -0.75], dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        m = gate(e, torch.tensor(10.0, dtype=torch.bfloat16), compensation)
    assert m.dtype == torch.float32
    assert m.tolist() == pytest.approx([sigmoid(7.5), sigmoid(-7.5)], rel=1e-6)
    assert torch.tensor(sigmoid(7.5)).bfloat16() == 1  # what would have come out


def test_the_scale_gets_no_gradient():
    s = torch.tensor(3.0, requires_grad=True)
    for compensation in ("exact", "hat", "none"):
        m = gate(torch.ones(2, requires_grad=True), s, compensation)
        assert torch.autograd.grad(m.sum(), s, allow_unused=True) == (None,)


def test_an_unknown_compensation_is_an_error():
    with pytest.raises(ValueError, match=r"'exact', 'hat', 'none'.*'full'"):
        gate(torch.zeros(2), 1.0, "full")


def test_hard_gates_open_at_zero():
    e = torch.tensor([-1.0, -1e-9, 0.0, 3.0], requires_grad=True)
    m = hard_gate(e)
    assert m.tolist() == [0, 0, 1, 1]
    assert not m.requires_grad
    torch.testing.assert_close(gate(torch.tensor([-1.0, 3.0]), 400.0), torch.tensor([0.0, 1.0]))


def test_hard_gates_leave_the_best_open():
    e = torch.tensor([-3.0, -1.0, -2.0, -0.5])
    assert hard_gate(e, 2).tolist() == [0, 1, 0, 1]
    assert hard_gate(e, 4).tolist() == [1, 1, 1, 1]
    assert hard_gate(-e, 2).tolist() == [1, 1, 1, 1]  # more are open anyway
    with pytest.raises(ValueError, match="0 to 4"):
        hard_gate(e, 5)


def test_the_share_of_ambiguous_gates():
    # sigmoid(0.1 * 25) = 0.924, sigmoid(0.2 * 25) = 0.993
    e = torch.tensor([0.1, -0.1, 0.2, -0.2, 0.0])
    assert ambiguous_share(e, 25.0).item() == pytest.approx(0.6)
    assert ambiguous_share(e, 10.0).item() == 1
    assert ambiguous_share(e[2:4], 400.0).item() == 0


# the sparsity loss ----------------------------------------------------------------------------


def test_the_sparsity_loss_and_its_gradient_by_hand():
    m1 = torch.tensor([1, 0.5, 0, 0.25], requires_grad=True)
    m2 = torch.tensor([0.5, 0.5], requires_grad=True)
    loss = sparsity_loss([(9, 3, m1), (1, m1, m2)])
    loss.backward()
    assert loss.item() == pytest.approx(49 / 116, rel=1e-6)
    assert m1.grad.tolist() == pytest.approx([28 / 116] * 4, rel=1e-6)
    assert m2.grad.tolist() == pytest.approx([1.75 / 116] * 2, rel=1e-6)
    assert sparsity_loss([(3, 3, m1), (1, m1, m2)]).item() == pytest.approx(0.3977273, rel=1e-6)


def test_the_sparsity_loss_against_sums_over_all_weights():
    a, b, c = (torch.rand(n, dtype=torch.float64) for n in (5, 3, 7))
    terms = [(9, 3, a), (4, a, b), (1, b, c), (9, a, c), (25, 1, b)]
    kept = total = 0.0
    for area, m_in, m_out in terms:
        for x in [1.0] * m_in if isinstance(m_in, int) else m_in.tolist():
            for y in m_out.tolist():
                kept, total = kept + area * x * y, total + area
    assert sparsity_loss(terms).item() == pytest.approx(kept / total, rel=1e-12)
    assert weight_counts(terms)[1] == total
    ones = [(9, 3, torch.ones(5)), (4, torch.ones(5), torch.ones(3))]
    assert sparsity_loss(ones).item() == 1


def test_the_gradient_of_the_sparsity_loss():
    a, b = (torch.rand(n, dtype=torch.float64, requires_grad=True) for n in (3, 2))
    assert torch.autograd.gradcheck(lambda a, b: sparsity_loss([(9, 3, a), (4, a, b)]), (a, b))


def test_the_gradient_of_the_sparsity_loss_is_compensated_too():
    e = torch.tensor([-1.0, 0.0, 2.0], requires_grad=True)
    sparsity_loss([(1, 4, gate(e, 50.0))]).backward()
    assert e.grad.tolist() == pytest.approx([sigmoid(x) * sigmoid(-x) / 3 for x in (-1, 0, 2)])


@pytest.mark.parametrize("terms", [[], [(9, 3, 4)]])
def test_a_sparsity_loss_without_masks_is_an_error(terms):
    with pytest.raises(ValueError, match="at least one layer with a mask"):
        sparsity_loss(terms)


# HAT ------------------------------------------------------------------------------------------


def test_hats_regulariser_by_hand():
    m = [torch.tensor([1.0, 0.5]), torch.tensor([0.25, 1.0, 0.0])]
    before = [torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.0, 1.0])]
    # free: 0 1 | 0.5 1 0, so (0.5 + 0.125 + 1) / 2.5
    assert hat_sparsity(m, before).item() == pytest.approx(0.65)
    assert hat_sparsity(m).item() == pytest.approx(2.75 / 5)
    nothing = [torch.zeros(2), torch.zeros(3)]
    assert hat_sparsity(m, nothing).item() == pytest.approx(hat_sparsity(m).item())


def test_hats_regulariser_where_nothing_is_free_is_zero_with_a_graph():
    m = torch.rand(3, requires_grad=True)
    loss = hat_sparsity([m], [torch.ones(3)])
    loss.backward()
    assert loss.item() == 0
    assert m.grad.tolist() == [0, 0, 0]


def test_hats_regulariser_wants_masks_of_one_shape():
    with pytest.raises(ValueError, match="shapes of masks"):
        hat_sparsity([torch.ones(2)], [torch.ones(3)])


def test_hats_gradient_mask_by_hand():
    m_in, m_out = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.25, 0.0])
    expected = [[0, 1], [0.75, 1], [1, 1]]
    assert hat_gradient_mask(m_in, m_out, (3, 2)).tolist() == expected
    conv = hat_gradient_mask(m_in, m_out, (3, 2, 5, 5))
    assert conv.shape == (3, 2, 1, 1)
    assert conv[..., 0, 0].tolist() == expected
    flat = hat_gradient_mask(m_in, m_out, (3, 4))  # two columns per channel
    assert flat.tolist() == [[0, 0, 1, 1], [0.75, 0.75, 1, 1], [1, 1, 1, 1]]


def test_hats_gradient_mask_at_the_ends():
    m = torch.tensor([1.0, 0.25])
    assert hat_gradient_mask(None, m, (2, 3)).tolist() == [[0], [0.75]]  # reads the input
    assert hat_gradient_mask(m, None, (3, 2)).tolist() == [[0, 0.75]]
    assert hat_gradient_mask(None, m, (2,)).tolist() == [0, 0.75]  # a bias
    assert hat_gradient_mask(None, None, (3, 2)) == 0.0


@pytest.mark.parametrize(("m_in", "m_out", "shape"), [
    (2, 3, (2, 2)), (3, 2, (2, 4)), (2, 2, (2,)), (0, 2, (2, 4)),
])  # fmt: skip
def test_a_gradient_mask_that_does_not_fit_is_an_error(m_in, m_out, shape):
    with pytest.raises(ValueError, match="needs one mask"):
        hat_gradient_mask(torch.ones(m_in), torch.ones(m_out), shape)
