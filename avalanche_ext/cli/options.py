"""Options that several subcommands share."""

from __future__ import annotations

__all__ = ["check_device", "pair"]


def pair(text: str, option: str = "--set", example: str = "lam=1e-4") -> tuple[str, str]:
    """``FIELD=VALUE`` as its two halves.

    Raises:
        ValueError: If it is not of that form.
    """
    field, separator, value = text.partition("=")
    if not separator or not field:
        raise ValueError(f"{option} expects FIELD=VALUE, such as {example}; got {text!r}.")
    return field, value


def check_device(name: str) -> None:
    """Raise unless torch can put something on the device.

    Raises:
        ValueError: If it cannot.
    """
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name!r} cannot be used here: {error}") from error
