"""Questions that are asked again come out as they did at first, without the text tower."""

import pytest
import torch

from llava.relevance.remembered import RememberedTexts
from llava.relevance.siglip import SiglipJointSpace

LONG = "Is there a red circle beside the blue square, or a dog on the car? " * 8


def numbers_of(texts):
    return [torch.full((len(text), 2), float(len(text))) for text in texts]


class Tower:
    """Notes what it is asked for."""

    def __init__(self):
        self.calls = []

    def __call__(self, texts):
        self.calls.append(list(texts))
        return numbers_of(texts)


def test_only_new_texts_are_embedded_and_together():
    tower, remembered = Tower(), RememberedTexts()
    for asked in (["a", "bb"], ["bb", "ccc", "a", "dddd", "ccc"], ["dddd", "a"]):
        got = remembered.embeds(asked, tower, by="cpu")
        assert all(torch.equal(*pair) for pair in zip(got, numbers_of(asked), strict=True))
    assert tower.calls == [["a", "bb"], ["ccc", "dddd"]]


def test_the_text_asked_for_longest_ago_goes_first():
    tower, remembered = Tower(), RememberedTexts(limit=2)
    for asked in ("a", "bb", "a", "ccc", "a", "bb"):
        remembered.embeds([asked], tower, by="cpu")
    assert tower.calls == [["a"], ["bb"], ["ccc"], ["bb"]]
    assert len(remembered.embeds(["e", "ff", "ggg", "hhhh"], tower, by="cpu")) == 4  # more than are kept


def test_another_dtype_or_device_is_another_embedding():
    tower, remembered = Tower(), RememberedTexts()
    for by in (("cpu", torch.float32), ("cpu", torch.bfloat16), ("cpu", torch.float32)):
        remembered.embeds(["a"], tower, by=by)
    assert tower.calls == [["a"], ["a"]]
    remembered.forget()
    remembered.embeds(["a"], tower, by=("cpu", torch.float32))
    assert len(tower.calls) == 3


@pytest.fixture(params=["clip", "siglip"])
def space(request, load, video):
    if request.param == "siglip":
        found = SiglipJointSpace(video / "checkpoints/google/siglip-so400m-patch14-384", torch.float32, "cpu")
    else:
        found = load("llava-v1.5-tiny-wide")[1].get_vision_tower().joint_space()
    found.remembered.forget()
    yield found
    found.remembered.forget()


def test_a_joint_space_gives_what_it_gave_at_first(space, monkeypatch):
    texts = ["a dog", LONG, "Is it red?"]
    embeds, mask = space.text_embeds(texts)
    assert mask.sum(-1).tolist()[0] == 1
    assert mask.sum(-1).tolist()[1] > 1
    monkeypatch.setattr(space.text_model, "forward", None)  # would raise
    again, same_mask = space.text_embeds(texts)
    assert torch.equal(again, embeds)
    assert torch.equal(same_mask, mask)
    one, real = space.text_embeds(["Is it red?"])
    assert torch.equal(one[0], embeds[2, :1])
    assert real.tolist() == [[True]]
    with torch.inference_mode():
        again.zero_()  # what a caller does with its own is not remembered
    assert torch.equal(space.text_embeds(texts)[0], embeds)
