"""Positions of prompts with pruned pictures: the text where it would be, the offsets exact in any precision."""

import pytest
import torch

pytest.importorskip(
    "vllm", reason="vLLM is not installed: scripts/test_vllm.sh runs these in an environment of its own"
)

from llava.integrations.vllm.placed import Block, from_channels, lay_out, to_channels
from llava.integrations.vllm.plan import PicturePlan, PictureShape
from llava.integrations.vllm.views_apart import counts_of_views, shortened_by_view


def test_text_goes_on_behind_the_whole():
    positions, delta = lay_out(9, [Block(2, 3, 10), Block(6, 0, 4), Block(7, 1, 2)])
    assert positions.tolist() == [[0, 1, 2, 2, 2, 12, 17, 18, 20]] * 3
    assert 9 + delta == 21
    positions, delta = lay_out(3, [])
    assert (positions.tolist(), delta) == ([[0, 1, 2]] * 3, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_offsets_travel_exactly(dtype):
    offsets = torch.tensor([[0, 255, 256], [257, 511, 65535], [65535, 1, 4097]])
    assert torch.equal(from_channels(to_channels(offsets).to(dtype)), offsets)


def plan(keep, per="view", arguments="{}"):
    return PicturePlan("x", keep, None, 1, "divprune", arguments, per=per)


def test_counts_of_views_are_those_of_the_selection():
    shape = PictureShape(3, 6)
    assert counts_of_views(plan(4), shape, "video") == [4, 4, 4]
    assert counts_of_views(plan(9), shape, "video") == [6, 6, 6]
    assert counts_of_views(plan(4, "picture"), shape, "video") == [2, 1, 1]
    with pytest.raises(ValueError, match="compete for one budget"):
        counts_of_views(plan(4, arguments='{"scope": "global"}'), shape, "video")


def test_text_between_views_stays():
    from vllm.multimodal.processing import PromptUpdateDetails

    content = PromptUpdateDetails.select_token_id([1, 9, 9, 9, 2, 3, 9, 9, 9, 4], 9)
    assert shortened_by_view(content, [1, 2], 3).full == [1, 9, 2, 3, 9, 9, 4]
    assert shortened_by_view(content, [0, 3], 3).full == [1, 2, 3, 9, 9, 9, 4]
