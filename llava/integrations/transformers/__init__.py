"""Pruners on the model classes of the Transformers library.

pruner = get_pruner("script", keep_tokens=64)
with pruner(model, processor) as handle:
    out = model.generate(**processor(images=image, text=prompt, return_tensors="pt"))
handle.kept[0].per_view, handle.relevance
"""

from llava.integrations.transformers.attachment import AttachedPruner, attach
from llava.integrations.transformers.host import TESTED_CLASSES, UnsupportedModelError
from llava.integrations.transformers.selection import KeptPicture
from llava.integrations.transformers.visual_memory import VisualMemory

__all__ = ["TESTED_CLASSES", "AttachedPruner", "KeptPicture", "UnsupportedModelError", "VisualMemory", "attach"]
