"""The parts of the vLLM plugin that need no vLLM: options, plans, questions of token ids, features, selection."""

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llava.integrations.vllm.features import FeatureCache, PictureFeatures, in_small_batches
from llava.integrations.vllm.options import (
    LONGEST_MESSAGE,
    LONGEST_QUESTION,
    PruningOptions,
    ServerOptions,
    in_few_words,
    read_request_options,
    read_server_options,
)
from llava.integrations.vllm.plan import FIXED, PicturePlan, PictureShape, cannot_run, make_pruner
from llava.integrations.vllm.prompt import questions_of_pictures, split_at
from llava.integrations.vllm.registration import ARCHITECTURES, is_tested, unsupported
from llava.integrations.vllm.relevance import joint_space_folder, read_by, relevance_sign
from llava.integrations.vllm.reuse import REMEMBERED_PICTURES, HotPictures, without_question
from llava.integrations.vllm.selection import TokenSelector
from llava.integrations.vllm.shipping import PLAN_FIELD, knowing_plans
from llava.layout.padding import patches_of_square, patches_of_tiles
from llava.layout.views import padded_square_layout, tiled_layout
from llava.model.builder import TOY_FOLDER
from llava.pruning import DivPrune, PruningInputs, get_pruner, list_pruners
from llava.pruning.options import option_types
from llava.relevance.asked import LanguageSpace
from llava.relevance.clip import ClipJointSpace
from llava.relevance.first_attention import FirstAttention

PROJECTOR = '{"relevance": "projector"}'


def plan(**values):
    standard = {"picture": "p", "keep_tokens": 4, "rate": None, "least": 1, "method": "script", "arguments": PROJECTOR}
    return PicturePlan(**{**standard, "query": "What?", "query_ids": (1, 2), **values})


# --- options -------------------------------------------------------------------------------------------------------


def test_the_later_place_wins_and_either_budget_replaces_the_other():
    _, server = read_server_options({"keep_tokens": 64, "min_visual_tokens": 8}, {"image_pruning_rate": 0.5})
    assert (server.keep_tokens, server.count(576)) == (None, 288)
    request = read_request_options(server, {"keep_tokens": 16, "image_pruning_rate": 0.1})
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


@given(st.integers(1, 12), st.integers(1, 600), st.integers(1, 4000), st.sampled_from(["view", "picture"]))
def test_no_picture_keeps_more_than_is_reserved_for_it(views, tokens, keep, per):
    options = PruningOptions(keep_tokens=keep, keep_per=per)
    own = plan(keep_tokens=keep, per=per, method="first", arguments="{}")
    count = own.count(PictureShape(views, tokens))
    given_up = views * tokens if count is None else count
    assert given_up == options.count_picture(views, tokens) == options.most(views, tokens)


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"keep_token": 64}, r"no option 'keep_token'; did you mean keep_tokens\? Its options: clip, "),
        ({"keep_tokens": 0}, "keep_tokens must be an integer at least 1 or none; got 0"),
        ({"keep_tokens": True}, "integer at least 1"),
        ({"keep_tokens": 10**30}, "integer at least 1"),
        ({"keep_tokens": 0.5}, "integer at least 1"),
        ({"keep_per": "tile"}, "one of view, picture"),
        ({"image_pruning_rate": 1}, "share removed"),
        ({"image_pruning_rate": -0.1}, "share removed"),
        ({"image_pruning_rate": float("nan")}, "finite number"),
        ({"image_pruning_method": ["script"]}, "image_pruning_method must be text"),
        ({"views_at_once": 0}, "views_at_once must be an integer at least 1"),
        ({"feature_cache_mib": -1}, "feature_cache_mib must be an integer between 0"),
        ({"relevance_sign": 2}, "one of -1, 1"),
        ({"image_pruning_args": [1]}, "table of options"),
        ({"query": 3}, "query must be text"),
        ({"query": "is it \ud83c?"}, r"no valid Unicode: '\\ud83c' at 6"),
        ({"query": "a" * (LONGEST_QUESTION + 1)}, f"query may have {LONGEST_QUESTION} characters"),
        ({"query_scope": ["image_turn"]}, "image_turn, latest_turn"),
        ({"min_visual_tokens": None}, "integer at least 1"),
        ([1], "table of options"),
    ],
)
def test_bad_server_options(overrides, message):
    with pytest.raises(ValueError, match=message):
        read_server_options(overrides, None)


