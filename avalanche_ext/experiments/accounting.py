"""Kept for its importers: the accounting lives in ``evaluation.accounting``."""

from __future__ import annotations

from avalanche_ext.evaluation.accounting import bytes_remembered

__all__ = ["bytes_remembered"]
