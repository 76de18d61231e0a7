"""Serving: pruned models behind an engine."""
