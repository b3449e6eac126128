"""Avalanche metrics."""

from avalanche_ext.evaluation.metrics.gradient_diversity import (
    GradientDiversity,
    SimilarityReport,
    similarity_report,
)

__all__ = ["GradientDiversity", "SimilarityReport", "similarity_report"]
