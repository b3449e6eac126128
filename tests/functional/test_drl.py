"""The loss against closed forms, a slow oracle in double precision, and its invariants."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from avalanche_ext.functional.drl import (
    FORMS,
    GRAM_MAX_PRODUCTS,
    DRLForm,
    drl_combine,
    drl_loss,
    drl_terms,
)

METHODS = ("gram", "class_sums")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}

F_ROWS = [[1, 0, 2], [0, 1, 1], [2, 2, 0], [1, 1, 1]]
# layers, labels, pairs (between, within), sums (between, within), one value per form:
# eq3, drl, followup, challenge
CLOSED_FORMS = {
    "A": ([[[1, 0], [1, 0], [0, 1]]], [0, 0, 1], (4, 2), (0, 2), (-1, 1, 4 / 9, 1 / 9)),
    "B": ([[[1, 2], [3, 4], [5, 6]]], [0, 0, 1], (4, 2), (112, 22), (17, 39, 52 / 3, 67 / 9)),
    "C": ([[1, 2, 3]], [4, 4, 4], (0, 6), (0, 22), (-11 / 3, 11 / 3, 44 / 9, 11 / 9)),
    "D": ([[1, 2, 3]], [0, 1, 2], (6, 0), (22, 0), (11 / 3, 11 / 3, 22 / 9, 11 / 9)),
    "E": (
        [[[1, 2], [3, 4], [5, 6]], [[1], [-1], [2]]],
        [0, 0, 1], (4, 2), (112, 20), (18, 38, 152 / 9, 22 / 3),
    ),
    "F": ([F_ROWS], [0, 0, 1, 1], (8, 4), (18, 12), (-0.75, 5.25, 2.625, 0.9375)),
    "G": (
        [[1, 2, 3, 4, 5, 6]],
        [0, 0, 0, 1, 1, 2], (22, 8), (288, 62),
        (144 / 11 - 7.75, 144 / 11 + 7.75, 103 / 9, 175 / 36),
    ),
    "H": ([[[3, 4]]], [0], (0, 0), (0, 0), (0, 0, 0, 0)),
}  # fmt: skip
GRADIENTS = {
    ("B", "eq3"): [[-0.5, -1], [1.5, 1], [2, 3]],
    ("B", "drl"): [[5.5, 7], [3.5, 5], [2, 3]],
    ("C", "eq3"): [-5 / 3, -4 / 3, -1],
    ("F", "eq3"): [
        [0.75, 0.25, -0.25], [0.25, 0.75, -0.75], [-0.25, -0.25, 0.25], [-0.75, -0.75, 0.75],
    ],
    ("H", "drl"): [[0, 0]],
}  # fmt: skip


def oracle(layers: list[Tensor], labels: Tensor) -> tuple[float, float, int, int]:
    """The definition, pair by pair, in Python floats."""
    between = within = 0.0
    n_between = n_within = 0
    rows = [h.detach().double().flatten(1).tolist() for h in layers]
    for i, y_i in enumerate(labels.tolist()):
        for j, y_j in enumerate(labels.tolist()):
            if i == j:
                continue
            product = sum(sum(a * b for a, b in zip(h[i], h[j], strict=True)) for h in rows)
            if y_i == y_j:
                within, n_within = within + product, n_within + 1
            else:
                between, n_between = between + product, n_between + 1
    return between, within, n_between, n_within


def case(name: str, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor]:
    layers, labels, *_ = CLOSED_FORMS[name]
    return [torch.tensor(h, dtype=dtype) for h in layers], torch.tensor(labels)


def batch(size: int, n_classes: int, shape: tuple[int, ...] = (7,), dtype=torch.float64):
    return torch.randn(size, *shape, dtype=dtype), torch.randint(n_classes, (size,))


# closed forms -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_closed_form_terms(name, method, dtype):
    _, _, pairs, sums, _ = CLOSED_FORMS[name]
    terms = drl_terms(*case(name, dtype), method=method)
    assert (int(terms.between_pairs), int(terms.within_pairs)) == pairs
    want = (*sums, sums[0] / max(pairs[0], 1), sums[1] / max(pairs[1], 1))
    got = (terms.between_sum, terms.within_sum, terms.between, terms.within)
    assert [float(g) for g in got] == pytest.approx(want, rel=TOLERANCE[dtype], abs=1e-12)
    assert {g.dtype for g in got} == {dtype}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("position", "form"), enumerate(("eq3", "drl", "followup", "challenge")))
@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_closed_form_loss(name, position, form, method, dtype):
    want = CLOSED_FORMS[name][-1][position]
    got = drl_loss(*case(name, dtype), form=form, method=method)
    assert got.shape == ()
    assert got.dtype == dtype
    assert float(got) == pytest.approx(want, rel=TOLERANCE[dtype], abs=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("name", "form"), GRADIENTS)
def test_closed_form_gradient(name, form, method):
    (h,), y = case(name)
    h.requires_grad_()
    drl_loss(h, y, form=form, method=method).backward()
    torch.testing.assert_close(
        h.grad, torch.tensor(GRADIENTS[name, form], dtype=h.dtype), rtol=1e-12, atol=1e-12
    )


def test_a_custom_form_weighs_the_two_terms():
    terms = drl_terms(*case("B"))  # L_bt = 28, L_wi = 11, S_bt = 112, S_wi = 22
    assert float(drl_combine(terms, DRLForm(0.0, 1.0, "pairs"), 3)) == pytest.approx(11)
    assert float(drl_combine(terms, DRLForm(2.0, -3.0, "pairs"), 3)) == pytest.approx(23)
    assert float(drl_combine(terms, DRLForm(1.0, 0.5, "batch"), 3)) == pytest.approx(123 / 9)


# slow oracle ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("size", "n_classes"), [(2, 1), (5, 2), (12, 12), (17, 3), (40, 5)])
def test_equals_the_double_loop_over_pairs(size, n_classes, method):
    first, y = batch(size, n_classes)
    second = torch.rand(size, 2, 3, 2, dtype=torch.float64)
    between, within, n_between, n_within = oracle([first, second], y)
    terms = drl_terms([first, second], y, method=method)
    assert (int(terms.between_pairs), int(terms.within_pairs)) == (n_between, n_within)
    assert float(terms.between_sum) == pytest.approx(between, rel=1e-12, abs=1e-11)
    assert float(terms.within_sum) == pytest.approx(within, rel=1e-12, abs=1e-11)


@pytest.mark.parametrize(
    ("size", "more", "expected"),
    [(64, 0, "gram"), (64, 1, "class_sums"), (16, 0, "gram"), (512, 1, "class_sums")],
)
def test_auto_is_gram_for_few_products_and_class_sums_for_many(size, more, expected):
    h = torch.rand(size, GRAM_MAX_PRODUCTS // size**2 + more, requires_grad=True)
    y = torch.arange(size) % 4
    nodes, todo = set(), [drl_terms(h, y).between_sum.grad_fn]
    while todo:
        node = todo.pop()
        nodes.add(type(node).__name__)
        todo += [parent for parent, _ in node.next_functions if parent is not None]
    assert ("_ClassSumsBackward" in nodes) == (expected == "class_sums")


# invariants -------------------------------------------------------------------------------------


@st.composite
def batches(draw):
    """A random batch in float64: seed, size, labels and width are drawn."""
    size = draw(st.integers(1, 12))
    labels = draw(st.lists(st.integers(0, 3), min_size=size, max_size=size))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    h = torch.randn(size, draw(st.integers(1, 5)), generator=generator, dtype=torch.float64)
    return h, torch.tensor(labels), generator


def values(layers, y, method="class_sums") -> Tensor:
    return torch.stack([drl_loss(layers, y, form=form, method=method) for form in FORMS])


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(batches(), st.floats(-4, 4))
def test_invariants_of_a_random_batch(drawn, scale):
    h, y, generator = drawn
    reference = values(h, y, "gram")
    same(values(h, y), reference)
    order = torch.randperm(len(y), generator=generator)
    renamed = torch.tensor([7, 9001, -3, 2**40])[y]
    other = torch.randn(len(y), 2, 2, generator=generator, dtype=torch.float64)
    for method in METHODS:
        same(values(h[order], y[order], method), reference)
        same(values(h, renamed, method), reference)
        same(values(scale * h, y, method), scale**2 * reference)
        same(values([h, other], y, method), reference + values(other, y, method))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(batches(), st.integers(0, 2**16))
def test_challenge_form_does_not_depend_on_the_labels(drawn, seed):
    h, y, generator = drawn
    other = torch.randint(3, y.shape, generator=generator.manual_seed(seed))
    off_diagonal = (h.sum(0).square().sum() - h.square().sum()) / (2 * len(y) ** 2)
    for method in METHODS:
        same(drl_loss(h, y, form="challenge", method=method), off_diagonal)
        same(drl_loss(h, other, form="challenge", method=method), off_diagonal)


@pytest.mark.parametrize("method", METHODS)
def test_normalize_equals_input_normalised_by_hand(method):
    h, y = batch(9, 3, (2, 4))
    by_hand = h / h.flatten(1).norm(dim=1)[:, None, None]
    got = drl_loss(5 * h, y, form="drl", normalize=True, method=method)
    same(got, drl_loss(by_hand, y, form="drl", method=method))
    assert abs(float(got) - float(drl_loss(h, y, form="drl", method=method))) > 1e-3


# gradients --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("normalize", [False, True])
def test_gradcheck(form, method, normalize):
    first, y = batch(7, 3, (4,))
    second = torch.randn(7, 2, 2, dtype=torch.float64)
    y[0], y[1:3] = 9, 4  # a class of one sample, and one of several

    def loss(*layers):
        return drl_loss(layers, y, form=form, method=method, normalize=normalize)

    assert torch.autograd.gradcheck(loss, (first.requires_grad_(), second.requires_grad_()))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", FORMS)
def test_gradgradcheck(form, method):
    h, y = batch(6, 2, (3,))
    y[0] = 9

    def loss(h):
        return drl_loss(h, y, form=form, method=method)

    assert torch.autograd.gradgradcheck(loss, (h.requires_grad_(),))


# accuracy ---------------------------------------------------------------------------------------


REFERENCE = "class_sums"  # in float64 it equals Gram, by the tests above, and is faster


def relative_errors(h: Tensor, y: Tensor, method: str) -> dict[str, float]:
    """Of both terms and of the gradient of form "drl", against the same in float64."""
    exact, approximate = h.double().requires_grad_(), h.clone().requires_grad_()
    want, got = drl_terms(exact, y, method=REFERENCE), drl_terms(approximate, y, method=method)
    drl_combine(want, "drl", len(y)).backward()
    drl_combine(got, "drl", len(y)).backward()
    errors = {"gradient": float((approximate.grad - exact.grad).norm() / exact.grad.norm())}
    for term in ("between", "within"):
        reference = float(getattr(want, term).detach())
        error = abs(float(getattr(got, term).detach()) - reference)
        errors[term] = error / abs(reference) if reference else error
    return errors


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("size", "width"), [(16, 1000), (64, 20_000), (512, 1000)])
@pytest.mark.parametrize(("features", "bound"), [("relu", 1e-6), ("zero mean", 3e-5)])
def test_float32_is_close_to_float64(features, bound, size, width, method):
    h, y = batch(size, 10, (width,), torch.float32)
    h = h.relu() if features == "relu" else h
    errors = relative_errors(h, y, method)
    assert max(errors.values()) < bound, errors


@pytest.mark.parametrize(("method", "width"), [("gram", 32), ("class_sums", 1000)])
@pytest.mark.parametrize("lonely", ["sample", "pair"])
def test_float32_is_close_to_float64_in_extreme_batches(lonely, method, width):
    h = torch.rand(4096, width)
    if lonely == "sample":  # 4095 of one class, 1 of another: few pairs of different class
        y = torch.zeros(4096, dtype=torch.long)
        y[1234] = 1
    else:  # one pair of one class among classes of one sample
        y = torch.arange(4096)
        y[-1] = 0
    errors = relative_errors(h, y, method)
    assert max(errors.values()) < 5e-6, errors


# degenerate batches -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("term", "labels"),
    [("between", [5] * 40), ("within", list(range(40))), ("between", [3]), ("within", [3])],
)
def test_a_term_without_pairs_is_exactly_zero_with_a_graph(term, labels, method, dtype):
    h = torch.randn(len(labels), 33, dtype=dtype, requires_grad=True)
    value = getattr(drl_terms(h, torch.tensor(labels), method=method), term)
    assert value.requires_grad
    assert value.item() == 0.0
    (1e-3 * value).backward()
    assert torch.count_nonzero(h.grad) == 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", FORMS)
def test_one_sample_has_loss_and_gradient_exactly_zero(form, method):
    h = torch.randn(1, 999, requires_grad=True)
    loss = drl_loss(h, torch.tensor([1]), form=form, method=method)
    (1e-3 * loss).backward()
    assert float(loss.detach()) == 0.0
    assert torch.equal(h.grad, torch.zeros_like(h))


# number formats ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_input_gives_the_float32_value_of_its_rows(dtype, normalize, method):
    h, y = batch(24, 3, (501,), torch.float32)
    half = h.to(dtype).requires_grad_()
    wide = half.detach().float().requires_grad_()
    got = drl_loss(half, y, form="drl", method=method, normalize=normalize)
    want = drl_loss(wide, y, form="drl", method=method, normalize=normalize)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(want.item(), rel=1e-6)
    got.backward()
    want.backward()
    assert half.grad.dtype == dtype
    torch.testing.assert_close(half.grad, wide.grad.to(dtype))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("normalize", [False, True])
def test_autocast_changes_nothing(method, normalize):
    h, y = batch(24, 3, (64,), torch.float32)
    outside = drl_loss(h, y, form="drl", method=method, normalize=normalize)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = drl_loss(h, y, form="drl", method=method, normalize=normalize)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, outside)


@pytest.mark.parametrize("method", METHODS)
def test_large_half_precision_maps_do_not_overflow(method):
    h = torch.ones(8, 64, 64, 64, dtype=torch.float16, requires_grad=True)  # 262,144 per sample
    y = torch.tensor([0, 0, 1, 1, 2, 2, 3, 4])
    terms = drl_terms(h, y, method=method)
    assert terms.between.item() == terms.within.item() == 262_144  # > 65,504, the largest float16
    drl_combine(terms, "drl", 8).backward()
    assert torch.isfinite(h.grad).all()


def test_half_precision_rows_widened_in_blocks_equal_one_block():
    h, y = batch(37, 4, (100_000,), torch.float32)  # more than one block of about a million
    h = h.bfloat16()
    got, want = (drl_terms(x, y, method="class_sums") for x in (h, h.float()))
    torch.testing.assert_close(got.between, want.between, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.within, want.within, rtol=1e-5, atol=1e-5)
    grads = []
    for x in (h, h.float()):
        x = x.requires_grad_()
        drl_loss(x, y, form="drl", method="class_sums").backward()
        grads.append(x.grad.bfloat16())
    torch.testing.assert_close(grads[0], grads[1])


# errors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "labels", "kwargs", "message"),
    [
        ([], [0, 1], {}, "at least one layer"),
        (torch.ones(3, 2), [0, 1], {}, r"\(3, 2\) and \(2,\)"),
        ([torch.ones(2, 2), torch.ones(1, 2)], [0, 1], {}, r"\(1, 2\) and \(2,\)"),
        (torch.tensor(1.0), [0], {}, r"\(B, \.\.\.\)"),
        (torch.ones(2, 2), [[0, 1]], {}, r"targets \(B,\).*\(1, 2\)"),
        (torch.ones(0, 2), [], {}, r"B >= 1"),
        (torch.ones(2, 2), [0, 1], {"form": "eq4"}, r"\['challenge', 'drl', 'eq3', 'followup'\]"),
        (torch.ones(2, 2), [0, 1], {"form": DRLForm(1, 1, "mean")}, "'pairs' or 'batch'.*'mean'"),
        (torch.ones(2, 2), [0, 1], {"method": "fast"}, "'auto', 'gram' or 'class_sums'.*'fast'"),
    ],
)
def test_bad_input_is_refused_with_what_was_expected(layers, labels, kwargs, message):
    with pytest.raises(ValueError, match=message):
        drl_loss(layers, torch.tensor(labels), **{"form": "drl", **kwargs})


def test_the_form_has_no_default():
    with pytest.raises(TypeError, match="form"):
        drl_loss(torch.ones(2, 2), torch.tensor([0, 1]))
