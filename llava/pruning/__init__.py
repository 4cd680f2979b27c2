"""Visual token pruning methods as pure tensor code: torch is all they import, and Triton in `kernels`."""

from llava.pruning import kernels
from llava.pruning.base import (
    Method,
    Pruner,
    TokenMaker,
    ViewMethod,
    get_pruner,
    list_pruners,
    parse_options,
    pruner_class,
    register,
)
from llava.pruning.cdpruner import CDPruner
from llava.pruning.cen_prune import CenPrune
from llava.pruning.dart import DART
from llava.pruning.decoder_pruner import DecoderPruner, tokens_per_layer
from llava.pruning.divprune import DivPrune
from llava.pruning.downsample import Downsample
from llava.pruning.fastervlm import FasterVLM
from llava.pruning.fastv import FastV
from llava.pruning.first import First
from llava.pruning.grid import Grid
from llava.pruning.hawk import HAWK
from llava.pruning.holov import HoloV
from llava.pruning.holov_release import HoloVRelease
from llava.pruning.inputs import PruningInputs, Selection
from llava.pruning.kernels import trial
from llava.pruning.mmtok import MMTok
from llava.pruning.options import parse_budget
from llava.pruning.pool import Pool
from llava.pruning.prunesid import PruneSID
from llava.pruning.pyramiddrop import PyramidDrop
from llava.pruning.question_reader import QuestionReader
from llava.pruning.random import Random
from llava.pruning.restore import Restore
from llava.pruning.scope import SCOPE
from llava.pruning.script import Script
from llava.pruning.script_release import ScriptRelease
from llava.pruning.sparsevlm import SparseVLM
from llava.pruning.trim import Trim
from llava.pruning.uniform import Uniform
from llava.pruning.visionzip import VisionZip
from llava.pruning.vispruner import VisPruner

kernels.try_by(trial.disagreement)

__all__ = [
    "CDPruner",
    "CenPrune",
    "DART",
    "DecoderPruner",
    "DivPrune",
    "Downsample",
    "FasterVLM",
    "FastV",
    "First",
    "Grid",
    "HAWK",
    "HoloV",
    "HoloVRelease",
    "Method",
    "MMTok",
    "Pool",
    "Pruner",
    "PruneSID",
    "PruningInputs",
    "PyramidDrop",
    "QuestionReader",
    "Random",
    "Restore",
    "SCOPE",
    "Script",
    "ScriptRelease",
    "Selection",
    "SparseVLM",
    "TokenMaker",
    "Trim",
    "Uniform",
    "ViewMethod",
    "VisionZip",
    "VisPruner",
    "get_pruner",
    "list_pruners",
    "parse_budget",
    "parse_options",
    "pruner_class",
    "register",
    "tokens_per_layer",
]
