"""``picture_size`` and ``per=picture``: the setting of the paper's InternVL3 table, on a tiny InternVL."""

import pytest
import torch
from PIL import Image

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: scripts/test_lmms_eval.sh makes its environment")

from llava.eval.lmms_eval.requests import Asked, Decoding, Message, Visual
from llava.eval.lmms_eval.transformers_model import SimpleTransformersModel, TransformersArguments
from llava.pruning import get_pruner
from picture_processors import PROCESSORS
from transformers_families import family


def model_of(**given):
    model = object.__new__(SimpleTransformersModel)
    model.arguments = TransformersArguments(pretrained="tiny", **given)
    model.processor, model.model = PROCESSORS["internvl"](), family("internvl").model
    return model


@pytest.mark.parametrize("size", [(97, 31), (20, 60)])
def test_every_picture_is_five_tiles_and_the_budget_is_the_pictures(size):
    """Twice the side of a tile, as 896 is of 448: four tiles and an overview, whatever the picture's shape."""
    model = model_of(picture_size="56x56")
    shown = Visual("image", Image.effect_noise(size, 60).convert("RGB"))
    picture = model.read_visual(shown)
    assert picture.size == (56, 56)
    text = model.processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "w7"}]}]
    )
    inputs = model.processor(images=[picture], text=[text])
    assert inputs["pixel_values"].shape == (5, 3, 28, 28)
    method = get_pruner("script", keep_tokens=13, per="picture", relevance="none")
    model._device, asked = torch.device("cpu"), [Message("user", [shown, "w7"])]
    with method(model.model, model.processor) as model.handle:
        (answer,) = model.respond([(object.__new__(Asked), asked, [picture])], Decoding(max_new_tokens=2))
        assert model.handle.kept[0].per_view == [3, 3, 3, 2, 2]
    assert answer.cost["visual_tokens"] == 13
