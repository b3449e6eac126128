"""Mixed precision, memory layout and fused optimizers for any Avalanche strategy.

Purpose: the forward pass in bfloat16 or float16, with float32 weights, losses and gradients; images
and filters in the layout that convolutions on GPUs prefer; one kernel for the whole update.

Decisions and limits:
    1. Autocast covers ``strategy.forward`` alone, in training and in evaluation. Its output becomes
       float32 behind it, so the criterion, the metrics and other plugins' loss terms on the output
       are float32. Recorded activations keep the dtype that autocast gave them.
    2. Forward passes that other plugins make (teachers, GEM's reference gradients, importances) are
       not covered: they stay float32, which is slower and never less exact.
    3. fp16 scales the loss around ``strategy.backward`` only: ``strategy.loss`` is the true loss
       for metrics, and the gradients are true again as soon as ``backward`` returns, so that GEM,
       clipping and importance methods need no change. Layers further in (a mean over ranks) see
       scaled gradients.
    4. A step whose gradients overflow is skipped and the scale halves. In that step the plugins
       see gradients of zero: an infinite one would stay in a path integral for ever, and breaks
       the quadratic programme of GEM. The first few steps of a run may be such steps.
    5. fp16 needs one ``backward()`` per ``optimizer_step()``, by those names. A strategy that
       accumulates gradients, or that steps by itself (MER, AR1), gets an error; bf16 has no scale
       and works. Parameters that the optimizer does not hold keep scaled gradients.
    6. Avalanche's multi-head modules write the heads' outputs into a float32 tensor, which fails
       under autocast; for the length of the forward pass the heads' outputs are cast first.
    7. ``channels_last`` converts 4-D parameters in place (the objects stay, the optimizer keeps
       them) after every adaptation, and the input in the forward pass.
    8. ``fused_optimizer`` changes the optimizer's groups, and stays when training ends. SGD's
       momentum starts at zero instead of absent, which is the same without dampening (refused):
       torch's fused SGD fails where a new parameter has none and the others do.
    9. Pickling works between two iterations; the scale and its counter travel along.

Cost: nothing where nothing is asked for. fp16 reads one flag per step, which waits for the device;
torch's own scaler does the same with an optimizer that is not fused.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from avalanche.models import MultiTaskModule
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor, nn

from avalanche_ext.training.checks import check_one_of
from avalanche_ext.training.wrapping import unwrap, wrap

__all__ = ["PrecisionPlugin"]

_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
_ORDER = 20  # outside the mean over ranks (10): gradients are reduced before they are unscaled


class PrecisionPlugin(SupervisedPlugin, supports_distributed=True):
    """Run the forward pass in reduced precision, and the update in one kernel.

    Args:
        precision: ``"bf16"`` (default), ``"fp16"`` (with a dynamic loss scale) or ``"fp32"``
            (plain training, bit for bit).
        channels_last: Keep 4-D parameters and inputs in the channels-last layout.
        fused_optimizer: Use torch's fused kernels of SGD, Adam, AdamW and Adagrad.

    Attributes:
        scaler: The ``torch.amp.GradScaler`` of fp16, made when training starts. Assign one before
            that to choose its initial scale.

    Raises:
        ValueError: For a bad argument; before training, for a precision that the device lacks or
            an optimizer without fused kernels; in the first step, for fp16 in a strategy that
            never calls ``backward()``, or calls it twice per step.
    """

    def __init__(
        self,
        precision: str = "bf16",
        *,
        channels_last: bool = False,
        fused_optimizer: bool = False,
    ) -> None:
        super().__init__()
        check_one_of("PrecisionPlugin", "precision", precision, tuple(_DTYPES))
        check_one_of("PrecisionPlugin", "channels_last", channels_last, (True, False))
        check_one_of("PrecisionPlugin", "fused_optimizer", fused_optimizer, (True, False))
        self.precision = precision
        self.channels_last = channels_last
        self.fused_optimizer = fused_optimizer
        self.scaler: torch.amp.GradScaler | None = None
        self._training = False
        self._overflow: bool | None = None  # of the gradients that wait for the step
        self._scaled = False

    # set-up ---------------------------------------------------------------------------------

    def before_training(self, strategy: Any, **kwargs: Any) -> None:
        """Refuse what cannot work, then put the layers in place."""
        _check_device(self.precision, strategy.device)
        if self.fused_optimizer:
            _check_fusable(strategy.optimizer)
        self._training = True
        self._overflow = None
        self._wrap_forward(strategy)
        if self.precision == "fp16":
            if self.scaler is None:
                self.scaler = torch.amp.GradScaler(strategy.device.type)
            wrap(strategy, "backward", self._backward, order=_ORDER)
            wrap(strategy, "optimizer_step", self._optimizer_step, order=_ORDER)

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Adaptation may have brought new parameters, and the optimizer's state with them."""
        self._lay_out(strategy)
        if self.fused_optimizer:
            _fuse(strategy.optimizer)

    def after_training(self, strategy: Any, **kwargs: Any) -> None:
        """Leave the strategy as it was."""
        self._training = False
        unwrap(strategy, "forward", self._forward)
        unwrap(strategy, "backward", self._backward)
        unwrap(strategy, "optimizer_step", self._optimizer_step)

    def before_eval(self, strategy: Any, **kwargs: Any) -> None:
        """Evaluate in the precision of training."""
        _check_device(self.precision, strategy.device)
        self._wrap_forward(strategy)

    def before_eval_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Evaluation adapts the model too."""
        self._lay_out(strategy)

    def after_eval(self, strategy: Any, **kwargs: Any) -> None:
        """An evaluation in the middle of training leaves the layer where it is."""
        if not self._training:
            unwrap(strategy, "forward", self._forward)

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """Notice a strategy that computes its gradients past the scale."""
        if self.precision == "fp16" and not self._scaled:
            raise ValueError(
                f"precision='fp16' scales the loss in strategy.backward(), which "
                f"{type(strategy).__name__} does not call, so small gradients would vanish. Use "
                f"precision='bf16', which needs no scale, or 'fp32'."
            )
        self._scaled = False

    # layers ---------------------------------------------------------------------------------

    def _wrap_forward(self, strategy: Any) -> None:
        if self.precision != "fp32" or self.channels_last:
            wrap(strategy, "forward", self._forward, order=_ORDER)

    def _forward(self, strategy: Any, inner: Callable[[], Any]) -> Any:
        x = strategy.mb_x
        if self.channels_last and isinstance(x, Tensor) and x.ndim == 4:
            strategy.mbatch[0] = x.contiguous(memory_format=torch.channels_last)
        dtype = _DTYPES[self.precision]
        if dtype is None:
            return inner()
        with _heads_in_float32(strategy.model), torch.autocast(strategy.device.type, dtype=dtype):
            output = inner()
        return _float32(output)

    def _backward(self, strategy: Any, inner: Callable[[], Any]) -> Any:
        assert self.scaler is not None
        if self._overflow is not None:
            raise ValueError(
                "precision='fp16' needs one backward() per optimizer_step(): the gradients of the "
                "backward pass before this one have had their scale removed. To accumulate "
                "gradients use precision='bf16'."
            )
        loss = strategy.loss
        strategy.loss = self.scaler.scale(loss)
        try:
            result = inner()
        finally:
            strategy.loss = loss
        optimizer = strategy.optimizer
        self.scaler.unscale_(optimizer)
        found = self.scaler._found_inf_per_device(optimizer)  # no public way to ask for it
        self._overflow = any(bool(flag) for flag in found.values())
        self._scaled = True
        if self._overflow:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad.zero_()
        return result

    def _optimizer_step(self, strategy: Any, inner: Callable[[], Any]) -> None:
        assert self.scaler is not None
        if not self._overflow:
            inner()
        if self._overflow is not None:
            self.scaler.update()
        self._overflow = None

    def _lay_out(self, strategy: Any) -> None:
        if not self.channels_last:
            return
        state = strategy.optimizer.state
        for parameter in strategy.model.parameters():
            if parameter.ndim != 4:
                continue
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
            for name, value in state.get(parameter, {}).items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    state[parameter][name] = value.contiguous(memory_format=torch.channels_last)


def _check_device(precision: str, device: torch.device) -> None:
    dtype = _DTYPES[precision]
    if dtype is None:
        return
    if not torch.amp.is_autocast_available(device.type):
        raise ValueError(
            f"precision={precision!r} needs autocast, which device '{device}' does not have. Use "
            f"precision='fp32'."
        )
    if (
        device.type == "cuda"
        and precision == "bf16"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        raise ValueError(
            f"device '{device}' does not compute in bfloat16 (it needs compute capability 8.0). "
            f"Use precision='fp16' or 'fp32'."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            torch.autocast(device.type, dtype=dtype)
        except (RuntimeError, UserWarning) as error:
            raise ValueError(
                f"precision={precision!r} is not offered by autocast on device '{device}' "
                f"({error}). Use precision='fp32'."
            ) from error


@contextlib.contextmanager
def _heads_in_float32(model: nn.Module) -> Iterator[None]:
    """Cast the output of single tasks before Avalanche collects them in a float32 tensor."""
    modules = []
    if isinstance(model, MultiTaskModule):
        modules = [m for m in model.modules() if isinstance(m, MultiTaskModule)]
    modules = [m for m in modules if "forward_single_task" not in vars(m)]
    # Past __setattr__: that of as_multitask's decorator hands on to the network inside.
    for module in modules:
        vars(module)["forward_single_task"] = _SingleTask(module)
    try:
        yield
    finally:
        for module in modules:
            del vars(module)["forward_single_task"]


class _SingleTask:
    """What stands in for ``forward_single_task`` during one forward pass."""

    def __init__(self, module: MultiTaskModule) -> None:
        self.single_task = module.forward_single_task

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _float32(self.single_task(*args, **kwargs))


def _float32(output: Any) -> Any:
    """The output with its reduced-precision tensors as float32."""
    if isinstance(output, Tensor):
        return output.float() if output.dtype in (torch.bfloat16, torch.float16) else output
    if isinstance(output, dict):
        return {key: _float32(value) for key, value in output.items()}
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return type(output)(*map(_float32, output))
    if isinstance(output, tuple | list):
        return type(output)(map(_float32, output))
    return output


def _check_fusable(optimizer: torch.optim.Optimizer) -> None:
    name = type(optimizer).__name__
    if "fused" not in optimizer.defaults:
        raise ValueError(
            f"fused_optimizer=True: torch has no fused kernels for {name}. Use SGD, Adam, AdamW or "
            f"Adagrad, or fused_optimizer=False."
        )
    if any(group.get("differentiable") for group in optimizer.param_groups):
        raise ValueError(f"fused_optimizer=True: {name}(differentiable=True) cannot be fused.")
    if any(group.get("dampening") for group in optimizer.param_groups):
        raise ValueError(
            f"fused_optimizer=True: the fused {name} cannot give a new parameter its undampened "
            f"first step. Use dampening=0 or fused_optimizer=False."
        )


def _fuse(optimizer: torch.optim.Optimizer) -> None:
    """Switch every group to the fused kernels, and its state to what they expect."""
    optimizer.defaults.update(fused=True, foreach=False)
    for group in optimizer.param_groups:
        group.update(fused=True, foreach=False)
        # The fused SGD fails where some parameters have a momentum and a new one has none.
        momentum = isinstance(optimizer, torch.optim.SGD) and group["momentum"]
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if "step" in state:
                state["step"] = torch.as_tensor(
                    state["step"], dtype=torch.float32, device=parameter.device
                )
            if momentum and state.get("momentum_buffer") is None:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
