"""What every method promises, over all methods that are registered."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.pruning import (
    Pruner,
    PruningInputs,
    Selection,
    get_pruner,
    list_pruners,
    parse_budget,
    parse_options,
    pruner_class,
)
from llava.pruning.grid import grid_points, grid_shape
from llava.pruning.options import option_types
from method_inputs import BEFORE_DECODER, TOKENS, encode_patches, inputs_for, make_inputs

CHOOSERS = [name for name in BEFORE_DECODER if not pruner_class(name)().makes_tokens]
pytestmark = pytest.mark.filterwarnings("ignore:.* tokens per view; with")  # budgets below a method's floor


def split_of(pruner, valid=None, views=3):
    """Kept and made tokens that a pruner promises for each view."""
    shown = torch.ones(views, TOKENS, dtype=torch.bool) if valid is None else valid
    kept, made = pruner.kept_and_made(pruner.count(TOKENS), shown)
    return kept.tolist(), made.tolist()


@pytest.mark.parametrize("name", BEFORE_DECODER)
@pytest.mark.parametrize("keep", [1, 2, 17, TOKENS - 1, TOKENS])
@pytest.mark.parametrize("kind", ["iid", "duplicated", "zero", "constant", "not finite"])
def test_exactly_m_distinct_ascending_indices(name, keep, kind):
    pruner = get_pruner(name, keep_tokens=keep)
    inputs = inputs_for(name, kind=kind)
    selection = pruner.select(inputs)
    assert selection.indices.dtype == torch.int64
    assert (selection.indices.diff(dim=1) > 0).all()
    assert ((selection.indices >= 0) & (selection.indices < TOKENS)).all()
    kept, made = ([TOKENS] * 3, [0] * 3) if selection.is_identity else split_of(pruner)
    assert selection.mask.sum(-1).tolist() == kept
    assert (0 if selection.made is None else selection.made.shape[1]) == made[0]
    total = kept[0] + made[0]
    assert total == pruner.count(TOKENS)
    if name in ("pool", "downsample"):
        assert abs(total - keep) <= 4  # the grid that is closest
    else:
        assert total == keep
    if selection.made is not None and kind != "not finite":
        assert selection.made.isfinite().all()


@pytest.mark.parametrize("name", BEFORE_DECODER)
@given(seed=st.integers(0, 1000), keep=st.integers(1, TOKENS - 1), share=st.floats(0.0, 1.0))
@settings(max_examples=25, deadline=None)
def test_padding_only_fills_what_valid_tokens_cannot(name, seed, keep, share):
    valid = torch.rand(3, TOKENS, generator=torch.Generator().manual_seed(seed)) < share
    pruner = get_pruner(name, keep_tokens=keep)
    selection = pruner.select(inputs_for(name, seed=seed, valid=valid))
    if selection.is_identity:  # the closest grid is the whole
        return
    kept, made = split_of(pruner, valid)
    assert (selection.indices.diff(dim=1) > 0).all()
    assert selection.eligible.sum(-1).tolist() == kept
    assert (selection.mask & ~valid).sum() == 0
    assert max(made) <= (0 if selection.made is None else selection.made.shape[1])
    assert all(count == 0 for count, patches in zip(made, valid.sum(-1).tolist(), strict=True) if patches == 0)


@pytest.mark.parametrize("name", [name for name in BEFORE_DECODER if name not in CHOOSERS])
def test_padding_does_not_reach_made_tokens(name):
    """Other values at padding patches, and other keys and attention to them, change no made token."""
    valid = torch.zeros(3, 7, 7, dtype=torch.bool)
    valid[0, 1:5], valid[1, :, 2:6], valid[2] = True, True, True
    valid = valid.flatten(1)
    pruner = get_pruner(name, keep_tokens=12)
    inputs = inputs_for(name, valid=valid)
    other = {}
    for field, value in vars(inputs_for(name, seed=1, valid=valid)).items():
        own = getattr(inputs, field)
        if field in ("features", "encoder_features", "image_embeds", "key_metric"):
            other[field] = torch.where(valid[:, :, None], own, value)
        elif field == "class_attention":
            other[field] = torch.where(valid[:, None], own, value)
        elif field == "pixels":
            shown = torch.nn.functional.interpolate(valid.unflatten(1, (7, 7))[:, None].float(), scale_factor=2) > 0
            other[field] = torch.where(shown, own, value)
        else:
            other[field] = own
    first, second = pruner.select(inputs), pruner.select(PruningInputs(**other))
    for view, (kept, made) in enumerate(zip(*split_of(pruner, valid), strict=True)):
        assert torch.allclose(first.made[view, :made], second.made[view, :made], atol=1e-6)
        assert first.mask[view].sum() == kept


@pytest.mark.parametrize("name", BEFORE_DECODER)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_batch_gives_what_its_members_give(name, dtype):
    inputs = inputs_for(name, views=5, dtype=dtype)
    pruner = get_pruner(name, keep_tokens=9)
    together = pruner.select(inputs)
    for view in range(5):
        fields = {k: v[view : view + 1] for k, v in vars(inputs).items() if isinstance(v, torch.Tensor)}
        alone = pruner.select(PruningInputs(**fields, encode=inputs.encode))
        assert torch.equal(alone.indices[0], together.indices[view])
        if together.made is not None:
            assert torch.allclose(alone.made[0].float(), together.made[view].float(), atol=1e-5)


@pytest.mark.parametrize("name", BEFORE_DECODER)
def test_same_answer_twice(name):
    pruner = get_pruner(name, keep_tokens=9)
    first, second = pruner.select(inputs_for(name)), pruner.select(inputs_for(name))
    assert torch.equal(first.indices, second.indices)
    assert (first.made is None and second.made is None) or torch.equal(first.made, second.made)


@pytest.mark.parametrize("name", BEFORE_DECODER)
@pytest.mark.parametrize("keep", [TOKENS, TOKENS + 1, 10**6])
def test_keeping_everything_is_the_identity(name, keep):
    inputs = inputs_for(name)
    selection = get_pruner(name, keep_tokens=keep).select(inputs)
    assert selection.is_identity
    assert selection.made is None
    assert selection.gather(inputs.features) is inputs.features


@pytest.mark.parametrize("name", BEFORE_DECODER)
def test_gather_keeps_dtype_and_rows(name):
    inputs = inputs_for(name, dtype=torch.bfloat16)
    selection = get_pruner(name, keep_tokens=5).select(inputs)
    kept = selection.gather(inputs.features)
    assert kept.dtype == torch.bfloat16
    assert selection.made is None or selection.made.dtype == torch.bfloat16
    for view in range(3):
        assert torch.equal(kept[view], inputs.features[view, selection.indices[view]])


@pytest.mark.parametrize("name", BEFORE_DECODER)
def test_what_a_host_lacks_is_named(name):
    pruner = get_pruner(name, keep_tokens=5)
    inputs = inputs_for(name)
    for field in pruner.needs:
        lacking = PruningInputs(**{**vars(inputs), field: None})
        with pytest.raises(ValueError, match=f"pruner '{name}' needs {field}, which this host did not give"):
            pruner.select(lacking)


@pytest.mark.parametrize("name", BEFORE_DECODER)
def test_needs_are_all_that_is_read(name):
    pruner = get_pruner(name, keep_tokens=9)
    inputs = inputs_for(name)
    told = pruner.needs | {"view_ids", "pictures"}
    given = {"features": inputs.features} | {field: getattr(inputs, field) for field in told}
    first, second = pruner.select(inputs), pruner.select(PruningInputs(**given))
    assert torch.equal(first.indices, second.indices)
    assert first.made is None or torch.equal(first.made, second.made)


@pytest.mark.parametrize("name", [n for n in BEFORE_DECODER if pruner_class(n)().floor > 1])
def test_a_budget_below_the_floor_says_what_will_be_done(name):
    floor = pruner_class(name).floor
    with pytest.warns(UserWarning, match=f"'{name}' needs {floor} tokens per view; with {floor - 1} it gives "):
        get_pruner(name, keep_tokens=floor - 1)
    with pytest.warns(UserWarning, match=f"with {floor - 1} it gives "):
        get_pruner(name, keep_tokens=(floor - 0.9) / TOKENS).select(inputs_for(name))


@pytest.mark.parametrize("name", [name for name in BEFORE_DECODER if name not in CHOOSERS])
def test_made_tokens_belong_to_a_view(name):
    with pytest.raises(ValueError, match="has no option scope"):
        get_pruner(name, scope="global")


# Methods whose choice rests on similarities and scores alone, whatever the order of tokens.
@pytest.mark.parametrize("name", ["cdpruner", "divprune", "trim", "script_release"])
def test_permuted_tokens_permute_the_selection(name):
    inputs = inputs_for(name)
    pruner = get_pruner(name, keep_tokens=9)
    order = torch.randperm(TOKENS)
    fields = {k: getattr(inputs, k)[:, order] for k in ("features", "encoder_features", "image_embeds")}
    moved = pruner.select(PruningInputs(**fields, text_embeds=inputs.text_embeds))
    still = pruner.select(inputs)
    assert torch.equal(moved.mask, still.mask[:, order])
    if still.made is not None:
        assert torch.allclose(moved.made, still.made, atol=1e-6)


@pytest.mark.parametrize("name", ["cdpruner", "divprune", "trim", "first"])
def test_more_tokens_keep_those_of_fewer(name):
    inputs = inputs_for(name)
    masks = [get_pruner(name, keep_tokens=keep).select(inputs).mask for keep in range(2, TOKENS - 1)]
    for fewer, more in itertools.pairwise(masks):
        assert not (fewer & ~more).any()


@pytest.mark.parametrize("name", ["cdpruner", "divprune"])
def test_lengths_of_rows_do_not_count(name):
    inputs = inputs_for(name)
    longer = {**vars(inputs), "features": inputs.features * torch.rand(3, TOKENS, 1).add(0.5)}
    pruner = get_pruner(name, keep_tokens=9)
    assert torch.equal(pruner.select(inputs).indices, pruner.select(PruningInputs(**longer)).indices)


def test_script_without_the_graph_ignores_order():
    inputs = make_inputs()
    pruner = get_pruner("script", keep_tokens=9, gsp=False)
    order = torch.randperm(TOKENS)
    moved = PruningInputs(
        inputs.features[:, order], image_embeds=inputs.image_embeds[:, order], text_embeds=inputs.text_embeds
    )
    assert torch.equal(pruner.select(moved).mask, pruner.select(inputs).mask[:, order])


# --- controls ------------------------------------------------------------------------------------------------------


def test_uniform_is_the_formula():
    for keep in (1, 7, 16, 48):
        expected = [int((i + 0.5) * TOKENS / keep) for i in range(keep)]
        assert get_pruner("uniform", keep_tokens=keep).select(make_inputs()).indices[0].tolist() == expected


def test_first_takes_the_first_that_are_valid():
    assert get_pruner("first", keep_tokens=9).select(make_inputs()).indices.tolist() == [list(range(9))] * 3
    valid = torch.arange(TOKENS).ge(5).expand(3, -1)
    assert get_pruner("first", keep_tokens=9).select(make_inputs(valid=valid)).indices[0].tolist() == [*range(5, 14)]


def test_grid_is_a_grid_where_one_fits():
    points = grid_points(576, 64)
    rows, columns = sorted({p // 24 for p in points}), sorted({p % 24 for p in points})
    assert len(rows) == len(columns) == 8
    assert set(torch.tensor(rows).diff().tolist()) == {3}
    assert points == sorted(r * 24 + c for r in rows for c in columns)
    assert {len(grid_points(576, keep)) == keep for keep in range(1, 577)} == {True}


@pytest.mark.parametrize("name", ["grid", "pool", "downsample"])
def test_grids_need_a_square(name):
    with pytest.raises(ValueError, match=f"pruner '{name}' needs a square layout of tokens, got 50"):
        get_pruner(name, keep_tokens=4).select(make_inputs(tokens=50))


@pytest.mark.parametrize("keep", [1, 4, 16, 64, 128, 192, 500])
def test_pool_is_adaptive_average_pooling(keep):
    inputs = PruningInputs(torch.randn(2, 576, 5))
    pruner = get_pruner("pool", keep_tokens=keep)
    rows, columns = grid_shape(24, keep)
    planes = inputs.features.mT.unflatten(-1, (24, 24))
    expected = torch.nn.functional.adaptive_avg_pool2d(planes, (rows, columns)).flatten(2).mT
    assert pruner.count(576) == rows * columns
    assert torch.allclose(pruner.select(inputs).made, expected, atol=1e-5)


def test_pool_covers_the_box_of_valid_tokens():
    valid = torch.zeros(2, 24, 24, dtype=torch.bool)
    valid[0, 5:17], valid[1, :, 3:20] = True, True
    planes = torch.randn(2, 24, 24, 5)
    made = get_pruner("pool", keep_tokens=16).select(PruningInputs(planes.flatten(1, 2), valid=valid.flatten(1))).made
    for view, box in enumerate((planes[0, 5:17], planes[1, :, 3:20])):
        expected = torch.nn.functional.adaptive_avg_pool2d(box.permute(2, 0, 1), (4, 4)).flatten(1).mT
        assert torch.allclose(made[view], expected, atol=1e-5)


def test_downsample_cuts_out_what_is_not_padding():
    valid = torch.zeros(3, 7, 7, dtype=torch.bool)
    valid[0, 1:5], valid[1] = True, True  # the third view shows nothing
    inputs = make_inputs(valid=valid.flatten(1))
    pruner = get_pruner("downsample", keep_tokens=8)
    assert split_of(pruner, inputs.valid) == ([0, 0, 0], [2 * 4, 3 * 3, 0])
    made = pruner.select(inputs).made
    assert made.shape == (3, 9, 24)
    small = torch.nn.functional.interpolate(inputs.pixels[:1, :, 2:10], size=(4, 8), mode="area")
    assert torch.allclose(made[0, :8], encode_patches(small)[0], atol=1e-6)
    assert not made[2].any()


def test_random_is_uniform_and_differs_by_view_and_seed():
    inputs = make_inputs(views=2000)
    counts = get_pruner("random", keep_tokens=10).select(inputs).mask.sum(0)
    expected = 2000 * 10 / TOKENS
    assert ((counts - expected).abs() < 5 * (expected * (1 - 10 / TOKENS)) ** 0.5).all()
    first, second = (get_pruner("random", keep_tokens=10, seed=s).select(inputs).indices for s in (0, 1))
    assert (first != second).any(-1).float().mean() > 0.99


# --- budgets, registry, command-line options -----------------------------------------------------------------------


@pytest.mark.parametrize("share, tokens, count", [(0.5, 576, 288), (0.1, 576, 58), (0.001, 576, 1), (1 / 9, 576, 64)])
def test_a_share_rounds_half_up_and_never_to_nothing(share, tokens, count):
    assert get_pruner("random", keep_tokens=share).count(tokens) == count


@pytest.mark.parametrize("budget", [0, -1, 1.5, 1.0, 0.0, "64", True, None, float("nan")])
def test_bad_budgets_are_refused(budget):
    with pytest.raises(ValueError, match="keep_tokens must be a count"):
        get_pruner("random", keep_tokens=budget)


@pytest.mark.parametrize("text", ["0", "-3", "1.5", "many", "", "nan", "1.0"])
def test_bad_budget_text_is_refused(text):
    with pytest.raises(ValueError, match="keep_tokens must be a count"):
        parse_budget(text)


def test_budget_text():
    assert parse_budget("64") == 64
    assert parse_budget("0.25") == 0.25


def test_unknown_names_list_the_valid_ones():
    with pytest.raises(ValueError, match=f"known pruners: {', '.join(list_pruners())}"):
        get_pruner("scirpt")
    with pytest.raises(ValueError, match=r"no option tua; its options: keep_tokens, .*tau"):
        get_pruner("script", tua=0.3)


def test_options_from_text_get_their_types():
    options = parse_options("script", ["tau=0.3", "gsp=false", "relevance=projector", "relevance_sign=-1", "seed=4"])
    assert options == {"tau": 0.3, "gsp": False, "relevance": "projector", "relevance_sign": -1, "seed": 4}
    assert parse_options("script", ["relevance_sign=none", "keep_tokens=0.5"]) == {
        "relevance_sign": None,
        "keep_tokens": 0.5,
    }


@pytest.mark.parametrize(
    "text, message",
    [
        ("tau", "key=value"),
        ("tau=high", "tau must be a finite number between -1 and 1; got 'high'"),
        ("gsp=maybe", "gsp must be true or false"),
        ("taw=1", "no option taw; its options:"),
    ],
)
def test_bad_option_text_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_options("script", [text])


FEATURES = torch.zeros(2, 3, 4)


def test_pruners_are_values():
    pruner = get_pruner("script", tau=0.4)
    assert pruner == get_pruner("script", tau=0.4)
    with pytest.raises(AttributeError):
        pruner.tau = 0.5


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"features": torch.zeros(3, 4)}, "features must be"),
        (
            {"features": torch.zeros(2, 3, 4), "image_embeds": torch.zeros(2, 4, 4)},
            "image_embeds must be .* = \\(2, 3, joint width\\)",
        ),
        (
            {"features": torch.zeros(2, 3, 4), "key_metric": torch.zeros(2, 4, 4)},
            "key_metric must be .* = \\(2, 3, key width\\)",
        ),
        ({"features": FEATURES, "class_attention": torch.zeros(2, 3)}, "class_attention must be"),
        (
            {"features": torch.zeros(2, 3, 4), "class_features": torch.zeros(3, 4)},
            "class_features must be .* = \\(2, encoder width\\)",
        ),
        (
            {"features": torch.zeros(2, 3, 4), "text_embeds": torch.zeros(3, 1, 4)},
            "text_embeds must be .* = \\(1 or 2, segment",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        PruningInputs(**fields)


def test_selection_mask_leaves_out_fillers():
    selection = Selection(torch.tensor([[0, 3]]), 5, torch.tensor([[True, False]]))
    assert selection.mask.tolist() == [[True, False, False, False, False]]


@pytest.mark.parametrize("name", list_pruners())
def test_options_of_another_type_or_range_are_refused(name):
    """NaN, infinity, text for a number or a flag, a flag for a number: refused for every option of every method."""
    for option, kind in option_types(pruner_class(name)).items():
        default = getattr(pruner_class(name)(), option)
        wrong = [float("nan"), float("inf"), float("-inf"), [], "\ud800 no such value"]
        if isinstance(default, bool):
            wrong += ["false", "true", 0, 1, None]
        elif isinstance(default, (int, float)):
            wrong += ["1", True, None, 2**70 if isinstance(default, int) else "x"]
        if "str" in str(kind):  # text is what these take
            wrong.remove("\ud800 no such value")
        for value in wrong:
            with pytest.raises(ValueError, match=f"{option} |means nothing|layers of cuts"):
                get_pruner(name, **{option: value})


@pytest.mark.parametrize(
    "text", ["tau=nan", "gamma=inf", "epsilon=-inf", "seed=-1", "seed=1e3", "gsp=1", "tau=0.3 tau=0.4"]
)
def test_the_command_line_is_held_to_the_same_ranges(text):
    with pytest.raises(ValueError, match=f"{text.partition('=')[0]} (must be|is given twice)"):
        parse_options("script", text.split())


@dataclass(frozen=True, kw_only=True)
class Returns(Pruner):
    """Gives back what it was told to."""

    name: ClassVar[str] = "returns"

    answer: Callable[[int], object] = None

    def choose(self, inputs, keep):
        return self.answer(keep)


def rows(*numbers, dtype=torch.int64):
    return torch.tensor([numbers], dtype=dtype)


@pytest.mark.parametrize(
    "answer, error, message",
    [
        (lambda keep: rows(0, 1, 2), TypeError, "must return .*, got Tensor"),
        (lambda keep: (rows(0, 1, 2), None), TypeError, r"got \(Tensor, NoneType\)"),
        (lambda keep: (rows(0, 1), {}), ValueError, r"\(B, 3\) int64.*got \(1, 2\)"),
        (lambda keep: (rows(0, 1, 2, dtype=torch.int32), {}), ValueError, "got .* torch.int32"),
        (lambda keep: (rows(0, 2, 1), {}), ValueError, "distinct and ascending"),
        (lambda keep: (rows(0, 1, 1), {}), ValueError, "distinct and ascending"),
        (lambda keep: (rows(-1, 1, 2), {}), ValueError, "from 0 to 5; got -1 to 2"),
        (lambda keep: (rows(0, 1, 6), {}), ValueError, "from 0 to 5; got 0 to 6"),
        (lambda keep: (rows(0, 1, 5), {}), ValueError, "valid tokens while there are any left"),
    ],
)
def test_wrong_returns_of_a_method_are_caught_and_named(answer, error, message):
    valid = torch.tensor([[True, True, True, True, False, False]])
    inputs = PruningInputs(torch.randn(1, 6, 4), valid=valid)
    with pytest.raises(error, match=f"pruner 'returns'.*{message}"):
        Returns(keep_tokens=3, answer=answer).select(inputs)


def test_a_joined_view_holds_every_token_of_every_field():
    """Joining the views is the same as having had one long view from the start."""
    inputs = make_inputs(views=2)
    joined = inputs.joined()
    assert joined.features.shape == (1, 2 * TOKENS, 24)
    for name in ("features", "encoder_features", "image_embeds", "key_metric"):
        assert torch.equal(getattr(joined, name)[0], torch.cat(list(getattr(inputs, name))))
    for name in ("class_attention", "mean_attention"):
        assert torch.equal(getattr(joined, name)[0], torch.cat(list(getattr(inputs, name)), dim=-1))
    assert torch.equal(joined.text_embeds, inputs.text_embeds[:1])
    assert joined.pixels is None
    assert joined.class_features is None
    back = inputs.of_views(slice(1, 2))
    assert torch.equal(back.class_attention, inputs.class_attention[1:])


@pytest.mark.parametrize("name", BEFORE_DECODER)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(name, dtype):
    pruner, inputs = get_pruner(name, keep_tokens=16), inputs_for(name, dtype=dtype)
    plain = pruner.select(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        selection = pruner.select(inputs)
    assert torch.equal(selection.indices, plain.indices)
    assert (selection.made is None) == (plain.made is None)
    assert plain.made is None or torch.equal(selection.made, plain.made)
