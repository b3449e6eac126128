"""Episodic memories."""
