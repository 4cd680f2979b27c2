"""The parts of the vLLM plugin that need no vLLM: options, plans, questions of token ids, features, selection."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llava.integrations.vllm.features import FeatureCache, PictureFeatures, in_small_batches
from llava.integrations.vllm.joint_space import joint_space_folder, relevance_sign
from llava.integrations.vllm.options import (
    JOINT_FIELDS,
    LANGUAGE_FIELDS,
    PicturePlan,
    PruningOptions,
    ServerOptions,
    read_request_options,
    read_server_options,
)
from llava.integrations.vllm.prompt import questions_of_pictures, split_at
from llava.integrations.vllm.registration import ARCHITECTURES, unsupported
from llava.integrations.vllm.selection import TokenSelector
from llava.layout.padding import patches_of_square, patches_of_tiles
from llava.layout.views import padded_square_layout, tiled_layout
from llava.model.builder import TOY_FOLDER
from llava.pruning import PruningInputs, get_pruner
from llava.relevance.clip import ClipJointSpace

FIELDS = JOINT_FIELDS | LANGUAGE_FIELDS


def plan(**values):
    standard = {"picture": "p", "keep_tokens": 4, "rate": None, "least": 1, "method": "script", "arguments": "{}"}
    return PicturePlan(**{**standard, "query": "What?", "query_ids": (1, 2), **values})


# --- options -------------------------------------------------------------------------------------------------------


def test_the_later_place_wins_and_either_budget_replaces_the_other():
    _, server = read_server_options({"keep_tokens": 64, "min_visual_tokens": 8}, {"image_pruning_rate": 0.5})
    assert (server.keep_tokens, server.count(576)) == (None, 288)
    request = read_request_options(server, {"keep_tokens": 16, "image_pruning_rate": 0.1, "other": 1})
    assert request.count(576) == 16  # at one place the count beats the rate
    assert read_request_options(server, {"image_pruning_rate": 0.999}).count(576) == 8
    assert read_server_options(None, None)[1].count(576) == 576  # no budget, no pruning


def test_another_method_does_not_inherit_arguments():
    _, server = read_server_options({"image_pruning_args": {"tau": 0.3}}, None)
    assert read_request_options(server, {"image_pruning_method": "divprune"}).image_pruning_args == {}
    assert read_request_options(server, {"keep_tokens": 2}).image_pruning_args == {"tau": 0.3}


@given(st.integers(1, 800), st.floats(0, 0.999), st.integers(1, 50))
def test_counts_stay_within_a_view(tokens, rate, least):
    options = PruningOptions(image_pruning_rate=rate, min_visual_tokens=least)
    count = options.count(tokens)
    assert min(least, tokens) <= count <= tokens
    assert abs(count - max(tokens * (1 - rate), min(least, tokens))) <= 0.5 + 1e-6


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"keep_token": 64}, "script_pruning has no option keep_token; its options: clip, "),
        ({"keep_tokens": 0}, "keep_tokens must be an integer from 1, got 0"),
        ({"keep_tokens": True}, "integer from 1"),
        ({"keep_tokens": 0.5}, "integer from 1"),
        ({"image_pruning_rate": 1}, "share removed"),
        ({"image_pruning_rate": -0.1}, "share removed"),
        ({"views_at_once": 0}, "views_at_once must be an integer from 1"),
        ({"relevance_sign": 2}, "must be -1 or 1"),
        ({"image_pruning_args": [1]}, "table of options"),
        ({"query": 3}, "query must be text"),
        ([1], "table of options"),
    ],
)
def test_bad_server_options(overrides, message):
    with pytest.raises(ValueError, match=message):
        read_server_options(overrides, None)


def test_a_request_cannot_ask_for_more_than_is_reserved():
    server = PruningOptions(keep_tokens=64)
    server.check_request(PruningOptions(keep_tokens=64), 576)
    with pytest.raises(ValueError, match="keeps 128 visual tokens of a view of 576, but the server allows 64"):
        server.check_request(PruningOptions(keep_tokens=128), 576)
    PruningOptions(keep_tokens=64, max_keep_tokens=200).check_request(PruningOptions(keep_tokens=128), 576)
    with pytest.raises(ValueError, match="server's to set"):
        read_request_options(server, {"max_keep_tokens": 576})


def test_methods_that_cannot_be_served_are_named():
    for method in ("fastv", "visionzip", "downsample", "pool"):
        with pytest.raises(ValueError, match=r"methods that can be served: cdpruner, divprune.*script"):
            PruningOptions(image_pruning_method=method).pruner(FIELDS)
    with pytest.raises(ValueError, match="cannot set keep_tokens"):
        PruningOptions(image_pruning_args={"keep_tokens": 3}).pruner(FIELDS)


# --- plans ---------------------------------------------------------------------------------------------------------


def test_a_plan_survives_its_way_and_its_digest_tells_all_apart():
    variants = [
        plan(),
        plan(picture="q"),
        plan(keep_tokens=5),
        plan(keep_tokens=None, rate=0.5),
        plan(least=2),
        plan(method="divprune"),
        plan(arguments='{"tau": 0.3}'),
        plan(query="Who?"),
        plan(query_ids=(1, 3)),
    ]
    assert len({one.digest() for one in variants}) == len(variants)
    for one in variants:
        assert PicturePlan.from_bytes(one.to_bytes()) == one
        assert PicturePlan.from_bytes(one.to_bytes()).digest() == one.digest()


# --- questions -----------------------------------------------------------------------------------------------------


class Letters:
    def decode(self, ids, skip_special_tokens):
        assert not skip_special_tokens
        return "".join(map(chr, ids))


def test_questions_are_read_around_the_placeholders():
    text = "USER: \0\nWhat is it? ASSISTANT: A cat.</s>USER: \0\nAnd this? ASSISTANT:"
    ids = [ord(letter) for letter in text]
    assert questions_of_pictures(ids, [0], Letters(), "image_turn", 2) == ["What is it?", "And this?"]
    assert questions_of_pictures(ids, [0], Letters(), "latest_turn", 2) == ["And this?"] * 2
    assert questions_of_pictures(ids, [1], Letters(), "image_turn", 1) == ["\0\nAnd this?"]  # no placeholder is seen
    assert questions_of_pictures([], [0], Letters(), "image_turn", 0) == []


def test_placeholders_of_several_tokens():
    assert split_at([1, 2, 3, 1, 2, 2, 3, 4], [2, 3]) == [[1], [1, 2], [4]]
    assert split_at([], [1]) == [[]]


# --- padding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(336, 336), (336, 252), (224, 336), (97, 61), (1000, 400)])
def test_padding_is_llavas(size):
    assert torch.equal(patches_of_square(size, 24), padded_square_layout(size, 24).eligible)
    for grid in ((1, 2), (2, 1), (2, 2), (3, 1)):
        assert torch.equal(patches_of_tiles(size, grid, 24), tiled_layout(size, grid, 24, "spatial_unpad").eligible)


# --- features ------------------------------------------------------------------------------------------------------


def test_the_cache_is_bounded_and_drops_what_was_not_used_longest():
    def picture(value):
        return PictureFeatures(torch.full((1, 4, 8), float(value)))

    size = picture(0).nbytes
    cache = FeatureCache(2 * size)
    for name in "ab":
        cache.put(name, picture(ord(name)))
    assert cache.get("a", "cpu").features[0, 0, 0] == ord("a")
    cache.put("c", picture(ord("c")))
    assert cache.get("b", "cpu") is None
    assert cache.get("a", "cpu") is not None
    assert cache.size == 2 * size
    cache.put("large", PictureFeatures(torch.zeros(9, 4, 8)))
    assert cache.get("large", "cpu") is None
    none = FeatureCache(0)
    none.put("a", picture(1))
    assert none.get("a", "cpu") is None


def test_small_batches_are_the_whole():
    seen = []

    def run(part):
        seen.append(len(part))
        return part * 2

    pixels = torch.arange(10.0).reshape(5, 2)
    assert torch.equal(in_small_batches(run, pixels, 2), pixels * 2)
    assert seen == [2, 2, 1]


# --- selection -----------------------------------------------------------------------------------------------------


@pytest.fixture
def table():
    return torch.randn(20, 8, generator=torch.Generator().manual_seed(1))


def features(seed, views=1, tokens=16):
    return PictureFeatures(torch.randn(views, tokens, 8, generator=torch.Generator().manual_seed(seed)))


def test_selection_is_the_pruners_own_and_does_not_depend_on_the_batch(table):
    selector = TokenSelector(FIELDS, lambda ids: table[ids])
    pictures = [features(0), features(1, views=3), features(2), features(3)]
    plans = [
        plan(arguments='{"relevance": "projector"}', query_ids=(1, 2, 3)),
        plan(arguments='{"relevance": "projector"}', query_ids=(4,)),
        plan(keep_tokens=2, method="divprune", query=None, query_ids=()),
        plan(keep_tokens=99),
    ]
    together = selector.select(pictures, plans)
    assert together[3] is None
    for picture, own, chosen in zip(pictures[:3], plans, together, strict=False):
        assert torch.equal(selector.select([picture], [own])[0], chosen)
    pruner = get_pruner("script", keep_tokens=4, relevance="projector")
    inputs = PruningInputs(pictures[1].features, query_embeds=table[None, 4:5].expand(3, -1, -1))
    assert torch.equal(pruner.select(inputs).indices, together[1])


def test_without_a_joint_space_relevance_comes_from_the_language_model(table):
    selector = TokenSelector(FIELDS, lambda ids: table[ids])
    picture = features(5)
    clip = selector.select([picture], [plan(arguments='{"relevance": "clip"}')])[0]
    projector = selector.select([picture], [plan(arguments='{"relevance": "projector"}')])[0]
    assert torch.equal(clip, projector)
    assert selector.select([picture], [plan(query="", query_ids=())])[0].shape == (1, 4)  # no question at all


def test_padding_is_not_chosen_and_the_count_is_kept(table):
    selector = TokenSelector(FIELDS, lambda ids: table[ids])
    valid = torch.zeros(1, 16, dtype=torch.bool)
    valid[0, :6] = True
    padded = PictureFeatures(features(7).features, valid=valid)
    assert selector.select([padded], [plan()])[0].max() < 6
    assert selector.select([padded], [plan(keep_tokens=10)])[0].shape == (1, 10)


def test_the_joint_space_of_a_clip_host_is_used_with_its_sign():
    folder = TOY_FOLDER / "clip-toy-336"

    def space():
        return ClipJointSpace.load(folder, torch.float32, "cpu")

    encoder = torch.randn(1, 16, 128, generator=torch.Generator().manual_seed(2))
    picture = PictureFeatures(features(3).features, encoder)
    chosen = {}
    for sign in (1, -1):
        selector = TokenSelector(FIELDS | {"encoder_features"}, lambda ids: ids, space, sign)
        chosen[sign] = selector.select([picture], [plan(query="a red circle", arguments='{"gsp": false}')])[0]
        embeds, mask = space().text_embeds(["a red circle"])
        inputs = PruningInputs(
            picture.features,
            image_embeds=space().image_embeds(encoder),
            text_embeds=embeds,
            text_mask=mask,
            relevance_sign=sign,
        )
        assert torch.equal(get_pruner("script", keep_tokens=4, gsp=False).select(inputs).indices, chosen[sign])
    assert not torch.equal(chosen[1], chosen[-1])


def test_all_ranks_use_the_first_ranks_choice(table):
    first = torch.tensor([[0, 1, 2, 3]])
    selector = TokenSelector(FIELDS, lambda ids: table[ids], agree=lambda indices: first)
    assert torch.equal(selector.select([features(0)], [plan()])[0], first)


# --- joint space and versions --------------------------------------------------------------------------------------


class Vision:
    hidden_size, num_hidden_layers, image_size, patch_size = 128, 5, 336, 14


class Config:
    vision_config = Vision()


def test_where_clip_is_found(tmp_path):
    folder = TOY_FOLDER / "clip-toy-336"
    assert joint_space_folder(ServerOptions(clip=str(folder)), Config()) == folder
    with pytest.raises(ValueError, match=r"no CLIP is named. Name the CLIP .*script_pruning"):
        joint_space_folder(ServerOptions(), Config())
    with pytest.raises(ValueError, match=r"no checkpoint at .*Name the CLIP"):
        joint_space_folder(ServerOptions(clip=str(tmp_path / "none")), Config())
    (tmp_path / "config.json").write_text(json.dumps({}))
    with pytest.raises(ValueError, match=r"lacks: .*Name the CLIP"):
        joint_space_folder(ServerOptions(clip=str(tmp_path)), Config())
    assert relevance_sign(ServerOptions(relevance_sign=1), Config()) == 1
    assert relevance_sign(ServerOptions(), Config()) is None


@pytest.mark.parametrize("version, fine", [("0.32.0", True), ("0.33.1", True), ("0.31.9", False), ("0.34.0", False)])
def test_supported_versions(version, fine):
    assert (unsupported(version) is None) == fine
    assert unsupported("unknown") is not None
    assert len(ARCHITECTURES) == 5
