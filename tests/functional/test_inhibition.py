"""Neural inhibition against hand-worked values and a loop over pairs of units in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from avalanche_ext.functional import inhibition_operators as operators
from avalanche_ext.functional.inhibition import (
    FORMS,
    InhibitionForm,
    inhibition_loss,
    neuron_sensitivity,
)
from avalanche_ext.functional.inhibition_operators import (
    DenseInhibition,
    FourierInhibition,
    LowRankInhibition,
    inhibition_operator,
)

METHODS = ["dense", "fft", "low_rank"]
H = torch.tensor([[1.0, 2, 3], [0, 1, 2]], dtype=torch.float64)
ALPHA = torch.tensor([0, math.log(2), math.log(3)], dtype=torch.float64)


def oracle(h, sigma=None, alpha=None, combine="product") -> float:
    """Every ordered pair of units of every sample."""
    h = h.detach().double()
    batch, width = h.shape
    y = [1.0] * width if alpha is None else [math.exp(-float(a)) for a in alpha]
    total = 0.0
    for i in range(width):
        for j in range(width):
            if i == j:
                continue
            pair = min(y[i], y[j]) if combine == "min" else y[i] * y[j]
            if sigma is not None:
                pair *= math.exp(-((i - j) ** 2) / (2 * sigma**2))
            total += pair * sum(float(a) * float(b) for a, b in zip(h[:, i], h[:, j], strict=True))
    return total / batch


def relu(batch, width, dtype=torch.float64, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, width, generator=draw, dtype=torch.float64) - 0.5).relu().to(dtype)


def importance(width, seed=1):
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(width, generator=draw, dtype=torch.float64) * 2


def value_and_gradient(h, *args, **kwargs):
    h = h.detach().clone().requires_grad_()
    value = inhibition_loss(h, *args, **kwargs)
    value.backward()
    return value.item(), h.grad


# closed forms -----------------------------------------------------------------------------------

CLOSED = {
    "sni": (None, None, "product", 13.0, [[5, 4, 3], [3, 2, 1]]),
    "slni": (
        1.0, None, "product", 6.4713124468,
        [[1.6190671691, 2.4261226389, 1.3483966027], [0.8772012262, 1.2130613194, 0.6065306597]],
    ),
    "slni of N/6": (
        0.5, None, "product", 1.3543592202,
        [[0.2716769544, 0.5413411329, 0.2710060291], [0.1360062085, 0.2706705665, 0.1353352832]],
    ),
    "snid": (None, ALPHA, "product", 10 / 3, [[2, 1, 2 / 3], [7 / 6, 1 / 3, 1 / 6]]),
    "snid by min": (None, ALPHA, "min", 14 / 3, [[2, 1.5, 1], [7 / 6, 2 / 3, 1 / 3]]),
    "slnid": (
        1.0, ALPHA, "product", 1.5505734892,
        [[0.7418659429, 0.6065306597, 0.2472886476], [0.3934888520, 0.2021768866, 0.1010884433]],
    ),
    "slnid by min": (
        1.0, ALPHA, "min", 2.3592810355,
        [[0.7418659429, 0.9097959896, 0.4494655342], [0.3934888520, 0.4043537731, 0.2021768866]],
    ),
}  # fmt: skip


@pytest.mark.parametrize("method", ["auto", *METHODS])
@pytest.mark.parametrize("case", CLOSED)
def test_value_and_gradient_of_the_worked_example(case, method):
    sigma, alpha, combine, value, gradient = CLOSED[case]
    if combine == "min" and method in ("fft", "low_rank"):
        with pytest.raises(ValueError, match='"min" does not separate'):
            inhibition_loss(H, sigma, alpha, combine=combine, method=method)
        return
    got, slope = value_and_gradient(H, sigma, alpha, combine=combine, method=method)
    assert got == pytest.approx(value, abs=2e-10)
    torch.testing.assert_close(slope, torch.tensor(gradient).double(), rtol=0, atol=2e-7)
    assert got == pytest.approx(oracle(H, sigma, alpha, combine), rel=1e-12)


def test_the_worked_values_by_their_formulas():
    assert CLOSED["slni"][3] == pytest.approx(10 * math.exp(-0.5) + 3 * math.exp(-2))
    assert CLOSED["slnid"][3] == pytest.approx(7 / 3 * math.exp(-0.5) + math.exp(-2))
    assert CLOSED["slnid by min"][3] == pytest.approx(11 / 3 * math.exp(-0.5) + math.exp(-2))


# exactness --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("discounted", [False, True])
@pytest.mark.parametrize("sigma", [None, 0.6, 2.0])
def test_gradients_of_first_and_second_order(method, discounted, sigma):
    alpha = importance(7) if discounted else None
    operator = inhibition_operator(7, sigma, alpha, method=method, like=torch.empty(0).double())

    def f(h):
        return inhibition_loss(h, operator=operator, signed="product")

    h = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(f, h)
    assert torch.autograd.gradgradcheck(f, h)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("discounted", [False, True])
@pytest.mark.parametrize(("width", "sigma"), [(1, 3.0), (2, 1.0), (30, 5.0), (31, 0.7), (24, None)])
def test_every_method_is_the_loop_over_pairs(method, discounted, width, sigma):
    h = relu(5, width)
    alpha = importance(width) if discounted else None
    got = inhibition_loss(h, sigma, alpha, method=method)
    assert got.item() == pytest.approx(oracle(h, sigma, alpha), rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("discounted", [False, True])
@pytest.mark.parametrize(
    ("width", "sigma"), [(128, 128 / 6), (700, 700 / 6), (700, 9.0), (1500, 250.0), (300, None)]
)
def test_all_methods_agree_in_float32_with_float64(width, sigma, discounted):
    h = relu(64, width)
    alpha = importance(width) if discounted else None
    want, slope = value_and_gradient(h, sigma, alpha, method="dense")
    for method in [*METHODS, "auto"]:
        got, grad = value_and_gradient(h.float(), sigma, alpha, method=method)
        assert got == pytest.approx(want, rel=1e-6)
        assert (grad - slope).abs().max() <= 5e-6 * slope.abs().max()


def test_float32_dense_is_within_a_millionth_of_float64():
    h = relu(64, 500)
    want, slope = value_and_gradient(h, 500 / 6, method="dense")
    got, grad = value_and_gradient(h.float(), 500 / 6, method="dense")
    assert got == pytest.approx(want, rel=1e-6)
    assert (grad - slope).abs().max() <= 1e-6 * slope.abs().max()


@pytest.mark.parametrize("method", METHODS)
def test_the_product_is_symmetric_and_has_no_diagonal(method):
    a, b = torch.randn(2, 6, 40, dtype=torch.float64)
    operator = inhibition_operator(40, 7.0, importance(40), method=method, like=a)
    left, right = (operator.apply(a) * b).sum(), (a * operator.apply(b)).sum()
    assert left.item() == pytest.approx(right.item(), rel=1e-10)
    torch.testing.assert_close(
        operator.apply(torch.eye(40).double()).diagonal(), torch.zeros(40).double(),
        rtol=0, atol=1e-13,
    )  # fmt: skip


# properties -------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [None, 3.0])
def test_scale_duplication_and_concatenation(sigma):
    one, two = relu(5, 20, seed=1), relu(9, 20, seed=2)
    value = inhibition_loss(one, sigma)
    assert inhibition_loss(3 * one, sigma).item() == pytest.approx(9 * value.item())
    assert inhibition_loss(torch.cat([one, one]), sigma).item() == pytest.approx(value.item())
    both = inhibition_loss(torch.cat([one, two]), sigma).item()
    want = (5 * value.item() + 9 * inhibition_loss(two, sigma).item()) / 14
    assert both == pytest.approx(want)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sigma", [None, 4.0])
def test_one_active_unit_per_sample_costs_nothing_and_is_not_pulled(method, sigma):
    h = torch.zeros(6, 25, dtype=torch.float64)
    h[torch.arange(6), torch.tensor([0, 3, 3, 24, 12, 7])] = 5.0
    value, gradient = value_and_gradient(h, sigma, method=method)
    assert value == pytest.approx(0, abs=1e-12)
    assert gradient[h > 0].abs().max() < 1e-12
    assert gradient.max() > 0.1  # the others would be


def test_a_lone_unit_costs_exactly_nothing_without_locality():
    h = torch.zeros(2, 900)
    h[0, 17] = 5.0
    assert inhibition_loss(h).item() == 0.0


@pytest.mark.parametrize("method", METHODS)
def test_reach_from_nothing_to_everything(method):
    h = relu(4, 30)
    sni = inhibition_loss(h).item()
    assert inhibition_loss(h, 1e9, method=method).item() == pytest.approx(sni, rel=1e-9)
    assert inhibition_loss(h, 0.05, method=method).item() == pytest.approx(0, abs=1e-12)
    values = [inhibition_loss(h, s, method=method).item() for s in (0.3, 1.0, 3.0, 10.0)]
    assert values == sorted(values)
    bound = ((h.sum(1) ** 2).sum() - h.square().sum()) / 4
    assert sni == pytest.approx(bound.item())
    assert values[-1] < sni


def test_discounts_are_ordered_and_end_where_they_should():
    h, alpha = relu(4, 20), importance(20)
    plain = inhibition_loss(h, 3.0).item()
    smaller = inhibition_loss(h, 3.0, alpha, combine="min").item()
    product = inhibition_loss(h, 3.0, alpha).item()
    assert 0 < product < smaller < plain
    for combine in ("product", "min"):
        none = inhibition_loss(h, 3.0, torch.zeros(20), combine=combine)
        assert none.item() == pytest.approx(plain, rel=1e-12)
    alpha[5] = math.inf
    without = h.clone()
    without[:, 5] = 0
    gone = inhibition_loss(h, 3.0, alpha).item()
    assert gone == pytest.approx(inhibition_loss(without, 3.0, alpha).item(), rel=1e-12)
    assert value_and_gradient(h, 3.0, alpha)[1][:, 5].abs().max() == 0


def test_order_of_units_counts_with_locality_alone():
    h = relu(4, 20)
    order = torch.randperm(20)
    assert inhibition_loss(h[:, order]).item() == pytest.approx(inhibition_loss(h).item())
    local = inhibition_loss(h, 2.0).item()
    assert abs(inhibition_loss(h[:, order], 2.0).item() - local) > 0.01 * local
    assert inhibition_loss(h.flip(1), 2.0).item() == pytest.approx(local)
    padded = F.pad(h, (3, 11)), F.pad(h, (14, 0))
    assert [inhibition_loss(p, 2.0).item() for p in padded] == pytest.approx([local, local])


@pytest.mark.parametrize("method", METHODS)
def test_one_unit_has_no_pair(method):
    value, gradient = value_and_gradient(torch.tensor([[4.0], [5.0]]), 2.0, method=method)
    assert value == 0
    assert torch.equal(gradient, torch.zeros(2, 1))
    assert inhibition_loss(torch.tensor([[4.0]]), reduction="pair_mean").item() == 0


def test_pair_mean_divides_by_the_number_of_pairs():
    got = inhibition_loss(H, 1.0, reduction="pair_mean").item()
    assert got == pytest.approx(6.4713124468 / 6)
    ones = torch.ones(3, 50)  # then the weight means the same for every width
    assert inhibition_loss(ones, reduction="pair_mean").item() == pytest.approx(1.0)


# negative activations ---------------------------------------------------------------------------


def test_negative_activations_are_refused_unless_a_meaning_is_chosen():
    h = torch.tensor([[1.0, -2, 3], [0.5, 1, -2]], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"activations >= 0 \(behind a ReLU\); got -2"):
        inhibition_loss(h)
    assert inhibition_loss(h, signed="product").item() == pytest.approx(oracle(h))
    moments = [(-2 + 0.5) / 2, (3 - 1) / 2, (-6 - 2) / 2]  # pairs 01, 02, 12
    weights = [math.exp(-0.5), math.exp(-2), math.exp(-0.5)]
    want = 2 * sum(w * abs(m) for w, m in zip(weights, moments, strict=True))
    got, gradient = value_and_gradient(h, 1.0, signed="abs_moment")
    assert got == pytest.approx(want)
    # d/dh of 2 w |mean_m h_i h_j| is w sign(moment) h_j, for B = 2
    signs = [-1, 1, -1]
    first = signs[0] * weights[0] * h[:, 1] + signs[1] * weights[1] * h[:, 2]
    torch.testing.assert_close(gradient[:, 0], first)
    positive = relu(5, 12)
    assert inhibition_loss(positive, 2.0, signed="abs_moment").item() == pytest.approx(
        inhibition_loss(positive, 2.0).item()
    )
    with pytest.raises(ValueError, match=r'"abs_moment" needs every pair.*LowRankInhibition'):
        inhibition_loss(h, 1.0, signed="abs_moment", method="low_rank")


# what is picked, and what it holds --------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "sigma", "combine", "kind"),
    [
        (128, 128 / 6, "product", DenseInhibition),
        (2000, 2000 / 6, "product", LowRankInhibition),
        (2000, 2000 / 40, "product", LowRankInhibition),
        (2000, 2000 / 64, "product", FourierInhibition),
        (2000, None, "product", LowRankInhibition),
        (600, 100.0, "min", DenseInhibition),
    ],
)
def test_the_method_goes_by_width_reach_and_combination(width, sigma, combine, kind):
    operator = inhibition_operator(width, sigma, torch.zeros(width), combine=combine)
    assert type(operator) is kind
    if kind is not DenseInhibition:  # O(N r) numbers, never N x N
        held = sum(part.numel() for part in operator if isinstance(part, torch.Tensor))
        assert held <= width * operators._MAX_RANK


@pytest.mark.parametrize("width", [512, 2048])
def test_a_sixth_of_the_width_has_rank_16_whatever_the_width(width):
    operator = inhibition_operator(width, width / 6, method="low_rank")
    assert 14 <= operator.factor.shape[1] <= 17
    assert inhibition_operator(width, method="low_rank").factor.shape[1] == 1


@pytest.mark.parametrize(("least", "length"), [(1, 1), (7, 8), (11, 12), (255, 256), (3999, 4000)])
def test_transforms_have_lengths_of_small_primes(least, length):
    assert operators._smooth(least) == length


def test_an_operator_may_be_built_once():
    h, alpha = relu(4, 9), importance(9)
    operator = inhibition_operator(9, 2.0, alpha, like=h)
    assert inhibition_loss(h, operator=operator).item() == pytest.approx(oracle(h, 2.0, alpha))
    with pytest.raises(ValueError, match="or an operator; got both"):
        inhibition_loss(h, 2.0, operator=operator)


@pytest.mark.parametrize(("method", "kept"), [("fft", 2000), ("low_rank", 17)])
def test_the_graph_keeps_the_activations_and_what_the_product_leaves(method, kept):
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.shape) or t, lambda t: t):
        inhibition_loss(relu(3, 2000, torch.float32).requires_grad_(), 300.0, method=method)
    assert held[0] == (3, 2000)
    assert len(held) == 2
    assert held[1][1] <= kept


@pytest.mark.parametrize("method", ["dense", "fft", "low_rank"])
def test_a_weight_on_the_loss_scales_the_gradient(method):
    h = relu(4, 40).requires_grad_()
    alpha = importance(40)
    (2.5 * inhibition_loss(h, 7.0, alpha, method=method)).backward()
    operator = inhibition_operator(40, 7.0, alpha, method="dense", like=h)
    torch.testing.assert_close(h.grad, 2.5 * 2 / 4 * operator.apply(h.detach()))


# precision --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_float32_under_autocast(method):
    h = relu(8, 60, torch.float32)
    want = value_and_gradient(h, 10.0, method=method)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = value_and_gradient(h, 10.0, method=method)
        assert inhibition_loss(h, 10.0, method=method).dtype == torch.float32
    assert got[0] == want[0]
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_activations_do_not_overflow(method):
    h = torch.full((2, 300), 100.0, dtype=torch.float16)
    value, gradient = value_and_gradient(h, method=method)
    assert value == pytest.approx(300 * 299 * 1e4, rel=1e-6)  # float16 ends at 65504
    assert gradient.dtype == torch.float16
    assert gradient[0, 0].item() == pytest.approx(299 * 100, rel=1e-3)


# arguments --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sigma": 0.0}, "finite sigma > 0.*got 0.0"),
        ({"sigma": -1.0}, "finite sigma > 0"),
        ({"sigma": math.inf}, "finite sigma > 0"),
        ({"sigma": math.nan}, "finite sigma > 0"),
        ({"importance": torch.zeros(4)}, r"importance of shape \(3,\).*got \(4,\)"),
        ({"importance": torch.tensor([0, -1.0, 0])}, "importance >= 0"),
        ({"importance": torch.tensor([0, math.nan, 0])}, "importance >= 0"),
        ({"combine": "max"}, r"combine to be one of \['product', 'min'\]; got 'max'"),
        ({"reduction": "sum"}, "reduction to be one of"),
        ({"signed": "abs"}, "signed to be one of"),
        ({"method": "conv"}, "method to be one of"),
    ],
)
def test_bad_arguments_say_what_was_expected(arguments, message):
    with pytest.raises(ValueError, match=f"inhibition expects.*{message}"):
        inhibition_loss(H, **arguments)


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4), (2, 3, 4, 5), (0, 3), (3, 0)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"activations \(B, N\)"):
        inhibition_loss(torch.zeros(shape))


def test_the_four_forms_and_the_released_one():
    assert {n: (f.local, f.discount) for n, f in FORMS.items()} == {
        "sni": (False, False), "slni": (True, False), "snid": (False, True),
        "slnid": (True, True), "released": (True, True),
    }  # fmt: skip
    assert [n for n, f in FORMS.items() if f.combine == "min"] == ["released"]
    with pytest.raises(ValueError, match="combine to be one of"):
        InhibitionForm(True, True, combine="sum")
    with pytest.raises(ValueError, match="width >= 1"):
        inhibition_operator(0)


# importance of units ----------------------------------------------------------------------------


def test_sensitivity_of_a_small_network_by_hand():
    x = torch.tensor([[1.0, 0], [0, 2], [-1, 1]], dtype=torch.float64)
    head = torch.tensor([[1.0, -2, 3], [0, 1, 1]], dtype=torch.float64)
    first = torch.tensor([[1.0, 0], [-1, 1], [0, 1]], dtype=torch.float64)
    h = (x.requires_grad_() @ first.T).relu()
    assert h.tolist() == [[1, 0, 0], [0, 2, 2], [0, 2, 1]]
    out = h @ head.T
    post = (2 * out @ head).abs().sum(0)  # d |out|^2 / dh = 2 out^T head, sample by sample
    pre = ((2 * out @ head).abs() * (h > 0)).sum(0)
    for at, want in (("post", post), ("pre", pre)):
        objective = ((x @ first.T).relu() @ head.T).square().sum()
        assert objective.item() == out.square().sum().item()
        h = (x @ first.T).relu()
        (got,) = neuron_sensitivity((h @ head.T).square().sum(), [h], at=at)
        torch.testing.assert_close(got, want)
    assert pre.tolist() != post.tolist()


def test_sensitivity_adds_up_over_batches_of_any_size():
    net = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4)).double()
    x, y = torch.randn(12, 6).double(), torch.arange(12) % 4

    def measured(size):
        total = torch.zeros(9).double()
        for rows in torch.arange(12).split(size):
            h = net[:2](x[rows])
            loss = F.cross_entropy(net[2](h), y[rows], reduction="sum")
            total += neuron_sensitivity(loss, [h])[0]
        return total

    for size in (1, 5, 12):
        torch.testing.assert_close(measured(size), measured(3))
    h = net[:2](x)
    mean_gradient = torch.autograd.grad(F.cross_entropy(net[2](h), y, reduction="sum"), h)[0].sum(0)
    assert (measured(3) > mean_gradient.abs() + 1e-6).any()  # magnitudes per sample, then the sum


def test_sensitivity_of_channels_and_of_layers_that_do_not_matter():
    maps = torch.rand(2, 3, 2, 2).double().requires_grad_()
    other = torch.rand(2, 5).double().requires_grad_()
    weights = torch.tensor([1.0, -2.0, 0.5]).double()
    objective = (maps.sum((2, 3)) * weights).sum() + 0 * maps.sum()
    channel, nothing = neuron_sensitivity(objective, [maps, other])
    torch.testing.assert_close(channel, 8 * weights.abs())
    assert nothing.tolist() == [0] * 5
    with pytest.raises(ValueError, match="at to be one of"):
        neuron_sensitivity(objective, [maps], at="both")
    with pytest.raises(ValueError, match=r"\(B, N\) or \(B, N, H, W\); got \(3,\)"):
        neuron_sensitivity(objective, [weights])


def test_a_layer_without_gradient_counts_nothing():
    w = torch.tensor([[1.0, -2.0]], dtype=torch.float64, requires_grad=True)
    frozen = torch.rand(3, 2, dtype=torch.float64)
    h = frozen * w
    found = neuron_sensitivity(h.sum(), [frozen, h], at="post")
    assert found[0].tolist() == [0, 0]
    assert found[1].tolist() == [3, 3]
