"""Asking: the questions of a benchmark put to a checkpoint, and the answers kept."""
