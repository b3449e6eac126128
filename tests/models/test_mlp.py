"""The multi-layer perceptron: its size, its forward pass, its errors."""

from __future__ import annotations

import pytest
import torch

from avalanche_ext.models.mlp import MLP


@pytest.mark.parametrize(
    ("arguments", "parameters"),
    [((784, (100, 100), 10), 89_610), ((8, (16,), 6), 8 * 16 + 16 + 16 * 6 + 6), ((8, (), 6), 54)],
)
def test_number_of_parameters(arguments, parameters):
    assert sum(p.numel() for p in MLP(*arguments).parameters()) == parameters


def test_forward_is_flatten_then_linear_and_relu_and_a_linear_classifier():
    model = MLP(12, (5, 4), 3)
    x = torch.randn(6, 3, 2, 2)
    first, second = model.features[0], model.features[2]
    h = (x.reshape(6, 12) @ first.weight.T + first.bias).clamp(min=0)
    h = (h @ second.weight.T + second.bias).clamp(min=0)
    want = h @ model.classifier.weight.T + model.classifier.bias
    torch.testing.assert_close(model(x), want)


def test_names_of_the_layers_are_stable():
    names = [name for name, _ in MLP(2, (3, 3), 2).named_parameters()]
    assert names == [
        f"{layer}.{kind}"
        for layer in ("features.0", "features.2", "classifier")
        for kind in ("weight", "bias")
    ]


@pytest.mark.parametrize("arguments", [(0, (4,), 2), (3, (4, 0), 2), (3, (4,), -1)])
def test_widths_must_be_positive(arguments):
    with pytest.raises(ValueError, match="positive widths"):
        MLP(*arguments)
