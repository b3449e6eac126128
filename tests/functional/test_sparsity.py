"""The rivals' penalties against hand-worked values and plain loops in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from avalanche_ext.functional.sparsity import decov, l1_activation, orthogonality

H = torch.tensor([[1.0, 2, 3], [0, 1, 2]], dtype=torch.float64)
W = torch.tensor([[1.0, 0], [1, 1], [-1, 0.5]], dtype=torch.float64)


def differentiate(f, x, **kwargs):
    x = x.detach().clone().requires_grad_()
    value = f(x, **kwargs)
    value.backward()
    return value.item(), x.grad


def close(got, want, atol=1e-9):
    torch.testing.assert_close(got, torch.tensor(want, dtype=got.dtype), rtol=0, atol=atol)


# activations ------------------------------------------------------------------------------------


def test_l1_of_the_worked_example():
    value, gradient = differentiate(l1_activation, H)
    assert value == 4.5
    close(gradient, [[0.5, 0.5, 0.5], [0, 0.5, 0.5]])  # an inactive unit is not pulled
    assert l1_activation(-H).item() == 4.5


def test_decov_of_the_worked_example():
    value, gradient = differentiate(decov, H)
    assert value == pytest.approx(0.1875)
    close(gradient, [[0.25] * 3, [-0.25] * 3])


@pytest.mark.parametrize(("batch", "width"), [(3, 8), (8, 3), (5, 5), (2, 2)])
def test_decov_is_the_covariance_without_its_diagonal(batch, width):
    h = torch.randn(batch, width, dtype=torch.float64)
    covariance = torch.cov(h.T, correction=0)
    want, slope = 0.0, torch.zeros_like(h)
    centred = h - h.mean(0)
    for a in range(width):
        for j in range(width):
            if a != j:
                want += 0.5 * covariance[a, j].item() ** 2
                slope[:, a] += 2 / batch * covariance[a, j] * centred[:, j]
    value, gradient = differentiate(decov, h)
    assert value == pytest.approx(want)
    torch.testing.assert_close(gradient, slope)
    assert torch.autograd.gradcheck(decov, h.requires_grad_())


def test_decov_of_one_sample_one_unit_and_a_constant_is_zero():
    for h in (torch.randn(1, 5), torch.randn(5, 1), torch.ones(5, 4)):
        value, gradient = differentiate(decov, h)
        assert value == pytest.approx(0, abs=1e-12)
        assert gradient.abs().max() < 1e-6
    shifted = decov(H + torch.tensor([5.0, -2, 9]))
    assert shifted.item() == pytest.approx(0.1875)


def test_decov_in_float32_is_exact_to_rounding_and_half_does_not_overflow():
    h = torch.randn(40, 60, dtype=torch.float64)
    want, slope = differentiate(decov, h)
    single = h.float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = decov(single)
    value.backward()
    assert value.item() == pytest.approx(want, rel=1e-5)
    assert (single.grad - slope).abs().max() < 1e-5 * slope.abs().max()
    large = torch.tensor([[300.0, 300], [-300, -300]], dtype=torch.float16)
    assert decov(large).item() == pytest.approx(90000.0**2)


@pytest.mark.parametrize("f", [l1_activation, decov])
@pytest.mark.parametrize("shape", [(3,), (2, 3, 4), (0, 3)])
def test_other_shapes_are_refused(f, shape):
    with pytest.raises(ValueError, match=rf"{f.__name__} expects activations \(B, N\)"):
        f(torch.zeros(shape))


# weights ----------------------------------------------------------------------------------------


def test_local_orthogonality_of_the_worked_example():
    value, gradient = differentiate(orthogonality, W)
    assert value == pytest.approx(0.1041525984, abs=1e-10)
    want = [[0, 0.7175965309], [0.3587800077, -0.3587800077], [1.46062e-5, 2.92123e-5]]
    close(gradient, want, atol=1e-9)


def test_global_orthogonality_of_the_worked_example():
    value, gradient = differentiate(orthogonality, W, form="global")
    assert value == pytest.approx(1.4)
    close(gradient, [[0, 0.2], [0.8, -0.8], [-0.56, -1.12]])


@pytest.mark.parametrize("form", ["local", "global"])
def test_gradients_are_tangent_to_the_sphere_of_each_row(form):
    w = torch.randn(5, 4, 3, 3, dtype=torch.float64)
    value, gradient = differentiate(orthogonality, w, form=form, sharpness=3.0)
    along = (gradient * w).flatten(1).sum(1)
    torch.testing.assert_close(along, torch.zeros_like(along))
    assert value == pytest.approx(
        orthogonality(w.flatten(1) * torch.rand(5, 1).double(), form=form, sharpness=3.0).item()
    )
    assert torch.autograd.gradcheck(
        lambda w: orthogonality(w, form=form, sharpness=3.0), w.requires_grad_()
    )


def test_the_authors_gradient_is_half_and_not_projected():
    value, gradient = differentiate(orthogonality, W, gradient="authors")
    assert value == pytest.approx(0.1041525984, abs=1e-10)
    unit = F.normalize(W, dim=1)
    want = torch.zeros_like(W)
    for i in range(3):
        for j in range(3):
            if i != j:
                e = math.exp(10 * float(unit[i] @ unit[j]))
                want[i] += 10 * e / (e + math.exp(10)) * unit[j]
    torch.testing.assert_close(gradient, want)
    across = want - (want * unit).sum(1, keepdim=True) * unit
    _, exact = differentiate(orthogonality, W)
    torch.testing.assert_close(2 * across / W.norm(dim=1, keepdim=True), exact)


def test_rows_of_zeros_have_no_direction():
    w = torch.tensor([[1.0, 0], [0, 0], [1, 1]], dtype=torch.float64)
    value, gradient = differentiate(orthogonality, w, form="global")
    assert value == pytest.approx(0.5)
    close(gradient[1], [0, 0])
    assert torch.isfinite(gradient).all()


def test_one_row_and_orthogonal_rows():
    assert orthogonality(torch.randn(1, 5)).item() == 0
    assert orthogonality(torch.eye(4), form="global").item() == 0
    assert orthogonality(torch.eye(4)).item() == pytest.approx(12 * math.log1p(math.exp(-10)))
    assert orthogonality(torch.cat([torch.eye(3), -torch.eye(3)]), form="global").item() == 3


@pytest.mark.parametrize(
    ("weight", "arguments", "message"),
    [
        (torch.ones(3), {}, r"a weight \(N, D, ...\)"),
        (W, {"form": "both"}, "form 'local' or 'global'.*got 'both'"),
        (W, {"gradient": "theirs"}, "gradient 'exact' or 'authors'; got 'local' and 'theirs'"),
        (W, {"sharpness": 0.0}, "sharpness > 0"),
        (W, {"form": "global", "gradient": "authors"}, "gradient='authors' with form='local'"),
    ],
)
def test_bad_arguments_of_orthogonality(weight, arguments, message):
    with pytest.raises(ValueError, match=f"orthogonality expects.*{message}"):
        orthogonality(weight, **arguments)
