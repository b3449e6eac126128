"""Avalanche metrics."""

from avalanche_ext.evaluation.metrics.challenge import ChallengeMetrics
from avalanche_ext.evaluation.metrics.gradient_diversity import (
    GradientDiversity,
    SimilarityReport,
    similarity_report,
)
from avalanche_ext.evaluation.metrics.matrix import AccuracyMatrixMetrics
from avalanche_ext.evaluation.metrics.resources import ResourceMetrics

__all__ = [
    "AccuracyMatrixMetrics",
    "ChallengeMetrics",
    "GradientDiversity",
    "ResourceMetrics",
    "SimilarityReport",
    "similarity_report",
]
