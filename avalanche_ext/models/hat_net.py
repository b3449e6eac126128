"""HATNet: one network for all tasks, a mask on its channels and a head for each.

References:
    J. Serra, D. Suris, M. Miron, A. Karatzoglou (2018), Overcoming Catastrophic Forgetting with
    Hard Attention to the Task, ICML, sections 2.1 to 2.4.
"""

from __future__ import annotations

from typing import Any

import torch
from avalanche.models import MultiTaskModule
from torch import Tensor, nn

from avalanche_ext.functional.channel_mask import Compensation, gate
from avalanche_ext.models.backbones import check_features, feature_width
from avalanche_ext.models.channel_gates import GatedNetwork
from avalanche_ext.models.channel_groups import find_channel_groups

__all__ = ["UNKNOWN_LOGIT", "HATNet"]

# Logit of a label that is none of the task's; that of Avalanche's multi-head classifier.
UNKNOWN_LOGIT = -1000.0


class HATNet(MultiTaskModule):
    r"""A backbone under the masks of each sample's task, and that task's linear head.

    .. math:: z = H_t\, f(x;\ m^t), \qquad m^t = \sigma(s\, e^t)

    The embeddings :math:`e^t` and the head :math:`H_t` come with the first training experience of a
    task label, and are frozen when the next one comes. In training mode the newest task has soft
    masks at the scale ``gates.s``, which ``HATPlugin`` raises in every epoch. Everywhere else masks
    are final: at ``s_max``, without a gradient. A mini-batch of several tasks is split by task.
    It is the plugin that protects earlier tasks; without it they are forgotten.

    Batch norms keep statistics per task, which start from the backbone's; samples of an old task in
    training mode (a replay) move those of that task.

    Args:
        backbone: Gives features, ``(B, ...)`` to ``(B, D)``, and can be followed by
            ``find_channel_groups``: ``build_backbone(name, 0, in_shape)``. ``D`` is its
            ``num_features``, or ``out_dim``. It is held, not copied.
        s_max: Scale of the gates at the end of every epoch and in evaluation, > 0. HAT: 400.
        compensation: Gradient of the gates, see ``avalanche_ext.functional.channel_mask.gate``;
            ``"hat"`` is that of HAT's code.
        hard: Whether final masks are :math:`1[e \ge 0]` instead of :math:`\sigma(s_{max} e)`.
            Then no task is ever forgotten in the least, and no layer closes altogether.

    Shapes:
        Input what the backbone takes, and task labels ``(B,)``, or one for all; output ``(B, C)``
        with as many columns as the largest label that was seen needs. Labels that are none of the
        task's have ``UNKNOWN_LOGIT``. So have all of a task that was not trained on: its samples
        get equal logits, that is class 0 and a loss of ``log C``.

    Raises:
        ValueError: If the backbone has no features or its channels cannot be followed; when an
            experience has no task label of its own.
    """

    gates: GatedNetwork
    heads: nn.ModuleList
    statistics: nn.ModuleList

    def __init__(
        self,
        backbone: nn.Module,
        *,
        s_max: float = 400.0,
        compensation: Compensation = "hat",
        hard: bool = False,
    ) -> None:
        super().__init__()
        self.width = feature_width("HATNet", backbone)
        self.hard = hard
        groups = find_channel_groups(backbone, prune_output=True)
        self.gates = GatedNetwork(backbone, groups=groups, s_max=s_max, compensation=compensation)
        nn.init.normal_(self.gates.embeddings[0])
        self.heads = nn.ModuleList()
        self.statistics = nn.ModuleList()
        self.tasks: list[int] = []  # labels in the order of arrival
        self.classes: list[list[int]] = []
        self._trained_on: int | None = None

    # growth ---------------------------------------------------------------------------------

    def adaptation(self, experience: Any) -> None:
        """Widen the output for the labels of an experience; in training, add its task."""
        if self.training:
            self._take_up(experience)
        super().adaptation(experience)

    def _take_up(self, experience: Any) -> None:
        index = experience.current_experience
        labels = sorted(set(getattr(experience, "task_labels", ())))
        if labels == self.tasks[-1:] and index == self._trained_on:
            return
        if len(labels) != 1 or labels[0] in self.tasks:
            raise ValueError(
                f"HATNet learns one task per experience, and each once; experience {index} has the "
                f"task labels {labels}, and those learnt are {self.tasks}. Use a benchmark with "
                f"task labels, such as split_digits(scenario='task') or "
                f"nc_benchmark(..., task_labels=True)."
            )
        self._trained_on = index
        self.add_task(labels[0], sorted(int(c) for c in experience.classes_in_this_experience))

    def add_task(self, label: int, classes: list[int]) -> None:
        """Freeze the tasks so far; give another one embeddings, a head and statistics."""
        if self.tasks:
            self.gates.embeddings.requires_grad_(False)
            self.heads.requires_grad_(False)
            nn.init.normal_(self.gates.add_task())  # the first came with the gates
        self.tasks = [*self.tasks, label]
        self.classes = [*self.classes, classes]
        device = self._adaptation_device
        self.heads.append(nn.Linear(self.width, len(classes), device=device))
        self.statistics.append(_Statistics(self.gates.network))

    # masks ----------------------------------------------------------------------------------

    def masks(self, position: int) -> list[Tensor]:
        """Masks of a task, given its place in ``tasks``, as ``forward`` uses them."""
        if self.training and position == len(self.tasks) - 1:
            return self.gates.masks(position, hard=False)
        return self.final_masks(position)

    @torch.no_grad()
    def final_masks(self, position: int) -> list[Tensor]:
        """Masks of a task at the largest scale, ``(channels,)`` per group, without gradient."""
        if self.hard:
            return self.gates.masks(position, hard=True)
        m = gate(self.gates.embeddings[position], self.gates.s_max, "none")
        return list(m.split(self.gates.groups.sizes))

    def used(self, n_tasks: int) -> list[Tensor]:
        """Largest final mask of each channel over the first tasks; 0 where there are none."""
        used = [torch.zeros(n, device=self.gates.s.device) for n in self.gates.groups.sizes]
        for position in range(n_tasks):
            used = [
                torch.maximum(u, m) for u, m in zip(used, self.final_masks(position), strict=True)
            ]
        return used

    # forward --------------------------------------------------------------------------------

    def forward_single_task(self, x: Tensor, task_label: int) -> Tensor:
        """Logits ``(B, C)`` of samples of one task."""
        if task_label not in self.tasks:
            return torch.full((len(x), self.max_class_label), UNKNOWN_LOGIT, device=x.device)
        position = self.tasks.index(task_label)
        names = [name for name, _ in self.gates.network.named_buffers()]
        statistics = dict(zip(names, self.statistics[position].buffers(), strict=True))
        u = self.gates(x, self.masks(position), statistics)
        check_features("HATNet", u, self.width)
        z = self.heads[position](u)
        out = z.new_full((len(z), self.max_class_label), UNKNOWN_LOGIT)
        return out.index_copy(1, torch.tensor(self.classes[position], device=z.device), z)


class _Statistics(nn.Module):
    """A task's copies of a network's buffers, in their order."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        for k, value in enumerate(network.buffers()):
            self.register_buffer(str(k), value.clone())
