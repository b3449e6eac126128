import pytest
import torch
from torch import nn

from avalanche_ext.models.backbones import build_backbone, freeze

# Without heads; counted by hand from the layers' shapes.
SIZES = {
    "small_convnet": (3 * 32 * 9 + 64 + 32 * 64 * 9 + 128 + 64 * 128 * 9 + 256, 128),
    "cifar_resnet18": (11_168_832, 512),
    "cifar_resnet32": (466_256, 64),
}


@pytest.mark.parametrize("name", SIZES)
def test_size_features_and_head(name):
    extractor = build_backbone(name, 0, (3, 32, 32))
    n, width = SIZES[name]
    assert sum(p.numel() for p in extractor.parameters()) == n
    assert extractor.num_features == width
    assert extractor(torch.zeros(2, 3, 32, 32)).shape == (2, width)
    whole = build_backbone(name, 7, (3, 32, 32))
    assert sum(p.numel() for p in whole.parameters()) == n + 7 * width + 7
    assert whole(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


def test_cifar_resnet32_is_what_its_name_says():
    network = build_backbone("cifar_resnet32", 10, (3, 32, 32))
    main = [n for n, m in network.named_modules()
            if isinstance(m, nn.Conv2d | nn.Linear) and "downsample" not in n]  # fmt: skip
    assert len(main) == 32
    stage = [0, 0, 0]
    for k, (a, b) in enumerate(((16, 16), (16, 32), (32, 64))):
        stage[k] = 9 * a * b + 9 * 9 * b * b + 10 * 2 * b + (a * b + 2 * b if a != b else 0)
    assert 27 * 16 + 32 + sum(stage) == SIZES["cifar_resnet32"][0]


@pytest.mark.parametrize("name", ["cifar_resnet18", "cifar_resnet32"])
def test_each_blocks_last_norm_starts_at_zero_and_nothing_else_does(name):
    network = build_backbone(name, 10, (3, 32, 32))
    norms = {n: m for n, m in network.named_modules() if isinstance(m, nn.BatchNorm2d)}
    for n, module in norms.items():
        assert module.weight.abs().sum().item() == (0 if n.endswith("bn2") else len(module.weight))


def test_resolution_is_kept_until_the_second_stage():
    network = build_backbone("cifar_resnet18", 10, (3, 32, 32))
    sizes = {}
    for n in ("layer1", "layer2", "layer3", "layer4"):
        getattr(network, n).register_forward_hook(
            lambda m, i, o, n=n: sizes.update({n: o.shape[1:]})
        )
    network(torch.zeros(1, 3, 32, 32))
    assert sizes == {"layer1": (64, 32, 32), "layer2": (128, 16, 16),
                     "layer3": (256, 8, 8), "layer4": (512, 4, 4)}  # fmt: skip


def test_mlp_and_gray_images():
    network = build_backbone("mlp", 10, (1, 28, 28), hidden=(100, 100))
    assert sum(p.numel() for p in network.parameters()) == 89_610
    extractor = build_backbone("mlp", 0, (1, 28, 28), hidden=(30, 20))
    assert extractor(torch.zeros(3, 1, 28, 28)).shape == (3, 20)
    assert extractor.num_features == 20
    assert build_backbone("small_convnet", 4, (1, 8, 8))(torch.zeros(2, 1, 8, 8)).shape == (2, 4)


def test_any_timm_model():
    network = build_backbone("resnet10t", 5, (3, 64, 64))
    assert network(torch.zeros(2, 3, 64, 64)).shape == (2, 5)
    assert build_backbone("resnet10t", 0, (3, 64, 64)).num_features == 512


def test_weights_from_a_file(tmp_path):
    source = build_backbone("resnet10t", 1000, (3, 64, 64))
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    copy = build_backbone("resnet10t", 5, (3, 64, 64), pretrained=str(tmp_path / "weights.pth"))
    assert torch.equal(copy.layer4[0].conv1.weight, source.layer4[0].conv1.weight)
    assert copy.fc.weight.shape == (5, 512)


def test_freeze_stops_parameters_not_batch_statistics():
    network = build_backbone("cifar_resnet18", 5, (3, 32, 32))
    freeze(network, ("conv1", "bn1", "layer1"))
    frozen = {n for n, p in network.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in network.named_parameters()
                      if n.split(".")[0] in ("conv1", "bn1", "layer1")}  # fmt: skip
    before = network.bn1.running_mean.clone()
    network(torch.randn(4, 3, 32, 32))
    assert not torch.equal(before, network.bn1.running_mean)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: build_backbone("cifar_resnet19", 2, (3, 32, 32)), ValueError, "cifar_resnet18"),
        (lambda: build_backbone("small_convnet", 2, (64,)), ValueError, "channels, height"),
        (lambda: build_backbone("mlp", 2, (64,), pretrained=True), ValueError, "no pretrained"),
        (lambda: build_backbone("resnet10t", 2, (3, 8, 8), pretrained="absent.pth"),
         FileNotFoundError, "absent.pth"),
        (lambda: build_backbone("mlp", 0, (64,), hidden=()), ValueError, "positive widths"),
        (lambda: freeze(build_backbone("small_convnet", 2, (3, 8, 8)), ("feature",)), ValueError,
         "'features'"),
    ],
)  # fmt: skip
def test_errors_say_what_to_do(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_unreachable_weights_are_an_error_that_says_so(monkeypatch):
    import timm

    def unreachable(*args, **options):
        raise OSError("no route")

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(FileNotFoundError, match="could not be fetched"):
        build_backbone("resnet50.tv_in1k", 50, (3, 128, 128), pretrained=True)


def test_the_networks_of_selfless_learning():
    x = torch.rand(2, 3, 32, 32)
    small = build_backbone("conv_mlp", 10, (3, 32, 32), hidden=(256, 128))
    assert small(x).shape == (2, 10)
    # Four convolutions, then 64 x 8 x 8 numbers.
    convolutions = (27 + 1) * 32 + (288 + 1) * 32 + (288 + 1) * 64 + (576 + 1) * 64
    assert sum(p.numel() for p in small.features.parameters()) == convolutions
    assert small.hidden.features[0].weight.shape == (256, 4096)
    slim = build_backbone("vgg11_slim", 20, (3, 56, 56), hidden=(500, 500))
    assert slim.hidden.features[0].weight.shape == (500, 25088)
    assert slim.num_features == 500
    bare = build_backbone("conv_mlp", 0, (1, 28, 28), hidden=(7,))
    assert bare(torch.rand(2, 1, 28, 28)).shape == (2, 7)
    assert build_backbone("maxout_mlp", 4, (1, 8, 8), hidden=(6, 6))(x[:, :1, :8, :8]).shape == (
        2,
        4,
    )
    with pytest.raises(ValueError, match="too small"):
        build_backbone("vgg11_slim", 2, (3, 7, 7))
