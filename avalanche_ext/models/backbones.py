"""Networks by name: for CIFAR-sized images, a small one, an MLP, and every timm model.

``n_classes=0`` gives the feature extractor alone, ``(B, num_features)``: what the systems that grow
their own classifier start from.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from avalanche_ext.models.competition import CompetitiveMLP
from avalanche_ext.models.mlp import MLP

__all__ = [
    "BACKBONES",
    "CIFARResNet",
    "PlainConvNet",
    "SmallConvNet",
    "build_backbone",
    "check_features",
    "feature_width",
    "freeze",
]

BACKBONES = (
    "mlp", "maxout_mlp", "lwta_mlp", "small_convnet", "conv_mlp", "vgg11_slim", "cifar_resnet18",
    "cifar_resnet32",
)  # fmt: skip
# Channels of the convolutions, "M" a pooling.
_PLAIN = {
    "conv_mlp": (32, 32, "M", 64, 64, "M"),
    "vgg11_slim": (64, "M", 128, "M", 256, 256, "M", 512, 512),
}


def build_backbone(
    name: str,
    n_classes: int,
    in_shape: Sequence[int],
    *,
    pretrained: bool | str | Path = False,
    hidden: Sequence[int] = (100, 100),
) -> nn.Module:
    """The network of that name with a fresh head of ``n_classes`` units.

    Args:
        name: ``"mlp"``; ``"maxout_mlp"`` and ``"lwta_mlp"``, whose hidden units compete in pairs;
            ``"small_convnet"`` (three convolutions); ``"conv_mlp"`` (four) and ``"vgg11_slim"``
            (seven), both with fully connected hidden layers behind; ``"cifar_resnet18"`` (ResNet-18
            with a 3 x 3 stem of stride 1 and no max-pooling) and ``"cifar_resnet32"`` (three stages
            of 16, 32, 64 channels), both for images of 32 x 32; or any name of ``timm.list_models``,
            such as ``"resnet50.tv_in1k"``.
        n_classes: Units of the head; 0 for none: the output is ``(B, num_features)``.
        in_shape: Shape of one image, ``(channels, height, width)``.
        pretrained: Start from ImageNet's weights: ``True`` fetches those of timm, a path reads
            them from a file. Only for timm's names.
        hidden: Widths of the fully connected hidden layers.

    Returns:
        The network, with attribute ``num_features``.

    Raises:
        ValueError: For an unknown name (near matches are listed), or ``pretrained`` where there
            are no weights.
        FileNotFoundError: If the weights cannot be fetched or read.
    """  # noqa: E501 - the list of names
    if not name.endswith("mlp") and len(in_shape) != 3:
        raise ValueError(
            f"{name} expects images of shape (channels, height, width); got {tuple(in_shape)}. "
            f"Only 'mlp' takes other shapes."
        )
    if name not in BACKBONES:
        return _timm(name, n_classes, in_shape[0], pretrained)
    if pretrained:
        raise ValueError(
            f"there are no pretrained weights of {name!r}; use a timm name such as "
            f"'resnet50.tv_in1k', or pretrained=False."
        )
    if name == "mlp":
        return MLP(math.prod(in_shape), hidden, n_classes)
    if name in ("maxout_mlp", "lwta_mlp"):
        competition = name.removesuffix("_mlp")
        return CompetitiveMLP(math.prod(in_shape), hidden, n_classes, activation=competition)
    if name == "small_convnet":
        return SmallConvNet(n_classes, in_shape[0])
    if name in _PLAIN:
        return PlainConvNet(_PLAIN[name], hidden, n_classes, in_shape)
    if name == "cifar_resnet32":
        return CIFARResNet(5, n_classes, in_shape[0])
    return _cifar_resnet18(n_classes, in_shape[0])


def freeze(model: nn.Module, names: Sequence[str]) -> None:
    """Stop training the parameters of some modules.

    Batch statistics of a frozen module still follow the data in train mode.

    Args:
        model: The network.
        names: Names of its modules, such as ``("conv1", "bn1", "layer1")``.

    Raises:
        ValueError: If there is no module of a name; near matches are listed.
    """
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules or not name:
            near = difflib.get_close_matches(name, modules, n=4, cutoff=0.4) or list(modules)[1:9]
            raise ValueError(f"the network has no module {name!r} to freeze; near: {near}.")
        modules[name].requires_grad_(False)


class SmallConvNet(nn.Module):
    """Three 3 x 3 convolutions with batch norm and ReLU, halving the image twice, then a mean.

    Args:
        n_classes: Units of the head; 0 for none.
        channels_in: Channels of the images.
        widths: Channels of the convolutions.

    Shapes:
        ``(B, channels_in, H, W)`` to ``(B, n_classes)``, or ``(B, widths[-1])`` without a head.
    """

    def __init__(
        self, n_classes: int, channels_in: int = 3, widths: Sequence[int] = (32, 64, 128)
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = channels_in
        for k, width in enumerate(widths):
            layers += [
                nn.Conv2d(before, width, 3, stride=1 if k == 0 else 2, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
            before = width
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.num_features = before
        self.fc = nn.Linear(before, n_classes) if n_classes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.fc(self.features(x))


class PlainConvNet(nn.Module):
    """3 x 3 convolutions, ReLU and pooling, then fully connected layers; no batch norm.

    The networks of Selfless Sequential Learning for CIFAR-100 and Tiny ImageNet are of this form.

    Args:
        convolutions: Channels of each convolution, and ``"M"`` for a 2 x 2 max-pooling.
        hidden: Widths of the fully connected hidden layers.
        n_classes: Units of the head; 0 for none.
        in_shape: Shape of one image, ``(channels, height, width)``.

    Shapes:
        ``(B, *in_shape)`` to ``(B, n_classes)``, or ``(B, hidden[-1])`` without a head.
    """

    def __init__(
        self, convolutions: Sequence[int | str], hidden: Sequence[int], n_classes: int,
        in_shape: Sequence[int],
    ) -> None:  # fmt: skip
        super().__init__()
        channels, height, width = in_shape
        layers: list[nn.Module] = []
        for entry in convolutions:
            if isinstance(entry, str):
                layers.append(nn.MaxPool2d(2))
                height, width = height // 2, width // 2
            else:
                layers += [nn.Conv2d(channels, entry, 3, padding=1), nn.ReLU()]
                channels = entry
        if not height or not width:
            raise ValueError(f"images of {tuple(in_shape)} are too small for {convolutions}.")
        self.features = nn.Sequential(*layers, nn.Flatten())
        self.hidden = MLP(channels * height * width, hidden, 0)
        self.num_features = self.hidden.num_features
        self.fc = nn.Linear(self.num_features, n_classes) if n_classes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.fc(self.hidden(self.features(x)))


class _Block(nn.Module):
    downsample: nn.Module | None

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = None
        if stride != 1 or channels_in != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )
        self.act2 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        return self.act2(y + (x if self.downsample is None else self.downsample(x)))


class CIFARResNet(nn.Module):
    """The residual network for CIFAR: a 3 x 3 stem and three stages of 16, 32 and 64 channels.

    Shortcuts that change the shape are 1 x 1 convolutions. Each block's last batch norm starts
    at 0.

    Args:
        blocks: Blocks per stage; the depth is ``6 * blocks + 2``, so 5 gives ResNet-32.
        n_classes: Units of the head; 0 for none.
        channels_in: Channels of the images.

    Shapes:
        ``(B, channels_in, H, W)`` to ``(B, n_classes)``, or ``(B, 64)`` without a head.

    References:
        K. He et al. (2016), Deep Residual Learning for Image Recognition, section 4.2.
    """

    def __init__(self, blocks: int, n_classes: int, channels_in: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.act1 = nn.ReLU(inplace=True)
        self.layer1 = _stage(blocks, 16, 16, stride=1)
        self.layer2 = _stage(blocks, 16, 32, stride=2)
        self.layer3 = _stage(blocks, 32, 64, stride=2)
        self.num_features = 64
        self.global_pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(64, n_classes) if n_classes else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(module, _Block):
                nn.init.zeros_(module.bn2.weight)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.global_pool(x))


def _stage(blocks: int, channels_in: int, channels: int, stride: int) -> nn.Sequential:
    first = _Block(channels_in, channels, stride)
    return nn.Sequential(first, *(_Block(channels, channels, 1) for _ in range(blocks - 1)))


def _cifar_resnet18(n_classes: int, channels_in: int) -> nn.Module:
    import timm

    # timm's own, so that its fixes and its hooks come along; each block's last batch norm starts
    # at 0 there too.
    model = timm.create_model("resnet18", num_classes=n_classes, in_chans=channels_in)
    model.conv1 = nn.Conv2d(channels_in, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return model


def _timm(name: str, n_classes: int, channels_in: int, pretrained: bool | str | Path) -> nn.Module:
    import timm

    if not timm.is_model(name):
        near = difflib.get_close_matches(name, [*BACKBONES, *timm.list_models()], n=4, cutoff=0.5)
        raise ValueError(
            f"there is no network {name!r}. {'Close: ' + ', '.join(near) + '. ' if near else ''}"
            f"Known: {', '.join(BACKBONES)} and the names of timm.list_models()."
        )
    if pretrained is False:
        return timm.create_model(name, num_classes=n_classes, in_chans=channels_in)
    overlay = None
    if not isinstance(pretrained, bool):
        if not Path(pretrained).expanduser().is_file():
            raise FileNotFoundError(
                f"there is no file {pretrained} with weights of {name}; name one that holds "
                f"timm's state dictionary, or use pretrained=True or False."
            )
        overlay = {"file": str(Path(pretrained).expanduser())}
    elif not timm.is_model_pretrained(name):
        raise ValueError(f"timm has no pretrained weights of {name!r}; use pretrained=False.")
    try:
        return timm.create_model(
            name, pretrained=True, num_classes=n_classes, in_chans=channels_in,
            pretrained_cfg_overlay=overlay,
        )  # fmt: skip
    except OSError as error:
        raise FileNotFoundError(
            f"ImageNet weights of {name!r} could not be fetched ({type(error).__name__}). Connect "
            f"once and run again (they are kept), give pretrained= a file with them, or use "
            f"pretrained=False: training from random weights is another protocol."
        ) from error


def feature_width(owner: str, backbone: nn.Module) -> int:
    """Features per sample that a backbone says it gives.

    Raises:
        ValueError: If it says nothing.
    """
    width = getattr(backbone, "num_features", getattr(backbone, "out_dim", None))
    if not isinstance(width, int) or width < 1:
        raise ValueError(
            f"{owner} expects a backbone that gives features, (B, D), and says D in num_features "
            f"or out_dim; got {type(backbone).__name__} with {width!r}. "
            f"build_backbone(name, 0, in_shape) makes one."
        )
    return width


def check_features(owner: str, features: Tensor, width: int) -> None:
    """Raise unless features ``(B, D)`` have the width that the backbone says."""
    if features.ndim != 2 or features.shape[1] != width:
        raise ValueError(
            f"{owner} expects features (B, {width}) of its backbone; got {tuple(features.shape)}. "
            f"A backbone with a classifier gives logits: build it without, as "
            f"build_backbone(name, 0, in_shape) does."
        )
