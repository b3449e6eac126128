"""The head of fixed size against Avalanche's growing one."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from avalanche.models import IncrementalClassifier, MultiHeadClassifier
from torch import nn
from torch.nn import functional as F

from avalanche_ext.models.heads import FixedSizeClassifier
from avalanche_ext.models.recording import mask_value

WIDTH, CLASSES = 5, 9


def experience(*classes):
    return SimpleNamespace(classes_in_this_experience=list(classes))


def pair(initial=2, masking=True, seed=4):
    """Both heads, each made from the same random state, and that state behind each."""
    heads, states = [], []
    for make in (
        lambda: IncrementalClassifier(WIDTH, initial, masking=masking),
        lambda: FixedSizeClassifier(WIDTH, CLASSES, initial_out_features=initial, masking=masking),
    ):
        torch.manual_seed(seed)
        heads.append(make())
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    return heads


def adapt(heads, exp, *, training=True):
    """Adapt both from the same random state; what they draw must be the same too."""
    state = torch.get_rng_state()
    after = []
    for head in heads:
        torch.set_rng_state(state)
        head.train(training).adaptation(exp)
        after.append(torch.get_rng_state())
    assert torch.equal(*after)


def assert_equal(growing, fixed):
    n = growing.classifier.out_features
    assert int(fixed.units_in_use) == n
    assert torch.equal(fixed.classifier.weight[:n], growing.classifier.weight)
    assert torch.equal(fixed.classifier.bias[:n], growing.classifier.bias)
    assert not fixed.classifier.weight[n:].any()
    assert not fixed.classifier.bias[n:].any()
    x = torch.randn(6, WIDTH)
    torch.testing.assert_close(fixed(x)[:, :n], growing(x), rtol=1e-6, atol=1e-6)
    assert (fixed(x)[:, n:] == -1000).all()


@pytest.mark.parametrize("masking", [True, False])
@pytest.mark.parametrize("initial", [1, 2, 4])
def test_it_grows_as_the_growing_head_does(initial, masking):
    heads = pair(initial, masking)
    assert_equal(*heads)
    for classes, training in (
        ((0, 1), True), ((5, 3), True), ((2,), True), ((8,), False), ((8, 6), True), ((0,), True),
    ):  # fmt: skip
        adapt(heads, experience(*classes), training=training)
        assert_equal(*heads)


def test_units_of_test_classes_are_drawn_in_evaluation_and_stay_masked():
    heads = pair()
    adapt(heads, experience(0, 1))
    adapt(heads, experience(7), training=False)
    fixed = heads[1]
    assert int(fixed.units_in_use) == 8
    assert fixed.active_units.tolist() == [1, 1, 0, 0, 0, 0, 0, 0, 0]
    assert fixed.classifier.weight[7].any()
    assert (fixed(torch.randn(3, WIDTH))[:, 2:] == -1000).all()


def test_loss_gradient_and_prediction_are_those_of_the_growing_head():
    growing, fixed = heads = pair()
    adapt(heads, experience(0, 1))
    adapt(heads, experience(4, 2))
    x, y = torch.randn(12, WIDTH), torch.tensor([0, 1, 2, 4] * 3)
    losses = [F.cross_entropy(head(x), y) for head in heads]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-6)
    weight, bias = fixed.classifier.weight.grad, fixed.classifier.bias.grad
    torch.testing.assert_close(weight[:5], growing.classifier.weight.grad, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(bias[:5], growing.classifier.bias.grad, rtol=1e-6, atol=1e-6)
    assert not weight[5:].any()
    assert not weight[3].any()  # in use, not seen
    assert torch.equal(growing(x).argmax(1), fixed(x).argmax(1))


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1),
    ],
)
def test_rows_of_units_not_in_use_stay_zero(optimizer):
    head = FixedSizeClassifier(WIDTH, CLASSES)
    head.adaptation(experience(0, 3))
    step = optimizer(head.parameters())
    for _ in range(5):
        step.zero_grad()
        F.cross_entropy(head(torch.randn(8, WIDTH)), torch.tensor([0, 3] * 4)).backward()
        step.step()
    assert not head.classifier.weight[4:].any()
    assert head.classifier.weight[:4].all()


def test_every_tensor_stays_the_same_object_of_the_same_shape():
    head = FixedSizeClassifier(WIDTH, CLASSES)
    tensors = dict(head.named_parameters()) | dict(head.named_buffers())
    shapes = {name: t.shape for name, t in tensors.items()}
    for classes in ((0, 1), (6,), (8, 2)):
        head.adaptation(experience(*classes))
    now = dict(head.named_parameters()) | dict(head.named_buffers())
    assert {name: id(t) for name, t in now.items()} == {n: id(t) for n, t in tensors.items()}
    assert {name: t.shape for name, t in now.items()} == shapes


@pytest.mark.parametrize("masking", [True, False])
def test_conversion_keeps_what_was_learned_and_draws_nothing(masking):
    growing = IncrementalClassifier(WIDTH, 3, masking=masking, mask_value=-50, auto_adapt=False)
    growing.adaptation(experience(0, 5))
    growing.eval()
    growing.classifier.bias.requires_grad_(False)
    before = torch.get_rng_state()
    fixed = FixedSizeClassifier.from_incremental(growing, CLASSES)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(fixed.classifier.weight[:6], growing.classifier.weight)
    x = torch.randn(4, WIDTH)
    torch.testing.assert_close(fixed(x)[:, :6], growing(x), rtol=1e-6, atol=1e-6)
    assert (fixed(x)[:, 6:] == -50).all()
    assert mask_value(nn.Sequential(fixed)) == -50
    assert not fixed.training
    assert not fixed._auto_adapt
    assert fixed.classifier.weight.requires_grad
    assert not fixed.classifier.bias.requires_grad
    growing.train(), fixed.train()
    adapt((growing, fixed), experience(7))
    assert torch.equal(fixed.classifier.weight[:8], growing.classifier.weight)


def test_conversion_keeps_device_and_dtype():
    fixed = FixedSizeClassifier.from_incremental(IncrementalClassifier(WIDTH).double(), 4)
    assert fixed.classifier.weight.dtype == torch.float64
    fixed.adaptation(experience(3))
    assert fixed(torch.randn(2, WIDTH).double()).dtype == torch.float64


def test_its_state_and_copies_carry_everything():
    head = FixedSizeClassifier(WIDTH, CLASSES)
    head.adaptation(experience(0, 4))
    loaded = FixedSizeClassifier(WIDTH, CLASSES)
    loaded.load_state_dict(head.state_dict())
    for twin in (loaded, copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        torch.manual_seed(8)
        head_again = copy.deepcopy(head)
        torch.manual_seed(8)
        twin.adaptation(experience(6))
        torch.manual_seed(8)
        head_again.adaptation(experience(6))
        expected = head_again.state_dict()
        assert all(torch.equal(t, expected[name]) for name, t in twin.state_dict().items())
    assert int(head.units_in_use) == 5


def test_more_classes_than_units_is_an_error():
    head = FixedSizeClassifier(WIDTH, 4)
    with pytest.raises(ValueError, match=r"label 4 needs 5 units.*max_classes=4"):
        head.adaptation(experience(1, 4))
    with pytest.raises(ValueError, match="label 9"):
        head.eval().adaptation(experience(9))
    with pytest.raises(ValueError, match="needs 6 units"):
        FixedSizeClassifier.from_incremental(IncrementalClassifier(WIDTH, 6), 4)
    with pytest.raises(ValueError, match="needs 2 units"):
        FixedSizeClassifier(WIDTH, 1)


@pytest.mark.parametrize("bad", [0, -1, 2.0, True, None])
def test_max_classes_is_a_count(bad):
    with pytest.raises(ValueError, match="whole number max_classes >= 1"):
        FixedSizeClassifier(WIDTH, bad)


def test_other_heads_are_refused():
    class Mine(IncrementalClassifier):
        pass

    for head in (MultiHeadClassifier(WIDTH), Mine(WIDTH), nn.Linear(WIDTH, 3)):
        with pytest.raises(TypeError, match=f"not a {type(head).__name__}"):
            FixedSizeClassifier.from_incremental(head, CLASSES)