def test_a_misspelt_option_among_the_processors_own():
    read_server_options(None, {"max_pixels": 10000, "keep_tokens": 4})
    with pytest.raises(ValueError, match="'keep_token', which is no option; did you mean keep_tokens"):
        read_server_options(None, {"keep_token": 4})


def test_a_budget_that_finds_itself_cannot_be_served():
    """The prompt is laid out before the picture is encoded."""
    for text in ("auto", "auto:0.9", "auto:mean_tokens=64:curves=curves.json"):
        with pytest.raises(ValueError, match=f"keep_tokens={text} cannot be served: vLLM lays out the prompt before"):
            read_server_options({"keep_tokens": text}, None)
        with pytest.raises(ValueError, match="give a count, or image_pruning_rate"):
            read_request_options(PruningOptions(keep_tokens=64), {"keep_tokens": text})


def test_a_request_cannot_ask_for_more_than_is_reserved():
    server = PruningOptions(keep_tokens=64)
    server.check_request(PruningOptions(keep_tokens=64), 1, 576)
    with pytest.raises(ValueError, match="keeps 128 visual tokens of a view of 576, but the server allows 64"):
        server.check_request(PruningOptions(keep_tokens=128), 5, 576)
    PruningOptions(keep_tokens=64, max_keep_tokens=200).check_request(PruningOptions(keep_tokens=128), 1, 576)
    per_picture = PruningOptions(keep_tokens=256, keep_per="picture")
    server.check_request(per_picture, 5, 576)
    with pytest.raises(ValueError, match="keeps 256 visual tokens of a picture of 1728, but the server allows 192"):
        server.check_request(per_picture, 3, 576)
    with pytest.raises(ValueError, match="keeps 320 visual tokens of a picture of 2880, but the server allows 256"):
        per_picture.check_request(server, 5, 576)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"max_keep_tokens": 576}, "max_keep_tokens: the server's to set"),
        ({"clip": "/etc"}, "clip: the server's to set"),
        ({"crop_size": {"height": 10, "width": 10}}, "no option 'crop_size'. Its options: image_pruning_args"),
        ({"image_pruning_arg": {}}, r"did you mean image_pruning_args\?"),
        ({"image_pruning_args": {"heads": "/etc/passwd"}}, "the server's to set"),
    ],
)
def test_what_a_request_cannot_say(kwargs, message):
    with pytest.raises(ValueError, match=message):
        read_request_options(PruningOptions(keep_tokens=64), kwargs)


def test_refusals_are_short_and_can_be_sent():
    said = in_few_words(ValueError("\ud83c" + "a" * 10_000))
    assert said.encode()
    assert len(said) <= LONGEST_MESSAGE + 4


def test_methods_that_cannot_be_served_are_named():
    for method in ("fastv", "visionzip", "downsample", "pool", "trim"):
        with pytest.raises(ValueError, match=r"methods that can be served: cdpruner, .*divprune.*script"):
            make_pruner(method, "{}")
    with pytest.raises(ValueError, match="cannot set keep_tokens"):
        make_pruner("script", '{"keep_tokens": 3}')
    with pytest.raises(ValueError, match="separators"):
        make_pruner("divprune", '{"scope": "official"}')
    with pytest.raises(ValueError, match=r"no option 'gamme'; did you mean gamma"):
        make_pruner("script", '{"gamme": 1}')


