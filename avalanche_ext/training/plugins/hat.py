r"""HAT: hard attention to the task. Each task learns which channels it needs, and keeps them.

For streams with a task label in training and at test. The network is a ``HATNet``:
``Naive(HATNet(build_backbone("mlp", 0, (1, 28, 28))), ..., plugins=[HATPlugin()])``.

Reference:
    Serra, Suris, Miron, Karatzoglou (2018), Overcoming Catastrophic Forgetting with Hard Attention
    to the Task, ICML; released code ``joansj/hat``.

Faithfulness:
    1. Weights are held by what happens to them, not by their gradients: a step is taken, then the
       share :math:`\min(m^{<t}_{out}, m^{<t}_{in})` of it is undone. For plain SGD this is the
       paper's mask on the gradient. With momentum or weight decay that mask leaks, and Adam undoes
       it; here weights between two saturated channels keep every bit under any optimizer.
    2. ``s`` reaches ``s_max`` in the last batch of an epoch, by the paper's formula. The released
       code counts samples and stays just below.
    3. Evaluation, and what counts as used, take :math:`\sigma(s_{max} e)`, as in paper and code;
       ``HATNet(hard=True)`` takes 0 and 1. Maxima over tasks are taken anew from the embeddings.
    4. Masks multiply a layer's weight and bias, which is to multiply behind ReLU and pooling.
    5. Embeddings start from N(0, 1), half of the channels closed, as in the released code; they are
       clamped to +-6 after each step. Their gradient has the factor ``s_max`` of the code, for
       ``compensation="exact"`` as well (where a ``lam`` of 0.05 to 0.2 suits).
    6. The norm that ``clip`` limits is that of all gradients, those of held weights included.
    7. Released settings: plain SGD, rate 0.05, divided by 3 after 5 epochs without progress, best
       epoch restored. Rate and schedule belong to the caller. Weight decay also acts on the
       embeddings, towards undecided gates.
    8. Not in the paper: batch norms, with statistics per task (see ``HATNet``).

Cost: from the second task on a copy of the backbone's weights during each step. Embeddings and a
head per task.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from avalanche_ext.functional.channel_mask import hat_sparsity
from avalanche_ext.models.hat_net import HATNet
from avalanche_ext.training.checks import CheckedPlugin, check_nonnegative
from avalanche_ext.training.publishing import publish
from avalanche_ext.training.representation_penalty import bare

__all__ = ["HATPlugin"]


class HATPlugin(CheckedPlugin, supports_distributed=True):
    r"""Train a ``HATNet``: sharpen its masks in every epoch, keep them few, hold what is used.

    .. math:: L = L_{clf} + \lambda
              \frac{\sum_i m_i (1 - m^{<t}_i)}{\sum_i (1 - m^{<t}_i)}

    Logged after each experience: ``HAT_Used``, the share of all channels that some task uses, and
    ``HAT_Kept_<layer>``, the share of the layer's weights between channels that the task uses.

    Args:
        lam: Weight >= 0 of the capacity term. HAT: 0.75, from 0.1 to 4. With 0 the masks are
            learnt from the classifier's loss alone.
        clip: Largest norm of the gradient, > 0. HAT: 10000.

    Attributes:
        used: Share of all channels in use, after each experience.
        kept: Share of the weights kept by layer, after each experience.

    Raises:
        TypeError: At the first experience, if the model is not a ``HATNet``.
        ValueError: For a bad argument.
    """

    def __init__(self, lam: float = 0.75, *, clip: float = 10_000.0) -> None:
        super().__init__()
        check_nonnegative("HATPlugin", lam=lam, clip=clip)
        if clip == 0:
            raise ValueError(
                "HATPlugin expects clip > 0; got 0, which stops learning. Leave it out."
            )
        self.lam = lam
        self.clip = clip
        self.used: list[float] = []
        self.kept: list[dict[str, float]] = []
        self._used_before: list[Tensor] = []
        self._free: dict[str, Tensor] = {}  # share of a step that each weight may take
        self._held: dict[str, Tensor] = {}  # weights before the step

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Find out what earlier tasks use; the model has taken up the new task by now."""
        net = _net(strategy)
        self._used_before = net.used(len(net.tasks) - 1)
        self._free = {}
        if len(net.tasks) > 1:
            masks = net.gates.gradient_masks(self._used_before)
            for name, p in net.gates.network.named_parameters():
                # What lies outside the layers (the slope of a PReLU) serves every task: held.
                free = masks.get(name, 0.0)
                self._free[name] = torch.as_tensor(free, dtype=p.dtype, device=p.device)

    def before_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """Set the scale of the gates."""
        batch = strategy.clock.train_epoch_iterations + 1
        _net(strategy).gates.anneal(batch, len(strategy.dataloader))

    def before_backward(self, strategy: Any, **kwargs: Any) -> None:
        """Add the capacity that the task takes to the loss."""
        if self.lam != 0:
            net = _net(strategy)
            masks = net.masks(len(net.tasks) - 1)
            strategy.loss = strategy.loss + self.lam * hat_sparsity(masks, self._used_before)

    def before_update(self, strategy: Any, **kwargs: Any) -> None:
        """Scale and clip gradients; remember the weights."""
        net = _net(strategy)
        newest = net.gates.embeddings[-1].grad
        if net.gates.compensation == "exact" and newest is not None:
            newest.mul_(net.gates.s_max)
        nn.utils.clip_grad_norm_(net.parameters(), self.clip)
        if self._free:
            weights = net.gates.network.named_parameters()
            self._held = {name: p.detach().clone() for name, p in weights}

    @torch.no_grad()
    def after_update(self, strategy: Any, **kwargs: Any) -> None:
        """Take back the part of the step that earlier tasks forbid."""
        net = _net(strategy)
        for name, old in self._held.items():
            p = net.gates.network.get_parameter(name)
            # Exact at both ends: what is used keeps every bit, what is free has the whole step.
            p.copy_(torch.lerp(old, p, self._free[name]))
        self._held = {}
        net.gates.clamp_embeddings()

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Publish how much of the network is in use."""
        net = _net(strategy)
        _warn_of_closed_layers(net, self.lam)
        self.used.append(float(torch.cat(net.used(len(net.tasks))).mean()))
        self.kept.append(net.gates.kept_share())
        publish(self, strategy, "HAT_Used", self.used[-1])
        for layer, share in self.kept[-1].items():
            publish(self, strategy, f"HAT_Kept_{layer}", share)


def _warn_of_closed_layers(net: HATNet, lam: float) -> None:
    masks = net.final_masks(len(net.tasks) - 1)
    groups = net.gates.groups.groups
    closed = [g.name for g, m in zip(groups, masks, strict=True) if m.max() < 0.5]
    if closed:
        warnings.warn(
            f"task {net.tasks[-1]} has closed all channels of {', '.join(closed)}: its output no "
            f"longer depends on the input. Start again with a smaller lam than {lam} or a smaller "
            f"learning rate, or with HATNet(hard=True), which leaves a channel open.",
            stacklevel=3,
        )


def _net(strategy: Any) -> HATNet:
    model = bare(strategy.model)
    if not isinstance(model, HATNet):
        raise TypeError(
            f"HATPlugin trains the masks of a HATNet; got a {type(model).__name__}. Wrap the "
            f"network without its classifier: HATNet(build_backbone('mlp', 0, in_shape))."
        )
    return model
