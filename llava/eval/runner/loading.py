"""A checkpoint for asking: checked before anything is loaded, then loaded as a model that answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llava.checkpoint import find_folder
from llava.eval.runner.answering import Answerer
from llava.layout.visuals import Reading
from llava.mm_utils import get_model_name_from_path, view_side
from llava.model.builder import find_template, load_pretrained_model, read_config
from llava.model.checkpoint_files import check_files
from llava.pruning import Pruner


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in LLaVA's original format, by its path or hub name.

    Args:
        base: language model that a projector-only ``path`` belongs to.
        joint_space: folder of the full SigLIP, see `load_pretrained_model`.
        grid: (width, height) in pixels for which every picture is cut; ``None`` leaves it to the checkpoint.
    """

    path: str
    base: str | None = None
    joint_space: str | None = None
    grid: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        return get_model_name_from_path(self.path)

    def template(self) -> str:
        """Name of its conversation template. Raises ValueError where its name contradicts its files."""
        return find_template(self.path, self.base)

    def check(self, pruner: Pruner | None) -> Any:
        """Its configuration, after looking for all files that loading will need.

        Raises:
            CheckpointError, ValueError: one is missing, it is no LLaVA checkpoint, or it cuts no tiles for a grid.
        """
        folder = find_folder(self.path)
        base = folder if self.base is None else find_folder(self.base)
        config = read_config(folder, base)
        joint = None if self.joint_space is None else find_folder(self.joint_space)
        check_files(folder, base, config, pruner, joint)
        if self.grid is not None:
            Reading.of(config).with_grid(self.grid)
        return config

    def load(
        self,
        pruner: Pruner | None,
        conversation: str | None = None,
        *,
        device: str,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        device_map: str | None = None,
    ) -> Answerer:
        """Load it, with its template or the one named."""
        tokenizer, model, processor, _ = load_pretrained_model(
            self.path,
            self.base,
            device=device,
            device_map=device_map,
            dtype=dtype,
            attn_implementation=attn_implementation,
            pruner=pruner,
            joint_space_path=self.joint_space,
        )
        answerer = Answerer(tokenizer, model, processor, conversation or self.template(), pruner)
        if self.grid is not None:
            answerer.reading = Reading.of(model.config).with_grid(self.grid, view_side(processor))
        return answerer
