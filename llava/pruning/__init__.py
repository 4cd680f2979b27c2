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
from llava.pruning.grid import Grid
from llava.pruning.random import Random
from llava.pruning.script import Script
from llava.pruning.uniform import Uniform

__all__ = [
    "Grid",
    "Pruner",
    "PruningInputs",
    "Random",
    "Script",
    "Selection",
    "Uniform",
    "get_pruner",
    "list_pruners",
    "parse_budget",
    "parse_options",
    "pruner_class",
    "register",
]
