r"""A conditional generator with masks: each task keeps a part of it, which never changes again.

Hidden layers are shared. For task :math:`t` layer :math:`l` has embeddings :math:`e_l^t` and with
them a mask

.. math:: m_l^t = \sigma(s\, e_l^t), \qquad \text{in the end} \quad 1[e_l^t \ge 0]

on its channels (DGMa) or on its weights (DGMw), and a batch norm. The output layer is the task's
own.

Reference:
    Ostapenko, Puscas, Klein, Jahnichen, Nabi (2019), Learning to Remember: A Synaptic Plasticity
    Driven Framework for Continual Learning.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from avalanche_ext.functional.channel_mask import anneal, hat_sparsity
from avalanche_ext.models.generators.base import GenerativeModel, ValueRange
from avalanche_ext.models.generators.masked_layer import Capacity, MaskedLayer
from avalanche_ext.models.generators.networks import padded

__all__ = ["MASKS", "MaskedGenerator"]

MASKS = ("units", "weights")


class MaskedGenerator(GenerativeModel):
    """Makes images, or with ``network="mlp"`` samples of any shape, of the classes of many tasks.

    ``begin_task`` opens a task, ``end_task`` closes it. In between, in training mode, ``make`` uses
    soft masks at the scale ``s`` for the classes of this task. All other tasks have binary masks
    and fixed norms, whatever the mode, and take part with the channels that there were in their
    time, so that the same noise gives the same sample, bit for bit.

    Args:
        in_shape: Shape of one sample.
        n_classes: Classes that can be asked for.
        network: ``"conv"``: deconvolutions of stride 2, or ``"mlp"``.
        masks: ``"units"``: one per channel (DGMa), or ``"weights"``: one per weight (DGMw).
        widths: Channels of the maps, from the smallest map on, or hidden layers, at the start.
        latent: Numbers of noise (paper: 128).
        s_max: Scale of the masks in the end, > 0 (paper: 1e5 for units, 1e4 for weights).
        expand: Whether hidden layers grow with each task, by what the task before has reserved:
            as many channels, or channels of as many weights.
        value_range: Lowest and highest value of the data; ``None`` for data without bounds, with
            ``"mlp"`` only.

    Attributes:
        tasks: Classes of each task.
        capacity: Of each finished task, by layer.

    Raises:
        ValueError: For a bad argument, or an image size that the network cannot make.
    """

    adam = (1e-3, (0.5, 0.999))
    adversarial = True

    def __init__(
        self,
        in_shape: Sequence[int],
        *,
        n_classes: int,
        network: str = "conv",
        masks: str = "units",
        widths: Sequence[int] = (80, 40, 20),
        latent: int = 128,
        s_max: float = 1e4,
        expand: bool = True,
        value_range: ValueRange = (0.0, 1.0),
    ) -> None:
        super().__init__(in_shape, latent, n_classes, value_range)
        if (
            network not in ("conv", "mlp") or masks not in MASKS or not widths or min(widths) < 1
            or n_classes < 1 or not 0 < s_max < math.inf
            or (network == "conv" and value_range is None)
        ):  # fmt: skip
            raise ValueError(
                f"MaskedGenerator expects network 'conv' (with a value_range) or 'mlp', masks "
                f"'units' or 'weights', positive widths, n_classes >= 1 and a finite s_max > 0; "
                f"got network={network!r}, value_range={value_range}, masks={masks!r}, "
                f"widths={tuple(widths)}, n_classes={n_classes}, s_max={s_max}."
            )
        self.expand = expand
        self.s_max = float(s_max)
        self.s = self.s_max
        self.tasks: list[list[int]] = []
        self.capacity: list[dict[str, Capacity]] = []
        kernels = [(), *[()] * (len(widths) - 1)]
        if network == "conv":
            sides = padded(self.in_shape, widths)
            kernels = [tuple(side // 2 ** len(widths) for side in sides), *[(5, 5)] * len(widths)]
        self._output_kernel = (5, 5) if network == "conv" else ()
        self.hidden = nn.ModuleList(
            MaskedLayer(wide, narrow, kernel, by_weight=masks == "weights")
            for (wide, narrow), kernel in zip(
                itertools.pairwise([latent + n_classes, *widths]), kernels, strict=False
            )
        )
        self.outputs = nn.ModuleList()
        self._gates_at_first = sum(layer.reserved.numel() for layer in self._layers)

    @property
    def _layers(self) -> list[MaskedLayer]:
        return list(self.hidden)  # pyright: ignore[reportReturnType]

    # tasks ----------------------------------------------------------------------------------

    def begin_task(self, classes: Sequence[int]) -> None:
        """Give some new classes masks, norms and an output layer.

        Raises:
            ValueError: If a class belongs to an earlier task, or there is no label for it; if the
                task before has not ended.
        """
        if len(self.tasks) > len(self.capacity):
            raise ValueError(
                f"MaskedGenerator: classes {[int(c) for c in classes]} cannot begin, as the task "
                f"of classes {self.tasks[-1]} has not ended: its training was interrupted. Go on "
                f"from a checkpoint, or call end_task() to keep what it has learnt."
            )
        known = sorted(set(classes) & set(self.seen))
        if known:
            raise ValueError(
                f"MaskedGenerator gives each class to one task; classes {known} come again. Use a "
                f"class-incremental stream, in which every class is in one experience."
            )
        self.learn_classes(classes)
        if self.expand and self.capacity:
            self._grow()
        before: Tensor | None = None
        for layer in self._layers:
            layer.begin_task(before)
            before = None if layer.by_weight else layer.reserved
        self.outputs.append(self._output_layer().to(self._layers[0].weight))
        self.tasks = [*self.tasks, [int(c) for c in classes]]

    def end_task(self) -> dict[str, Capacity]:
        """Make the masks binary and reserve what they use; what the task took, by layer."""
        found = {f"layer{k}": layer.end_task() for k, layer in enumerate(self._layers)}
        self.outputs.requires_grad_(False).zero_grad()
        self.capacity = [*self.capacity, found]
        return found

    def _grow(self) -> None:
        more_before = 0
        for layer, taken in zip(self._layers, self.capacity[-1].values(), strict=True):
            # Rounded up: as much is free as there was before.
            more = -(-taken.new // layer.gates_per_channel)
            layer.grow(more, more_before)
            more_before = more

    def _output_layer(self) -> nn.Module:
        width, channels = self._layers[-1].weight.shape[0], self.in_shape[0]
        if not self._output_kernel:
            return nn.Linear(width, math.prod(self.in_shape))
        return nn.ConvTranspose2d(width, channels, 5, 2, padding=2, output_padding=1)

    def get_extra_state(self) -> Any:
        """The classes of each task are part of ``state_dict``."""
        return self.tasks

    def set_extra_state(self, state: Any) -> None:
        """See ``get_extra_state``.

        Raises:
            ValueError: If the weights are of other tasks than this generator's.
        """
        if state != self.tasks:
            raise ValueError(
                f"MaskedGenerator expects a state_dict of its own tasks, {self.tasks}; got one of "
                f"{state}. Masks and sizes differ from task to task: call begin_task and end_task "
                f"for the same classes first, or pickle the generator as a whole."
            )

    # training -------------------------------------------------------------------------------

    def anneal(self, batch: int, batches: int) -> None:
        """Set the scale for batch 1, 2, ..., ``batches`` of a task."""
        self.s = anneal(batch, batches, self.s_max)

    def sparsity(self) -> Tensor:
        r"""Share of the free capacity that the task takes, times how far there is more than once.

        .. math:: \frac{N_t}{N_1} \cdot \frac{\sum_l \sum_i m_{l,i} (1 - M_{l,i})}
                  {\sum_l \sum_i (1 - M_{l,i})}

        with the maxima :math:`M` over earlier tasks and the numbers :math:`N` of gates.
        """
        reserved = [layer.reserved.float() for layer in self._layers]
        growth = sum(m.numel() for m in reserved) / self._gates_at_first
        return growth * hat_sparsity([layer.soft_mask(self.s) for layer in self._layers], reserved)

    def hold(self) -> None:
        """Before a step: no gradient for what earlier tasks use."""
        for layer in self._layers:
            layer.hold()

    def clamp_embeddings(self) -> None:
        """After a step: keep embeddings where they can still come back."""
        for layer in self._layers:
            layer.clamp_embeddings()

    def sample_parameters(self) -> list[nn.Parameter]:
        """What the task learns: shared weights, and its own parts."""
        return [p for p in self.parameters() if p.requires_grad]

    # samples --------------------------------------------------------------------------------

    def decode(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """See ``GenerativeModel``."""
        if y is None:
            raise ValueError("a MaskedGenerator needs labels; got none.")
        return self.from_symmetric(self.make(z, y))

    def make(self, z: Tensor, y: Tensor) -> Tensor:
        """Samples before they are brought to the data's range: in [-1, 1] if it has bounds."""
        table = torch.full((self.n_classes,), -1)
        for t, classes in enumerate(self.tasks):
            table[classes] = t
        task = table.to(y.device)[y]
        present = task.unique().tolist()
        if present[0] < 0:
            raise ValueError(
                f"MaskedGenerator can make samples of the classes that it has learnt, "
                f"{sorted(self.seen)}; got labels {sorted(set(y.tolist()))}."
            )
        if len(present) == 1:
            return self._of_task(z, y, present[0])
        parts = [torch.nonzero(task == t)[:, 0] for t in present]
        made = [self._of_task(z[rows], y[rows], t) for rows, t in zip(parts, present, strict=True)]
        return torch.cat(made)[torch.cat(parts).argsort()]

    def _of_task(self, z: Tensor, y: Tensor, task: int) -> Tensor:
        h = torch.cat([z, self.one_hot(y)], 1)
        if self._output_kernel:
            h = h[..., None, None]
        for layer in self._layers:
            h = layer(h, task, self.s)
        out = self.outputs[task](h)
        if not self._output_kernel:
            out = out.unflatten(1, self.in_shape)
        else:
            height, width = self.in_shape[1:]
            top, left = (out.shape[2] - height) // 2, (out.shape[3] - width) // 2
            out = out[..., top : top + height, left : left + width]
        return out if self.value_range is None else out.tanh()