EXTREMES = (0, -1, 1, 2**31, 1e-300, 1e300, -1e300, 0.5, True, None, "x", [], {}, "none", "global", "picture")


SERVED = [name for name in list_pruners() if cannot_run(get_pruner(name)) is None]


@pytest.mark.parametrize("name", SERVED)
def test_options_that_are_accepted_do_on_pictures(name):
    """Whatever value of an option gets past the front end selects on a worker's pictures, padded ones included."""
    fields = {"relevance": torch.rand(2, 64), "view_ids": torch.arange(2), "pictures": torch.tensor([0, 0])}
    fields["query_embeds"] = torch.randn(1, 3, 8)
    valid = torch.ones(2, 64, dtype=torch.bool)
    valid[1] = False
    valid[0, 60:] = False
    features = torch.randn(2, 8, 8).repeat(1, 8, 1)  # tokens that are alike
    inputs = PruningInputs(features, encoder_features=features, valid=valid, **fields)
    accepted = 0
    for option in dataclasses.fields(get_pruner(name)):
        for value in EXTREMES:
            try:
                pruner = make_pruner(name, json.dumps({option.name: value}))
            except ValueError:
                continue
            accepted += 1
            for keep in (1, 5, 63):
                chosen = pruner.select(inputs, keep=keep).indices
                assert chosen.shape == (2, keep)
                assert chosen.min() >= 0
                assert chosen.max() < 64
    assert accepted or not set(option_types(type(get_pruner(name)))) - {"scope", *FIXED}


# --- plans ---------------------------------------------------------------------------------------------------------


