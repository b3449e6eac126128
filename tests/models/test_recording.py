"""Which layers are selected, what is recorded, and that no hook outlives the recording."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import timm
import torch
from avalanche.models import SimpleMLP
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet18

from avalanche_ext.models.mlp import MLP
from avalanche_ext.models.recording import ActivationRecorder, select_layers

STAGES = ["layer1", "layer2", "layer3", "layer4"]


def mlp() -> MLP:
    return MLP(8, (5, 4), 3)


def vit() -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224", pretrained=False, img_size=32, patch_size=16, depth=2,
        embed_dim=12, num_heads=2, num_classes=3,
    )  # fmt: skip


def timm_resnet() -> nn.Module:
    return timm.create_model("test_resnet", pretrained=False, num_classes=3)


class Functional(nn.Module):
    """An activation without a module."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.b(F.relu(self.a(x)))


class Twice(nn.Module):
    """One activation module that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.act, self.b = nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)

    def forward(self, x):
        return self.act(self.b(self.act(self.a(x))))


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def record(model: nn.Module, layers, x: torch.Tensor):
    """The names and tensors recorded in one forward pass, and its output."""
    recorder = ActivationRecorder(layers)
    recorder.attach(model)
    output = model(x)
    recorder.detach()
    assert hooks(model) == 0
    pairs = recorder.pop()
    return [name for name, _ in pairs], [h for _, h in pairs], output


# selection --------------------------------------------------------------------------------------

OUT = "output"


@pytest.mark.parametrize(
    ("make", "preset", "taps", "logits"),
    [
        (mlp, "auto", [("features.1", OUT), ("features.3", OUT)], True),
        (mlp, "activations", [("features.1", OUT), ("features.3", OUT)], True),
        (mlp, "logits", [], True),
        (mlp, "leaves", [(f"features.{i}", OUT) for i in range(4)] + [("classifier", OUT)], False),
        (resnet18, "auto", [("layer4", OUT), ("fc", "input")], True),
        (resnet18, "stages", [(n, OUT) for n in ["maxpool", *STAGES]], True),
        (vit, "auto", [("head", "input")], True),
        (vit, "activations", [("blocks.0.mlp.act", OUT), ("blocks.1.mlp.act", OUT)], True),
        (vit, "stages", [("blocks.0", OUT), ("blocks.1", OUT)], True),
        (timm_resnet, "auto", [("layer4", OUT), ("fc", "input")], True),
        (timm_resnet, "stages", [(n, OUT) for n in ["act1", *STAGES]], True),
    ],
)
def test_presets(make, preset, taps, logits):
    assert select_layers(make(), preset) == (taps, logits)


@pytest.mark.parametrize(
    ("layers", "names", "logits"),
    [
        ("features.1", ["features.1"], False),
        ("features.[13]", ["features.1", "features.3"], False),
        ("*s*.0", ["features.0"], False),
        (nn.ReLU, ["features.1", "features.3"], False),
        (["classifier", nn.ReLU, "features.1"], ["classifier", "features.1", "features.3"], False),
        (["features.1", "logits"], ["features.1"], True),
        (("logits",), [], True),
        (lambda name, m: isinstance(m, nn.Linear) and name != "classifier",
         ["features.0", "features.2"], False),
    ],
)  # fmt: skip
def test_names_patterns_types_and_predicates(layers, names, logits):
    assert select_layers(mlp(), layers) == ([(name, OUT) for name in names], logits)


def test_a_module_named_logits_is_a_module_in_a_list():
    model = nn.Sequential()
    model.add_module("logits", nn.Linear(8, 3))
    assert select_layers(model, ["logits"]) == ([("logits", OUT)], False)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("features.l", r"'features\.l'.*Close: .*'features\.1'"),
        (["features.1", "classifer"], "'classifer'.*Close: .*'classifier'"),
        ("activation", "Close: .*'activations'"),
        ("zzz*", "It has .*'features.0'"),
        (nn.GELU, r"no module of type GELU; it has \['Linear', 'ReLU', 'Sequential'\]"),
        ([], "layers is empty"),
        (lambda name, m: False, "accepts no module of MLP"),
        ("stages", "stages.*MLP lacks .*'layer4'"),
    ],
)
def test_what_matches_nothing_is_an_error_with_a_hint(layers, message):
    with pytest.raises(ValueError, match=message):
        select_layers(mlp(), layers)


@pytest.mark.parametrize("preset", ["auto", "activations"])
def test_without_activation_modules_the_linear_layers_are_used_with_a_warning(preset):
    with pytest.warns(UserWarning, match="Functional has no activation modules.*2 linear"):
        taps, logits = select_layers(Functional(), preset)
    assert taps == [("a", OUT), ("b", OUT)]
    assert logits


def test_a_model_with_activation_modules_gives_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        select_layers(mlp())


@pytest.mark.parametrize("wrap", ["compile", "distributed"])
def test_names_are_those_of_the_network_inside_a_wrapper(wrap):
    model = mlp()
    if wrap == "compile":
        wrapped = torch.compile(model, backend="eager")
    else:
        torch.distributed.init_process_group(
            "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
        )
        wrapped = nn.parallel.DistributedDataParallel(model)
    try:
        assert select_layers(wrapped, "features.1") == ([("features.1", OUT)], False)
        names, tensors, _ = record(wrapped, "auto", torch.randn(2, 8))
        assert names == ["features.1", "features.3"]
        assert [h.shape for h in tensors] == [(2, 5), (2, 4)]
    finally:
        if wrap == "distributed":
            torch.distributed.destroy_process_group()


# recording --------------------------------------------------------------------------------------


def test_records_the_outputs_of_the_layers_in_the_order_of_the_forward_pass():
    model, x = mlp(), torch.randn(6, 8)
    names, tensors, output = record(model, ["classifier", "features.3", "features.1"], x)
    assert names == ["features.1", "features.3", "classifier"]
    h1 = model.features[1](model.features[0](x))
    h2 = model.features[3](model.features[2](h1))
    for got, want in zip(tensors, (h1, h2, model.classifier(h2)), strict=True):
        assert torch.equal(got, want)
        assert got.requires_grad
    assert tensors[-1] is output


def test_auto_on_a_residual_network_records_the_last_map_and_the_pooled_vector():
    model, x = resnet18(weights=None).eval(), torch.randn(2, 3, 32, 32)
    names, (maps, pooled), output = record(model, "auto", x)
    assert names == ["layer4", "fc"]
    assert maps.shape == (2, 512, 1, 1)
    torch.testing.assert_close(pooled, maps.mean((2, 3)))
    torch.testing.assert_close(model.fc(pooled), output)


def test_auto_on_a_timm_model_records_the_input_of_the_classifier():
    model, x = vit().eval(), torch.randn(2, 3, 32, 32)
    names, (pooled,), output = record(model, "auto", x)
    assert names == ["head"]
    assert torch.equal(pooled, model.forward_head(model.forward_features(x), pre_logits=True))
    assert torch.equal(model.get_classifier()(pooled), output)


def test_layers_that_share_one_tensor_are_recorded_once():
    model = SimpleMLP(num_classes=3, input_size=8, hidden_size=5, hidden_layers=2, drop_rate=0)
    names, tensors, _ = record(model, "leaves", torch.randn(4, 8))
    # Linear -> ReLU(inplace) -> Dropout(0) is one tensor; its first layer gives the name
    assert names == ["features.0", "features.3.0", "classifier"]
    assert all((h >= 0).all() for h in tensors[:2])  # after the ReLU
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Identity(), nn.Flatten())
    assert record(model, "leaves", torch.randn(4, 1, 3, 3))[0] == ["0"]


def test_views_with_another_first_axis_are_different_recordings():
    model = nn.Sequential(nn.Linear(8, 6), nn.Unflatten(1, (2, 3)), nn.Flatten(0, 1))
    names, tensors, _ = record(model, "leaves", torch.randn(4, 8))
    assert names == ["0", "2"]
    assert [len(h) for h in tensors] == [4, 8]


def test_a_module_called_twice_gives_two_tensors():
    model, x = Twice(), torch.randn(3, 8)
    names, tensors, output = record(model, nn.Tanh, x)
    assert names == ["act", "act"]
    assert torch.equal(tensors[0], model.act(model.a(x)))
    assert tensors[1] is output
    assert not torch.equal(*tensors)


def test_outputs_that_are_no_tensors_are_listed_as_silent():
    model = nn.Sequential(nn.Linear(8, 4), nn.LSTM(4, 2))
    recorder = ActivationRecorder(["0", "1"])
    recorder.attach(model)
    model(torch.randn(3, 8))
    assert [name for name, _ in recorder.pop()] == ["0"]
    assert recorder.silent == ["1"]


def test_nothing_is_recorded_after_detach_nor_kept_after_pop():
    model, x = mlp(), torch.randn(2, 8)
    recorder = ActivationRecorder()
    recorder.attach(model)
    model(x)
    recorder.detach()
    model(x)
    assert len(recorder.pop()) == 2
    assert recorder.pop() == []


def test_attaching_again_drops_the_old_hooks_and_recordings():
    model, x = mlp(), torch.randn(2, 8)
    recorder = ActivationRecorder()
    for _ in range(3):
        recorder.attach(model)
        model(x)
    assert hooks(model) == 2
    assert len(recorder.pop()) == 2


def test_given_taps_replace_the_look_up():
    model, x = mlp(), torch.randn(2, 8)
    recorder = ActivationRecorder("no such layer")
    recorder.attach(model, [("classifier", "input"), ("classifier", OUT)])
    output = model(x)
    (_, h), (_, logits) = recorder.pop()
    assert torch.equal(model.classifier(h), output)
    assert logits is output


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_a_recorded_model_are_clean(clone):
    model, x = mlp(), torch.randn(2, 8)
    record(model, "auto", x)
    copied = clone(model)
    assert hooks(copied) == 0
    assert torch.equal(copied(x), model(x))


def test_recording_does_not_change_the_output():
    model, x = mlp(), torch.randn(2, 8)
    assert torch.equal(record(model, "leaves", x)[2], model(x))
