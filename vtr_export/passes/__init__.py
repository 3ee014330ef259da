"""Passes: graph to graph. One file, one pass."""
