"""Networks for the tests of channel masks, and a slow mask to hold the quick one to."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from avalanche_ext.models.channel_groups import find_channel_groups


class ToyResNet(nn.Module):
    """Three residual stages of 8, 16, 32 channels, and a linear layer behind flattened maps."""

    def __init__(self, width: int = 5, bias: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=bias)
        self.stem_bn = nn.BatchNorm2d(8)
        for k, (n_in, n_out) in enumerate([(8, 8), (8, 16), (16, 32)], 1):
            self.add_module(f"a{k}", nn.Conv2d(n_in, n_out, 3, max(1, n_out // n_in), 1, bias=bias))
            self.add_module(f"bn_a{k}", nn.BatchNorm2d(n_out))
            self.add_module(f"b{k}", nn.Conv2d(n_out, n_out, 3, padding=1, bias=bias))
            self.add_module(f"bn_b{k}", nn.BatchNorm2d(n_out))
            short = nn.Identity()
            if n_in != n_out:
                short = nn.Sequential(nn.Conv2d(n_in, n_out, 1, 2), nn.BatchNorm2d(n_out))
            self.add_module(f"short{k}", short)
        self.rows = nn.Linear(32 * 4, width)
        self.num_features = width

    def forward(self, x):
        x = F.relu(self.stem_bn(self.stem(x)))
        for k in (1, 2, 3):
            y = F.relu(self._modules[f"bn_a{k}"](self._modules[f"a{k}"](x)))
            y = self._modules[f"bn_b{k}"](self._modules[f"b{k}"](y))
            x = torch.relu(y + self._modules[f"short{k}"](x))
        return F.relu(self.rows(F.max_pool2d(x, 1).flatten(1)))


class Flattened(nn.Module):
    """Convolutions without batch norm, flattened maps, batch norm and linear layers behind them."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.depth = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.second = nn.Conv2d(4, 5, 3, stride=2, padding=1)
        self.flat_bn = nn.BatchNorm1d(5 * 4)
        self.hidden = nn.Linear(5 * 4, 7)
        self.hidden_bn = nn.BatchNorm1d(7)
        self.last = nn.Linear(7, width)
        self.num_features = width

    def forward(self, x):
        x = F.silu(self.depth(F.gelu(self.first(x))))
        x = F.max_pool2d(torch.tanh(self.second(x)), 2)
        x = self.flat_bn(x.view(x.size(0), -1))
        return F.relu(self.last(F.relu(self.hidden_bn(self.hidden(x)))))


def lively(network: nn.Module, seed: int = 0) -> nn.Module:
    """The network with batch norms whose every number matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.3, generator=generator)
                module.running_mean.normal_(0, 0.3, generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
    return network.eval()


def masked_by_hooks(network, groups, masks, x):
    """Output of a network whose masks multiply the outputs of its layers, one by one."""
    handles = []
    for layer in groups.layers:
        if not layer.gated:
            continue
        mask = masks[layer.writes]
        bias = network.get_submodule(layer.name).bias

        def multiply(module, inputs, output, mask=mask, layer=layer, bias=bias):
            if layer.kind == "norm":
                mask = mask.repeat_interleave(layer.pixels)
            mask = mask.view(1, -1, *[1] * (output.ndim - 2))
            if layer.kind != "depthwise":
                return output * mask
            bias = bias.view(1, -1, 1, 1)
            return output - bias + bias * mask

        module = network.get_submodule(layer.name)
        if hasattr(module, "act"):  # timm joins batch norm and activation; the mask is between

            def before(act, inputs, mask=mask):
                return inputs[0] * mask.view(1, -1, 1, 1)

            handles.append(module.act.register_forward_pre_hook(before))
        else:
            handles.append(module.register_forward_hook(multiply))
    output = network(x)
    for handle in handles:
        handle.remove()
    return output


def random_keep(network, *, residual="shared", prune_output=True, seed=0):
    """Groups of a network, and about half of the channels of each."""
    groups = find_channel_groups(network, residual=residual, prune_output=prune_output)
    generator = torch.Generator().manual_seed(seed)
    keep = [
        torch.randperm(n, generator=generator)[: max(1, n // 2)].sort().values for n in groups.sizes
    ]
    return groups, keep


def binary(groups, keep, dtype=torch.float32):
    """Binary masks of some channels."""
    return [
        torch.zeros(n, dtype=dtype).index_fill(0, k, 1.0)
        for n, k in zip(groups.sizes, keep, strict=True)
    ]
