"""Metrics, and the record of a run."""