def test_a_plan_survives_its_way_and_its_digest_tells_all_apart():
    variants = [
        plan(),
        plan(picture="q"),
        plan(keep_tokens=5),
        plan(keep_tokens=None, rate=0.5),
        plan(least=2),
        plan(method="divprune"),
        plan(arguments='{"relevance": "words"}'),
        plan(per="picture"),
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


# --- counts --------------------------------------------------------------------------------------------------------


def test_published_budgets_per_picture():
    """InternVL3's 256 and 128 of 1,280 tokens over five tiles."""
    tiles = PictureShape(5, 256)
    assert plan(keep_tokens=256, per="picture").count(tiles) == 256
    assert [one.keep for one in plan(keep_tokens=256, per="picture").candidates(tiles)] == [52, 51, 51, 51, 51]
    assert plan(keep_tokens=128, per="picture").count(tiles) == 128
    assert plan(keep_tokens=256, per="picture").count(PictureShape(1, 256)) is None
    assert plan(keep_tokens=None, rate=0.9, per="picture").count(tiles) == 128
    assert plan(keep_tokens=256).count(tiles) is None


def test_a_view_of_padding_gives_nothing_where_views_share():
    shape = PictureShape(3, 16, eligible=(16, 8, 0))
    assert [one.keep for one in plan(keep_tokens=12, per="picture").candidates(shape)] == [8, 4, 0]
    assert plan(keep_tokens=40, per="picture").count(shape) == 24  # all that there is
    assert [one.keep for one in plan(keep_tokens=12).candidates(shape)] == [12, 12, 12]


def test_what_a_method_cannot_choose_among():
    with pytest.raises(ValueError, match="needs a square layout of tokens, got 60"):
        plan(method="grid", arguments="{}").count(PictureShape(1, 60))
    assert plan(method="grid", arguments="{}", keep_tokens=60).count(PictureShape(1, 60)) is None
    unequal = plan(method="cdpruner", arguments='{"relevance": "words", "scaling": "picture"}', per="picture")
    with pytest.raises(ValueError, match="compares the views"):
        unequal.count(PictureShape(3, 16))


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
    assert cache.get("a", "cpu", 1, 4).features[0, 0, 0] == ord("a")
    cache.put("c", picture(ord("c")))
    assert cache.get("b", "cpu", 1, 4) is None
    assert cache.get("a", "cpu", 1, 4) is not None
    assert cache.size == 2 * size
    cache.put("large", PictureFeatures(torch.zeros(9, 4, 8)))
    assert cache.get("large", "cpu", 9, 4) is None
    none = FeatureCache(0)
    none.put("a", picture(1))
    assert none.get("a", "cpu", 1, 4) is None
    assert cache.get("a", "cpu", 2, 4) is None  # another picture under its name
    assert cache.get("a", "cpu", 1, 4) is None
    assert cache.size == size
    cache.clear()
    assert (cache.get("c", "cpu", 1, 4), cache.size) == (None, 0)


def test_small_batches_are_the_whole():
    seen = []

    def run(part):
        seen.append(len(part))
        return part * 2

    pixels = torch.arange(10.0).reshape(5, 2)
    assert torch.equal(in_small_batches(run, pixels, 2), pixels * 2)
    assert seen == [2, 2, 1]


# --- pictures that are asked about often ---------------------------------------------------------------------------


def test_a_picture_is_hot_by_different_questions_within_the_time():
    now = [0.0]
    hot = HotPictures(3, 10.0, clock=lambda: now[0])
    assert [hot.ask("a", question) for question in ("one", "two", "two", "one")] == [False] * 4
    assert hot.ask("a", "three")
    assert hot.ask("a", "one")  # an old question about a hot picture
    assert not hot.ask("b", "four")
    now[0] = 9.0
    assert hot.ask("a", "five")
    now[0] = 11.0  # of three questions within ten seconds only "five" is left, and this one
    assert not hot.ask("a", "six")
    assert hot.ask("a", "seven")


def test_pictures_are_forgotten_the_longest_unasked_first():
    hot = HotPictures(2, 1e9)
    hot.ask("first", "one")
    for number in range(REMEMBERED_PICTURES):
        hot.ask(f"{number}", "one")
    assert not hot.ask("first", "two")
    assert hot.ask("first", "three")


@pytest.mark.parametrize("name", [name for name in list_pruners() if cannot_run(get_pruner(name)) is None])
def test_a_form_without_the_question_reads_none(name):
    options = PruningOptions(keep_tokens=4, image_pruning_method=name)
    method = make_pruner(name, "{}")
    if name == "hawk":
        options = dataclasses.replace(options, image_pruning_args={"heads": "of a model"})
    free = without_question(options, method)
    assert not make_pruner(name, json.dumps(free.image_pruning_args)).reads_question
    assert (free is options) is not method.reads_question


def test_a_method_that_always_reads_the_question_has_no_reuse():
    class Reader:
        name, reads_question = "reader", True

    with pytest.raises(ValueError, match="pruner 'reader' chooses by the question alone: take reuse=none"):
        without_question(PruningOptions(), Reader())


# --- selection -----------------------------------------------------------------------------------------------------


@pytest.fixture
def table():
    return torch.randn(20, 8, generator=torch.Generator().manual_seed(1))


def features(seed, views=1, tokens=16):
    return PictureFeatures(torch.randn(views, tokens, 8, generator=torch.Generator().manual_seed(seed)))


def selector_of(table, **options):
    return TokenSelector(LanguageSpace(lambda ids: ids, lambda ids: table[ids]), **options)


def test_selection_is_the_pruners_own_and_does_not_depend_on_the_batch(table):
    selector = selector_of(table)
    pictures = [features(0), features(1, views=3), features(2), features(3), features(4, views=2), features(5, 2)]
    plans = [
        plan(query_ids=(1, 2, 3)),
        plan(query_ids=(4,)),
        plan(keep_tokens=2, method="divprune", arguments="{}", query=None, query_ids=()),
        plan(keep_tokens=99),
        plan(keep_tokens=7, per="picture"),
        plan(keep_tokens=5, arguments='{"relevance": "words", "scope": "global"}'),
    ]
    together = selector.select(pictures, plans)
    assert together[3] is None
    for picture, own, chosen in zip(pictures, plans, together, strict=True):
        if chosen is not None:
            assert torch.equal(selector.select([picture], [own])[0], chosen)
            assert len(chosen) == own.count(picture.shape)
            assert bool((chosen.diff() > 0).all())
    pruner = get_pruner("script", keep_tokens=4, relevance="projector")
    inputs = PruningInputs(pictures[1].features, query_embeds=table[None, 4:5].expand(3, -1, -1))
    own = pruner.select(inputs).indices + 16 * torch.arange(3)[:, None]
    assert torch.equal(own.flatten(), together[1])
    assert [int(((together[4] // 16) == view).sum()) for view in range(2)] == [4, 3]


def test_padding_is_not_chosen_and_the_count_is_kept(table):
    selector = selector_of(table)
    valid = torch.zeros(1, 16, dtype=torch.bool)
    valid[0, :6] = True
    padded = PictureFeatures(features(7).features, valid=valid)
    assert selector.select([padded], [plan()])[0].max() < 6
    assert selector.select([padded], [plan(keep_tokens=10)])[0].shape == (10,)
    empty = PictureFeatures(features(7, views=2).features, valid=torch.stack([valid[0], torch.zeros(16).bool()]))
    for per, keep in (("picture", 4), ("view", 8)):
        assert selector.select([empty], [plan(per=per)])[0].shape == (keep,)


def test_the_joint_space_of_a_clip_host_is_used_with_its_sign(table):
    folder = TOY_FOLDER / "clip-toy-336"
    space = ClipJointSpace.load(folder, torch.float32, "cpu")
    encoder = torch.randn(1, 16, 128, generator=torch.Generator().manual_seed(2))
    picture = PictureFeatures(features(3).features, encoder)
    chosen = {}
    for sign in (1, -1):
        selector = selector_of(table, joint_space=space, sign=sign)
        clip = plan(query="a red circle", query_ids=(), arguments='{"gsp": false, "relevance": "clip"}')
        chosen[sign] = selector.select([picture], [clip])[0]
        embeds, mask = space.text_embeds(["a red circle"])
        inputs = PruningInputs(
            picture.features,
            image_embeds=space.image_embeds(encoder),
            text_embeds=embeds,
            text_mask=mask,
            relevance_sign=sign,
        )
        assert torch.equal(get_pruner("script", keep_tokens=4, gsp=False).select(inputs).indices[0], chosen[sign])
    assert not torch.equal(chosen[1], chosen[-1])


def test_a_method_that_breaks_its_promise_ends_no_engine(table, monkeypatch, caplog):
    monkeypatch.setattr(DivPrune, "choose", lambda self, inputs, keep: None)
    make_pruner.cache_clear()
    monkeypatch.setattr("llava.integrations.vllm.plan.try_out", lambda pruner: None)
    chosen = selector_of(table).select([features(0)], [plan(method="divprune", arguments="{}")])[0]
    make_pruner.cache_clear()
    assert torch.equal(chosen, get_pruner("uniform").select(PruningInputs(features(0).features), keep=4).indices[0])
    assert "choose must return" in caplog.text


def test_all_ranks_use_the_first_ranks_choice(table):
    first = torch.tensor([[0, 1, 2, 3]])
    assert torch.equal(selector_of(table, agree=lambda indices: first).select([features(0)], [plan()])[0], first[0])


# --- tensor parallelism --------------------------------------------------------------------------------------------


class Projection(torch.nn.Linear):
    def forward(self, entered):
        return super().forward(entered), None


class Rank(torch.nn.Module):
    """What vLLM's attention holds on one rank: its share of the query heads, its key heads or a copy of one."""

    def __init__(self, whole, rank, ranks, heads, key_heads, head_dim):
        super().__init__()
        own, groups = heads // ranks, heads // key_heads
        queries = range(rank * own, (rank + 1) * own)
        keys = sorted({head // groups for head in queries})
        rows = [whole["q"][h * head_dim : (h + 1) * head_dim] for h in queries]
        rows += [whole[part][h * head_dim : (h + 1) * head_dim] for part in "kv" for h in keys]
        self.qkv_proj = Projection(rows[0].shape[1], len(rows) * head_dim, bias=False)
        self.qkv_proj.weight.data = torch.cat(rows)
        self.q_size, self.head_dim, self.scaling = own * head_dim, head_dim, head_dim**-0.5


@pytest.mark.parametrize("ranks, key_heads", [(2, 4), (2, 2), (4, 2), (4, 1)])
def test_heads_on_several_ranks_are_those_of_one(ranks, key_heads):
    """Also where ranks outnumber key heads and each has a copy."""
    heads, head_dim, width = 8, 4, 16
    generator = torch.Generator().manual_seed(ranks)
    whole = {
        part: torch.randn(count * head_dim, width, generator=generator)
        for part, count in (("q", heads), ("k", key_heads), ("v", key_heads))
    }
    words, tokens = torch.randn(1, 3, width, generator=generator), torch.randn(2, 12, width, generator=generator)

    def mass(rank, ranks):
        attention = Rank(whole, rank, ranks, heads, key_heads, head_dim)
        found = FirstAttention(0, 1, heads, head_dim, head_dim**-0.5, False, 1.0, None, attention)
        return found.mass(words, tokens)

    summed = sum(mass(rank, ranks) for rank in range(ranks))
    torch.testing.assert_close(summed, mass(0, 1))


# --- joint space and versions --------------------------------------------------------------------------------------


class Vision:
    model_type = "clip_vision_model"
    hidden_size, num_hidden_layers, image_size, patch_size = 128, 5, 336, 14


class Config:
    vision_config = Vision()

    def __init__(self, decoder="llama", **values):
        self.model_type = decoder
        self.__dict__.update(values)

    def get_text_config(self):
        return self


FOLDER = (TOY_FOLDER / "clip-toy-336").resolve()


def reading(server=None, config=None, has_clip=True, **options):
    return read_by(server or ServerOptions(), PruningOptions(**options), config or Config(), None, has_clip)


def test_where_clip_is_found(tmp_path):
    assert joint_space_folder(ServerOptions(clip=str(FOLDER)), Config(), None) == FOLDER
    relative = Config(mm_vision_tower="clip-toy-336")
    assert joint_space_folder(ServerOptions(), relative, TOY_FOLDER / "llava-toy-v1.5").samefile(FOLDER)
    with pytest.raises(OSError, match="no CLIP is named, and none is known"):
        joint_space_folder(ServerOptions(), Config(), None)
    with pytest.raises(ValueError, match=r"names the clip .*no checkpoint at .*Name the CLIP"):
        reading(ServerOptions(clip=str(tmp_path / "none")))
    (tmp_path / "config.json").write_text(json.dumps({}))
    with pytest.raises(ValueError, match=r"lacks: .*Name the CLIP"):
        reading(ServerOptions(clip=str(tmp_path)))
    assert relevance_sign(ServerOptions(relevance_sign=1), Config()) == 1
    assert relevance_sign(ServerOptions(), Config()) is None


def test_auto_is_clip_where_it_can_be_had_else_language():
    clip = reading(ServerOptions(clip=str(FOLDER)))
    assert (clip.method.relevance, clip.joint_space) == ("clip", FOLDER)
    none = reading()
    assert (none.method.relevance, none.joint_space) == ("language", None)
    assert "first attention; no CLIP is named" in str(none.choice)
    assert reading(has_clip=False).method.relevance == "language"
    assert reading(image_pruning_method="divprune").choice is None
    words_alone = reading(config=Config(decoder="internlm2"))
    assert "embeddings alone, because the first attention of a internlm2 decoder" in str(words_alone.choice)
    with pytest.raises(ValueError, match=r"cannot have relevance=clip: no CLIP is named.*Instead, here work"):
        reading(image_pruning_args={"relevance": "clip"})
    with pytest.raises(ValueError, match="cannot have relevance=qk: the first attention of a internlm2"):
        reading(config=Config(decoder="internlm2"), image_pruning_args={"relevance": "qk"})


def test_requests_take_the_sources_that_the_server_has_loaded():
    own = Config(mm_vision_tower=str(FOLDER))
    by_clip, by_words = reading(config=own), reading(config=own, image_pruning_args={"relevance": "words"})
    assert json.loads(by_clip.settle(by_clip.options)[1]) == {"relevance": "clip"}
    named = PruningOptions(image_pruning_args={"relevance": "clip"})
    assert by_clip.settle(named)[1] == by_clip.settle(PruningOptions())[1]  # one plan, however it was said
    assert by_words.joint_space is None
    with pytest.raises(ValueError, match="no CLIP was loaded when the server started"):
        by_words.settle(named)
    assert by_words.settle(PruningOptions())[0].relevance == "language"


@pytest.mark.parametrize("version, fine", [("0.32.0", True), ("0.33.1", True), ("0.31.9", False), ("0.34.0", False)])
def test_supported_versions(version, fine):
    assert (unsupported(version) is None) == fine
    assert unsupported("unknown") is not None
    assert is_tested(version) == (version == "0.32.0")
    assert is_tested("0.33.0+cpu")


def test_architectures_are_those_of_the_documents():
    page = (Path(__file__).resolve().parents[2] / "docs/serving.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(Script\w+)`", page, re.MULTILINE)) == set(ARCHITECTURES)


# --- what crosses to the engine ------------------------------------------------------------------------------------


def feature(own, pixels=None):
    """A picture of a request as vLLM hands it to a receiver: pixels, or none, and its plan where it has one."""
    data = {} if pixels is None else {"pixel_values": pixels}
    if isinstance(own, PicturePlan):
        plan_bytes = torch.frombuffer(bytearray(own.to_bytes()), dtype=torch.uint8)
        data[PLAN_FIELD + "image"] = SimpleNamespace(data=plan_bytes)
        own = own.digest()
    return SimpleNamespace(modality="image", data=data or None, mm_hash=own, identifier=own)


def receiver():
    """A receiving cache as vLLM's: what comes is kept under its hash, what does not come is looked up."""
    kept = {}

    def receive(cache, features):
        for one in features:
            if one.data is None and one.mm_hash not in kept:
                raise KeyError(one.mm_hash)
            one.data = kept[one.mm_hash] = kept[one.mm_hash] if one.data is None else one.data
        return features

    return knowing_plans(receive), kept


def test_pixels_come_once_for_all_plans_of_a_picture():
    receive, kept = receiver()
    first, second, other = plan(picture="A"), plan(picture="A", query="Where?"), plan(picture="B")
    features = receive(None, [feature(first, "a"), feature(other, "b")])
    features += receive(None, [feature(second)])
    assert sorted(kept) == ["A", "B"]
    assert not any(PLAN_FIELD + "image" in data for data in kept.values())  # a plan is its request's own
    for got, pixels, own in zip(features, "aba", (first, other, second), strict=True):
        assert got.data["pixel_values"] == pixels
        assert PicturePlan.from_bytes(got.data[PLAN_FIELD + "image"].data.numpy().tobytes()) == own
        assert (got.mm_hash, got.identifier) == (own.digest(), own.digest())


def test_a_receiver_without_the_pixels_says_so_by_the_content():
    receive, _ = receiver()
    missing = feature(plan(picture="A"))
    with pytest.raises(KeyError, match="A"):
        receive(None, [missing])
    assert missing.mm_hash == plan(picture="A").digest()


def test_items_without_a_plan_are_received_as_ever():
    receive, kept = receiver()
    assert receive(None, [feature("v", "film")])[0].data == {"pixel_values": "film"}
    assert receive(None, [feature("v")])[0].data is kept["v"]
