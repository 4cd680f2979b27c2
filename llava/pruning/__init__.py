"""Visual token pruning methods as pure tensor code: torch is all they import."""

from llava.pruning.base import (
    Pruner,
    PruningInputs,
    Selection,
    get_pruner,
    list_pruners,
    parse_budget,
    parse_options,
    pruner_class,
    register,
)
from llava.pruning.dart import DART
from llava.pruning.decoder import DecoderPruner, tokens_per_layer
from llava.pruning.fastv import FastV
from llava.pruning.grid import Grid
from llava.pruning.pyramiddrop import PyramidDrop
from llava.pruning.random import Random
from llava.pruning.script import Script
from llava.pruning.sparsevlm import SparseVLM
from llava.pruning.uniform import Uniform

__all__ = [
    "DART",
    "DecoderPruner",
    "FastV",
    "Grid",
    "Pruner",
    "PruningInputs",
    "PyramidDrop",
    "Random",
    "Script",
    "Selection",
    "SparseVLM",
    "Uniform",
    "get_pruner",
    "list_pruners",
    "parse_budget",
    "parse_options",
    "pruner_class",
    "register",
    "tokens_per_layer",
]
