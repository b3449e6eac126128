"""Strategies that own a loop, or the growth of a model."""
