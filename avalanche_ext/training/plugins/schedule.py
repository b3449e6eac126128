"""The same schedule in every experience, from a fresh optimizer.

Class-incremental systems train each experience as a run of its own: the learning rate rises and
falls anew, and momentum starts from nothing. Avalanche keeps the optimizer's state from one
experience to the next, and ``LRSchedulerPlugin`` knows no warm-up.
"""

from __future__ import annotations

from typing import Any

from avalanche.training.plugins import SupervisedPlugin

from avalanche_ext.training.schedule import Schedule, set_rate

__all__ = ["SchedulePlugin"]


class SchedulePlugin(SupervisedPlugin, supports_distributed=True):
    """Set the learning rate at the beginning of every epoch.

    Args:
        schedule: Learning rate by epoch of the experience.
        fresh: Whether each experience begins without momentum and other optimizer state.
    """

    def __init__(self, schedule: Schedule, *, fresh: bool = True) -> None:
        super().__init__()
        if not isinstance(schedule, Schedule):
            raise TypeError(
                f"SchedulePlugin expects a Schedule(lr, warmup_epochs, milestones); got "
                f"{schedule!r}."
            )
        self.schedule = schedule
        self.fresh = fresh

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Forget the optimizer's state."""
        if self.fresh:
            strategy.optimizer.state.clear()

    def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        """Set the rate."""
        set_rate(strategy.optimizer, self.schedule.at(strategy.clock.train_exp_epochs))
