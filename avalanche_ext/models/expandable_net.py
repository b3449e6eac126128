"""ExpandableNet: one feature extractor per experience, the old ones frozen, one classifier on all.

Not to be confused with Avalanche's ``DER``, which is Dark Experience Replay.

References:
    S. Yan, J. Xie, X. He (2021), DER: Dynamically Expandable Representation for Class Incremental
    Learning, CVPR.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from avalanche.models import DynamicModule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from avalanche_ext.functional.channel_mask import Compensation
from avalanche_ext.models.backbones import check_features, feature_width
from avalanche_ext.models.channel_gates import GatedNetwork
from avalanche_ext.models.channel_groups import Residual, find_channel_groups
from avalanche_ext.models.pruning import fold_batch_norms, prune_channels

__all__ = ["UNSEEN_LOGIT", "ChannelMasks", "ExpandableNet"]

# Logit of a label whose class has not been trained on.
UNSEEN_LOGIT = -1e4


@dataclass(frozen=True)
class ChannelMasks:
    """How the newest extractor of an ``ExpandableNet`` is masked and then pruned.

    The sources name neither ``lam`` nor ``s_max`` nor the gates' learning rate.

    Args:
        lam: Weight of the sparsity loss, >= 0: the larger, the smaller the extractors.
        s_max: Scale of the gates in the last batch of an epoch, > 0.
        lr_factor: The gates' learning rate over the network's, > 0; ``None`` is ``s_max``, HAT's.
        compensation: Gradient of the gates, see ``avalanche_ext.functional.channel_mask.gate``.
        residual: ``"shared"`` masks whole residual stages, ``"inner"`` only inside the blocks.
        min_share: Share of every layer's channels that is kept in any case.
        recalibrate: Whether batch norms measure their statistics anew once the masks are hard.
    """

    lam: float = 0.25
    s_max: float = 100.0
    lr_factor: float | None = None
    compensation: Compensation = "exact"
    residual: Residual = "shared"
    min_share: float = 0.02
    recalibrate: bool = True

    def __post_init__(self) -> None:
        factor = self.s_max if self.lr_factor is None else self.lr_factor
        given = (self.lam, self.s_max, factor, self.min_share)
        if not all(map(math.isfinite, given)) or not (
            self.lam >= 0 and self.s_max > 0 and factor > 0 and 0 <= self.min_share <= 1
        ):
            raise ValueError(
                f"ChannelMasks expects finite lam >= 0, s_max > 0 and lr_factor > 0, and min_share "
                f"from 0 to 1; got lam={self.lam}, s_max={self.s_max}, "
                f"lr_factor={self.lr_factor}, min_share={self.min_share}."
            )


class ExpandableNet(DynamicModule):
    r"""A super-feature that grows by one extractor per experience, and its classifier.

    .. math:: u = [F_1(x), \dots, F_{t-1}(x), F_t(x)], \qquad z = H_t u

    When an experience with new classes begins in training, the extractors so far are frozen,
    parameters and batch statistics, and a new one is appended: a copy of the last one, statistics
    included. The classifier has no bias; each unit belongs to one class, in the order of arrival,
    and ``forward`` puts its logits at the classes' labels. An auxiliary head on
    :math:`F_t(x)` alone tells the new classes from each other and from all old ones (its class 0);
    it lives until ``settle`` and plays no part in ``forward``.

    With ``masks`` the newest extractor is a ``GatedNetwork``; ``settle`` removes the channels that
    its masks close, from the features too, so extractors differ in width (``widths``). The next
    one starts from the weights before that surgery, with new masks. Frozen extractors have their
    batch norms folded into the layers before them.

    Args:
        backbone: The first extractor, ``(B, ...)`` to ``(B, D)``; ``build_backbone(name, 0, shape)``
            gives one. Its width is ``num_features``, or ``out_dim``.
        n_outputs: Least width of the output; it is widened when a larger label is seen.
        inherit: Whether the grown classifier keeps the weights of the old one for old classes on
            old features; else all are drawn anew.

    Shapes:
        Input what the backbone takes; output ``(B, n_outputs)``. Before the first training all
        logits are ``UNSEEN_LOGIT``.

    Raises:
        ValueError: If the backbone has no features; if masks are asked for and the channels of the
            backbone cannot be followed; when an experience brings no new class.
    """  # noqa: E501 - one argument

    width: int
    widths: list[int]
    n_outputs: int
    inherit: bool
    extractors: nn.ModuleList
    classifier: nn.Linear | None
    auxiliary: nn.Linear | None
    classes: list[int]
    new_classes: list[int]

    def __init__(
        self,
        backbone: nn.Module,
        *,
        n_outputs: int = 0,
        inherit: bool = True,
        masks: ChannelMasks | None = None,
        fold: bool = True,
    ) -> None:
        super().__init__()
        self.width = feature_width("ExpandableNet", backbone)
        self.n_outputs = n_outputs
        self.inherit = inherit
        self.masks = masks
        self.fold = fold
        if masks is not None:
            find_channel_groups(backbone, residual=masks.residual, prune_output=True)
        # In a list: no part of the network. What the next extractor starts from.
        self._dense = [backbone]
        self.widths = []
        self.extractors = nn.ModuleList()
        # As modules from the start: a plain None would hide what a checkpoint puts there.
        self.register_module("classifier", None)
        self.register_module("auxiliary", None)
        self.classes = []  # labels in the order of arrival
        self.new_classes = []
        self._trained_on: int | None = None

    # growth ---------------------------------------------------------------------------------

    def adaptation(self, experience: Any) -> None:
        """Widen the output for the labels of an experience; in training, grow by its classes."""
        labels = sorted(int(c) for c in experience.classes_in_this_experience)
        self.n_outputs = max(self.n_outputs, labels[-1] + 1)
        if not self.training or experience.current_experience == self._trained_on:
            return
        new = [c for c in labels if c not in self.classes]
        if not new:
            raise ValueError(
                f"ExpandableNet grows by the new classes of each experience; experience "
                f"{experience.current_experience} brings none (its classes {labels} were all "
                f"seen). Merge it with another, or train another method on this stream."
            )
        self._trained_on = experience.current_experience
        self.grow(new)

    def grow(self, new_classes: list[int]) -> None:
        """Freeze what there is, append an extractor, widen the classifier, renew the other head."""
        device = next(self.parameters()).device if self.extractors else None
        newest = self._dense.pop() if self._dense else copy.deepcopy(self.extractors[-1])
        if self.extractors:
            self.extractors[-1] = self._frozen(self.extractors[-1])
        self.extractors.append(self._gated(newest).to(device))
        self.widths.append(self.width)
        n_old, self.new_classes = len(self.classes), list(new_classes)
        self.classes = [*self.classes, *new_classes]
        self.n_outputs = max(self.n_outputs, max(new_classes) + 1)
        old = self.classifier
        self.classifier = nn.Linear(sum(self.widths), len(self.classes), bias=False, device=device)
        nn.init.kaiming_normal_(self.classifier.weight, nonlinearity="linear")
        if old is not None and self.inherit:
            with torch.no_grad():
                self.classifier.weight[:n_old, : old.in_features] = old.weight
        self.auxiliary = nn.Linear(self.width, len(new_classes) + 1, device=device)
        self.train(self.training)  # the frozen ones go to evaluation mode

    def _gated(self, network: nn.Module) -> nn.Module:
        if self.masks is None:
            return network
        groups = find_channel_groups(network, residual=self.masks.residual, prune_output=True)
        return GatedNetwork(
            network, groups=groups, s_max=self.masks.s_max,
            compensation=self.masks.compensation, min_share=self.masks.min_share,
        )  # fmt: skip

    def _frozen(self, network: nn.Module) -> nn.Module:
        if self.fold and any(isinstance(m, _BatchNorm) for m in network.modules()):
            network = fold_batch_norms(network)
        return network.requires_grad_(False)

    @property
    def gates(self) -> GatedNetwork | None:
        """The newest extractor, while it has masks."""
        newest = self.extractors[-1] if self.extractors else None
        return newest if isinstance(newest, GatedNetwork) else None

    def parts_to_compile(self) -> list[nn.Module]:
        """What ``CompilePlugin`` compiles: the extractor that is trained."""
        return list(self.extractors[-1:])

    def settle(self) -> dict[str, float]:
        """End the learning of the newest extractor: drop the auxiliary head, prune by the masks.

        Returns:
            Share of the channels kept, by channel group; empty without masks.
        """
        self.auxiliary = None
        gates = self.gates
        if gates is None:
            return {}
        groups, kept = gates.groups, gates.kept()
        self._dense = [gates.network]
        self.extractors[-1] = prune_channels(gates.network, groups, kept).network
        output = groups.output
        if output is not None and self.classifier is not None:
            old = self.classifier
            base = sum(self.widths[:-1])
            features = torch.cat([torch.arange(base), base + kept[output].cpu()])
            self.widths[-1] = len(kept[output])
            self.classifier = nn.Linear(
                len(features), old.out_features, bias=False, device=old.weight.device
            )
            with torch.no_grad():
                self.classifier.weight.copy_(old.weight[:, features.to(old.weight.device)])
        return {g.name: len(k) / g.size for g, k in zip(groups.groups, kept, strict=True)}

    def reset_heads(self) -> None:
        """Draw the weights of both heads anew."""
        for head in (self.classifier, self.auxiliary):
            if head is not None:
                head.reset_parameters()

    def train(self, mode: bool = True) -> ExpandableNet:
        """Set the mode; frozen extractors stay in evaluation mode, so their statistics stay."""
        super().train(mode)
        for extractor in list(self.extractors)[:-1]:
            extractor.eval()
        return self

    # forward --------------------------------------------------------------------------------

    def old_features(self, x: Tensor) -> Tensor | None:
        """Features of the frozen extractors, side by side; ``None`` if there are none."""
        frozen = list(self.extractors)[:-1]
        if not frozen:
            return None
        with torch.no_grad():
            return torch.cat([extractor(x) for extractor in frozen], dim=1)

    def super_feature(self, x: Tensor, old: Tensor | None = None) -> Tensor:
        """All features, ``(B, sum(widths))``, in the order of arrival.

        ``old``: what ``old_features`` gave for ``x``, where it is known.
        """
        new = self.extractors[-1](x)
        check_features("ExpandableNet", new, self.widths[-1])
        old = self.old_features(x) if old is None else old
        return new if old is None else torch.cat([old.to(new.dtype), new], dim=1)

    def logits(self, features: Tensor) -> Tensor:
        """Logits ``(B, n_outputs)`` of super-features, at the classes' labels."""
        assert self.classifier is not None
        z = self.classifier(features)
        out = z.new_full((len(z), self.n_outputs), UNSEEN_LOGIT)
        return out.index_copy(1, torch.tensor(self.classes, device=z.device), z)

    def auxiliary_logits(self, features: Tensor) -> Tensor:
        """Logits ``(B, 1 + new classes)`` of the auxiliary head, from super-features."""
        assert self.auxiliary is not None
        return self.auxiliary(features[:, -self.widths[-1] :])

    def auxiliary_labels(self, y: Tensor) -> Tensor:
        """0 for every old class, j + 1 for the j-th new one."""
        table = torch.zeros(self.n_outputs, dtype=torch.int64, device=y.device)
        for j, label in enumerate(self.new_classes):
            table[label] = j + 1
        return table[y]

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        if self.classifier is None:
            return torch.full((len(x), self.n_outputs), UNSEEN_LOGIT, device=x.device)
        return self.logits(self.super_feature(x))
