"""Avalanche plugins, strategies, memories and loaders."""
