"""Losses of generators against closed forms, slow sums in float64 and finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from avalanche_ext.functional.generative import (
    bernoulli_nll,
    gaussian_kl,
    gaussian_nll,
    gradient_penalty,
    new_data_weight,
    reparametrise,
    replay_alignment,
    soft_cross_entropy,
)


@pytest.mark.parametrize(
    ("mean", "logvar", "want"), [(0, 0, 0), (1, 0, 0.5), (0, 1, (math.e - 2) / 2)]
)
def test_kl_of_one_unit(mean, logvar, want):
    kl = gaussian_kl(torch.tensor([[float(mean)]]), torch.tensor([[float(logvar)]]))
    assert kl.item() == pytest.approx(want, abs=1e-6)


def test_kl_is_torchs_added_up_over_units():
    mean, logvar = torch.randn(5, 7).double(), torch.randn(5, 7).double()
    normal = torch.distributions.Normal
    want = torch.distributions.kl_divergence(
        normal(mean, (logvar / 2).exp()), normal(torch.zeros(()).double(), 1.0)
    ).sum(1)
    torch.testing.assert_close(gaussian_kl(mean, logvar), want)


def test_standard_deviation_is_the_root_of_the_variance():
    noise = torch.randn(200_000, 1)
    z = reparametrise(torch.full_like(noise, 3.0), torch.full_like(noise, 2.0), noise)
    assert z.std().item() == pytest.approx(math.e, abs=0.02)
    assert z.mean().item() == pytest.approx(3.0, abs=0.03)


def test_likelihoods_are_sums_over_a_samples_numbers():
    out, x = torch.randn(3, 2, 4).double(), torch.rand(3, 2, 4).double()
    for b in range(3):
        p = torch.sigmoid(out[b])
        bernoulli = -(x[b] * p.log() + (1 - x[b]) * (1 - p).log()).sum()
        assert bernoulli_nll(out, x)[b] == pytest.approx(bernoulli.item())
        distance = (out[b] - x[b]).square().sum().item()
        assert gaussian_nll(out, x)[b] == pytest.approx(distance / 2)


def test_elbo_terms_have_exact_gradients():
    mean, logvar, noise = (torch.randn(2, 3).double().requires_grad_() for _ in range(3))
    x = torch.rand(2, 3).double()
    assert gradcheck(
        lambda m, v: gaussian_kl(m, v) + bernoulli_nll(reparametrise(m, v, noise.detach()), x),
        (mean, logvar),
    )


# gradient penalty -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 9), (4, 1, 3, 3)])
@pytest.mark.parametrize(("length", "want"), [(3.0, 4.0), (1.0, 0.0)])
def test_penalty_of_a_linear_critic_is_that_of_its_weights(shape, length, want):
    w = torch.randn(9).double()
    w = length * w / w.norm()
    real, fake, share = torch.randn(shape).double(), torch.randn(shape).double(), torch.rand(4)
    found = gradient_penalty(lambda x: x.flatten(1) @ w, real, fake, share.double())
    torch.testing.assert_close(found, torch.full((4,), want).double())


def test_penalty_is_taken_between_the_pairs():
    # D(x) = x^2 / 2 in one dimension: its slope is x itself.
    real, fake = torch.tensor([[4.0], [4.0], [4.0]]), torch.tensor([[0.0], [0.0], [0.0]])
    found = gradient_penalty(
        lambda x: x.square().sum(1) / 2, real, fake, torch.tensor([1.0, 0.0, 0.25])
    )
    assert found.tolist() == pytest.approx([9.0, 1.0, 0.0])


def test_penalty_against_finite_differences_of_critic_and_penalty():
    torch.manual_seed(1)
    w, v = torch.randn(5, 6).double(), torch.randn(6).double()
    real, fake = torch.randn(3, 5).double(), torch.randn(3, 5).double()
    share = torch.rand(3).double()

    def penalty(w, v):
        return gradient_penalty(lambda x: torch.tanh(x @ w) @ v, real, fake, share)

    step = 1e-5
    for b in range(3):
        at = share[b] * real[b] + (1 - share[b]) * fake[b]
        slope = torch.stack([
            (torch.tanh((at + e) @ w) @ v - torch.tanh((at - e) @ w) @ v) / (2 * step)
            for e in step * torch.eye(5).double()
        ])  # fmt: skip
        assert penalty(w, v)[b].item() == pytest.approx((slope.norm().item() - 1) ** 2, rel=1e-6)
    leaves = (w.requires_grad_(), v.requires_grad_())
    assert gradcheck(penalty, leaves)
    assert gradgradcheck(penalty, leaves)


def test_penalty_of_a_dead_critic_has_a_finite_gradient():
    w = torch.zeros(5, requires_grad=True)
    penalty = gradient_penalty(lambda x: x @ w, torch.randn(2, 5), torch.randn(2, 5), torch.rand(2))
    penalty.sum().backward()
    assert penalty.tolist() == [1.0, 1.0]
    assert torch.equal(w.grad, torch.zeros(5))


def test_penalty_leaves_the_samples_alone_and_works_without_gradients():
    real = torch.randn(2, 5, requires_grad=True)
    fake = torch.randn(2, 5, requires_grad=True)
    w = torch.randn(5, requires_grad=True)
    gradient_penalty(lambda x: (x @ w).tanh(), real, fake, torch.rand(2)).sum().backward()
    assert real.grad is None
    assert fake.grad is None
    with torch.no_grad():
        value = gradient_penalty(lambda x: x @ w, real, fake, torch.rand(2))
    torch.testing.assert_close(value.detach(), (w.detach().norm() - 1).square().expand(2))


# what the solver learns -------------------------------------------------------------------------


def test_soft_cross_entropy_by_hand():
    z = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
    assert soft_cross_entropy(z, z).item() == pytest.approx(0.58220, abs=1e-5)
    wider = torch.tensor([[2.0, 0.0, 0.0]], dtype=torch.float64)
    assert soft_cross_entropy(wider, z).item() == pytest.approx(0.82039, abs=1e-5)
    assert soft_cross_entropy(z, z, 1.0).item() == pytest.approx(0.36534, abs=1e-5)


def test_a_student_like_its_teacher_has_no_gradient():
    teacher = torch.randn(4, 5).double()
    student = teacher.clone().requires_grad_()
    soft_cross_entropy(student, teacher).sum().backward()
    assert student.grad.abs().max() < 1e-15


def test_a_very_sure_teacher_gives_plain_cross_entropy():
    student, y = torch.randn(6, 4).double(), torch.tensor([0, 1, 2, 3, 0, 1])
    teacher = 1e4 * F.one_hot(y, 4).double()
    want = F.cross_entropy(student / 2, y, reduction="none")
    torch.testing.assert_close(soft_cross_entropy(student, teacher), want)


def test_classes_that_the_teacher_does_not_know_have_no_share():
    teacher = torch.tensor([[1.0, -math.inf, 0.5]])
    student = torch.tensor([[0.2, 0.1, -0.3]], requires_grad=True)
    p = torch.softmax(torch.tensor([1.0, 0.5]) / 2, 0)
    log = torch.log_softmax(student.detach()[0] / 2, 0)
    want = -(p[0] * log[0] + p[1] * log[2])
    value = soft_cross_entropy(student, teacher)
    assert value.item() == pytest.approx(want.item())
    value.backward()
    assert student.grad[0, 1] > 0  # only pushed down


@pytest.mark.parametrize(
    ("rule", "want"),
    [("1/t", [1, 1 / 2, 1 / 3]), ("class_ratio", [1, 2 / 7, 3 / 10]), (0.3, [1, 0.3, 0.3])],
)
def test_weight_of_new_data(rule, want):
    classes, seen = [5, 2, 3], [5, 7, 10]
    found = [new_data_weight(rule, t + 1, classes[t], seen[t]) for t in range(3)]
    assert found == pytest.approx(want)
    assert found[0] == 1.0


# replay alignment -------------------------------------------------------------------------------


def test_a_shift_of_every_number_is_counted_for_every_number():
    before = torch.randn(3, 2, 5).double()
    now = (before + 0.1).requires_grad_()
    distance = replay_alignment(now, before)
    torch.testing.assert_close(distance, torch.full((3,), 10 * 0.01).double())
    distance.sum().backward()
    torch.testing.assert_close(now.grad, torch.full((3, 2, 5), 2 * 0.1).double())


def test_alignment_is_a_sum_over_each_samples_numbers_and_holds_the_earlier_one():
    now, before = (torch.randn(4, 3, 2).double().requires_grad_() for _ in range(2))
    found = replay_alignment(now, before)
    for b in range(4):
        pairs = zip(now[b].flatten().tolist(), before[b].flatten().tolist(), strict=True)
        assert found[b].item() == pytest.approx(sum((p - q) ** 2 for p, q in pairs))
    assert gradcheck(lambda u: replay_alignment(u, before), now)
    found.sum().backward()
    assert before.grad is None
