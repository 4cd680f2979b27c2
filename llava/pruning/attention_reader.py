"""What the methods share that read where the vision encoder itself looks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from llava.pruning.base import ViewMethod
from llava.pruning.functional import working_dtype
from llava.pruning.inputs import PruningInputs


@dataclass(frozen=True, kw_only=True)
class AttentionReader(ViewMethod):
    """Mixed in before `Pruner` or `TokenMaker`: the method reads the attention of the last encoder layer that is read.

    Args:
        class_token: False is for encoders without one (SigLIP): the mean attention that a patch receives stands for
            the attention of the class token.
    """

    place: ClassVar[str] = "encoder"

    class_token: bool = True

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | {"class_attention" if self.class_token else "mean_attention"}

    def attention(self, inputs: PruningInputs) -> Tensor:
        """a (B, n), the mean over heads, 0 where it is not finite."""
        by_head = inputs.class_attention if self.class_token else inputs.mean_attention
        return by_head.to(working_dtype(by_head.dtype)).mean(1).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
