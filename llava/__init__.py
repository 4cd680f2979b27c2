"""Script: training-free visual token pruning, inside LLaVA."""

__version__ = "0.1.0"
