"""The methods of 2025 and 2026 against recorded choices, and their own laws."""

import dataclasses
import itertools

import pytest
import torch

from llava.pruning import PruningInputs, Selection, get_pruner, parse_options
from llava.pruning.dart import pivot_tokens
from llava.pruning.decoder_pruner import CutInputs
from llava.pruning.functional import cosine_similarity
from llava.pruning.restore import calibration_bias, groups_of_anchors, rotary_decay
from llava.relevance.asked import Asked, LanguageSpace
from llava.relevance.language import unit_products
from llava.relevance.policy import Offer, settle
from method_inputs import inputs_for, make_inputs
from records import selection_cases

PRECISIONS = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def changed(inputs, **fields):
    return dataclasses.replace(inputs, **fields)


# --- laws that several share ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["scope", "mmtok", "fastervlm", "cen_prune", "hawk"])
def test_more_tokens_keep_those_of_fewer(name):
    inputs = inputs_for(name)
    masks = [get_pruner(name, keep_tokens=keep).select(inputs).mask for keep in range(1, 48)]
    for fewer, more in itertools.pairwise(masks):
        assert not (fewer & ~more).any()


@pytest.mark.parametrize(
    "name, options",
    [
        ("scope", {}),
        ("mmtok", {}),
        ("fastervlm", {}),
        ("vispruner", {}),
        ("prunesid", {}),
        ("cen_prune", {}),
        ("cen_prune", {"selector": "max_min"}),
        ("hawk", {}),
    ],
)
def test_permuted_tokens_permute_the_selection(name, options):
    inputs = inputs_for(name)
    order = torch.randperm(49, generator=torch.Generator().manual_seed(0))
    fields = {field: getattr(inputs, field)[:, order] for field in ("features", "encoder_features", "image_embeds")}
    fields |= {"class_attention": inputs.class_attention[:, :, order]}
    if inputs.relevance is not None:
        fields["relevance"] = inputs.relevance[:, order]
    pruner = get_pruner(name, keep_tokens=9, **options)
    assert torch.equal(pruner.select(changed(inputs, **fields)).mask, pruner.select(inputs).mask[:, order])


@pytest.mark.parametrize("name", ["scope", "mmtok", "vispruner", "cen_prune", "holov", "prunesid"])
@pytest.mark.parametrize("field", ["features", "encoder_features"])
def test_only_the_cosines_of_what_is_compared_count(name, field):
    """A length of rows that is common to all changes nothing; of each row, nothing where rows are not centred."""
    inputs = make_inputs()
    factor = 2 ** torch.arange(-3.0, 4.0).repeat(7).expand(3, -1)
    if name == "cen_prune":
        factor = torch.full((3, 49), 4.0)
    if name == "prunesid" and field == "encoder_features":
        return  # a sigmoid comes first
    longer = changed(inputs, **{field: getattr(inputs, field) * factor[:, :, None]})
    pruner = get_pruner(name, keep_tokens=9)
    assert torch.equal(pruner.select(longer).indices, pruner.select(inputs).indices)


@pytest.mark.parametrize("name", ["scope", "fastervlm", "vispruner", "holov", "holov_release"])
def test_the_attention_that_a_patch_receives_stands_for_that_of_the_class_token(name):
    inputs = make_inputs()
    swapped = changed(inputs, class_attention=inputs.mean_attention, mean_attention=None)
    with_token, without = get_pruner(name, keep_tokens=9), get_pruner(name, keep_tokens=9, class_token=False)
    assert torch.equal(with_token.select(swapped).indices, without.select(inputs).indices)
    assert not torch.equal(with_token.select(inputs).indices, without.select(inputs).indices)
    with pytest.raises(ValueError, match="needs mean_attention, which this host did not give"):
        without.select(swapped)


# --- SCOPE ---------------------------------------------------------------------------------------------------------


@PRECISIONS
@pytest.mark.parametrize("case, tensors", selection_cases("scope"))
def test_scope_order_is_that_of_the_published_formulas(case, tensors, dtype):
    features = tensors["features"].to(dtype)[None]
    inputs = PruningInputs(features, encoder_features=features, class_attention=tensors["attention"].to(dtype)[None])
    selection = get_pruner("scope", keep_tokens=case["m"], alpha=case["alpha"]).select(inputs)
    assert selection.details["order"][0].argsort()[: case["m"]].tolist() == tensors["order"].tolist()


def test_scope_without_saliency_covers_and_gains_less_with_every_token():
    inputs = make_inputs()
    flat = changed(inputs, class_attention=torch.ones_like(inputs.class_attention))
    pruner = get_pruner("scope", keep_tokens=20, alpha=0.0)
    selection = pruner.select(inputs)
    assert torch.equal(selection.indices, pruner.select(flat).indices)
    similarity = cosine_similarity(inputs.encoder_features).clamp_min(0)
    order = selection.details["order"].argsort(dim=-1)[:, :20]
    reach = similarity.gather(2, order[:, None].expand(-1, 49, -1)).cummax(-1).values.sum(1)  # (B, 20) covered
    gains = torch.cat([reach[:, :1], reach.diff(dim=-1)], dim=-1)
    assert (gains.diff(dim=-1) <= 1e-5).all()
    single = similarity.sum(1)
    assert torch.equal(order[:, 0], single.argmax(-1))


def test_scope_does_not_cover_padding():
    """Three copies of one patch in the padding do not make its like the best to cover."""
    features = torch.eye(4)[[0, 1, 2, 3, 3, 3]][None]
    attention = torch.full((1, 1, 6), 0.1)
    fields = {"encoder_features": features, "class_attention": attention}
    pruner = get_pruner("scope", keep_tokens=1)
    assert pruner.select(PruningInputs(features, **fields)).indices.tolist() == [[3]]
    shown = torch.tensor([[True, True, True, True, False, False]])
    assert pruner.select(PruningInputs(features, valid=shown, **fields)).indices.tolist() == [[0]]


# --- MMTok ---------------------------------------------------------------------------------------------------------

KEYWORDS = {
    "What is the color of the dog?": "color of dog",
    "What does the sign on the wall say?": "sign on wall say",
    "Who is this?": "this",
    "Where is he?": "Where is he?",
    "How many people are there, and what are they doing?": "many people there doing",
    "": "",
    " what's the man's shirt-colour?": "s man s shirt colour",
}


@PRECISIONS
@pytest.mark.parametrize("case, tensors", selection_cases("mmtok"))
def test_mmtok_order_is_the_published_one(case, tensors, dtype):
    features, encoder, text = (tensors[name].to(dtype)[None] for name in ("projected", "features", "text"))
    inputs = PruningInputs(features, encoder_features=encoder, query_embeds=text)
    options = {"tau_text": case["tau_t"], "tau_vision": case["tau_v"], "alpha": case["alpha"]}
    selection = get_pruner("mmtok", keep_tokens=case["m"], **options).select(inputs)
    assert selection.details["order"][0].argsort()[: case["m"]].tolist() == tensors["order"].tolist()
    assert selection.indices[0].tolist() == tensors["indices"].tolist()


@pytest.mark.parametrize("question", KEYWORDS)
def test_mmtok_reads_the_words_that_the_published_code_reads(question):
    """Recorded from its text helpers; what is no text is read as it comes."""
    assert get_pruner("mmtok").read(question) == KEYWORDS[question]
    assert get_pruner("mmtok").read((3, 5)) == (3, 5)
    assert get_pruner("script").read(question) == question


def test_mmtok_takes_the_most_similar_token_first_where_words_alone_count():
    inputs = changed(make_inputs(), query_embeds=make_inputs(seed=3).query_embeds[:, :1])
    likeness = cosine_similarity(inputs.features, inputs.query_embeds)[:, :, 0]
    order = get_pruner("mmtok", keep_tokens=5, alpha=0.0).select(inputs).details["order"]
    assert torch.equal(order.argmin(-1), likeness.argmax(-1))
    opposite = get_pruner("mmtok", keep_tokens=5, alpha=0.0, relevance_sign=-1).select(inputs).details["order"]
    assert torch.equal(opposite.argmin(-1), likeness.argmin(-1))


def test_mmtok_counts_real_words_in_any_order():
    inputs = make_inputs()
    pruner = get_pruner("mmtok", keep_tokens=9)
    two = changed(inputs, query_embeds=inputs.query_embeds[:, [2, 0]])
    mask = torch.tensor([[True, False, True, False]])
    assert torch.equal(pruner.select(two).indices, pruner.select(changed(inputs, query_mask=mask)).indices)
    none = get_pruner("mmtok", keep_tokens=9, relevance="none")
    assert not none.reads_question
    assert torch.equal(
        none.select(inputs).indices,
        pruner.select(changed(inputs, query_mask=torch.zeros(1, 4, dtype=torch.bool))).indices,
    )


def test_mmtok_wants_words_not_scores():
    scored = changed(make_inputs(), query_embeds=None, relevance=torch.rand(3, 49))
    with pytest.raises(ValueError, match="needs query_embeds, which this host did not give"):
        get_pruner("mmtok", keep_tokens=9).select(scored)
    with pytest.raises(ValueError, match="relevance must be one of projector, none; got 'clip'"):
        get_pruner("mmtok", relevance="clip")


# --- FasterVLM -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case, tensors", selection_cases("fastervlm"))
def test_fastervlm_keeps_what_the_published_code_keeps(case, tensors):
    inputs = PruningInputs(torch.zeros(case["B"], case["n"], 1), class_attention=tensors["attention"])
    assert torch.equal(get_pruner("fastervlm", keep_tokens=case["m"]).select(inputs).mask, tensors["mask"])


# --- VisPruner -----------------------------------------------------------------------------------------------------


@PRECISIONS
@pytest.mark.parametrize("case, tensors", selection_cases("vispruner"))
def test_vispruner_keeps_what_the_published_code_keeps(case, tensors, dtype):
    features = tensors["features"].to(dtype)
    inputs = PruningInputs(features, encoder_features=features, class_attention=tensors["attention"].to(dtype))
    options = {"important": case["important_ratio"], "step": case["step"]}
    selection = get_pruner("vispruner", keep_tokens=case["m"], **options).select(inputs)
    assert torch.equal(selection.mask, tensors["mask"])
    assert [row.nonzero().flatten().tolist() for row in selection.details["important"]] == [
        sorted(row) for row in tensors["important"].tolist()
    ]


@pytest.mark.parametrize("keep", [1, 8, 31])
def test_vispruner_by_attention_alone_is_fastervlm(keep):
    inputs = make_inputs()
    alone = get_pruner("vispruner", keep_tokens=keep, important=1.0).select(inputs)
    assert torch.equal(alone.indices, get_pruner("fastervlm", keep_tokens=keep).select(inputs).indices)


def test_vispruner_by_hand():
    """Patches by falling attention: 0 1 2 3 4. Of the even places 0 is a copy of 3, and 4 is nearly one of 1."""
    features = torch.tensor([[[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0], [0, 1, 0.1]]])
    attention = torch.tensor([[[0.5, 0.4, 0.3, 0.2, 0.1]]])
    inputs = PruningInputs(features, encoder_features=features, class_attention=attention)
    kept = {
        keep: get_pruner("vispruner", keep_tokens=keep, important=0.0, step=1).select(inputs).indices[0].tolist()
        for keep in (4, 3, 2)
    }
    assert kept[4] == [1, 2, 3, 4]  # the list is now 4 2 1 3: even places are 4 and 1, odd ones 2 and 3
    assert kept[3] == [1, 2, 3]  # now 1 2 3: even places are 1 and 3, and neither is like 2; the first goes
    assert kept[2] == [2, 3]


def test_vispruner_compares_no_padding():
    """A view with padding is one of its valid patches alone, whatever the length of the others' lists."""
    valid = torch.ones(3, 49, dtype=torch.bool)
    valid[1, 30:], valid[2, ::7] = False, False
    inputs = make_inputs(valid=valid)
    for keep in (5, 12, 21):
        pruner = get_pruner("vispruner", keep_tokens=keep, step=3)
        together = pruner.select(inputs).mask
        for view in range(3):
            real = valid[view]
            alone = PruningInputs(
                inputs.features[view : view + 1, real],
                encoder_features=inputs.encoder_features[view : view + 1, real],
                class_attention=inputs.class_attention[view : view + 1, :, real],
            )
            assert torch.equal(together[view, real], pruner.select(alone).mask[0])


# --- HoloV ---------------------------------------------------------------------------------------------------------


@PRECISIONS
@pytest.mark.parametrize("case, tensors", selection_cases("holov"))
def test_holov_release_keeps_what_the_published_code_keeps(case, tensors, dtype):
    inputs = PruningInputs(
        tensors["features"].to(dtype)[None], class_attention=tensors["attention"].to(dtype)[None, None]
    )
    options = {"crops": case["crops"], "alpha": case["alpha"]}
    selection = get_pruner("holov_release", keep_tokens=case["m"], **options).select(inputs)
    details = selection.details
    assert details["asked"][0].tolist() == tensors["quota_before_cap"].tolist()
    assert details["quota"][0].tolist() == tensors["quota"].tolist()
    assert torch.allclose(details["crop_score"][0].float(), tensors["crop_score"], rtol=1e-4)
    published = tensors["positions"][tensors["positions"] >= 0]  # where the code appends a zero vector it is -1
    assert details["in_quota"][0].nonzero().flatten().tolist() == published.sort().values.tolist()
    assert selection.mask[0, published].all()
    assert selection.mask.sum() == case["m"]


@pytest.mark.parametrize("keep", [1, 3, 16, 17, 31, 48])
def test_holovs_quotas_are_those_of_the_attention(keep):
    """Uniform features leave no variance to count: the quotas are the same."""
    inputs = make_inputs()
    pruner = get_pruner("holov", keep_tokens=keep)
    quota = pruner.select(inputs).details["quota"]
    alike = changed(inputs, features=torch.ones_like(inputs.features))
    assert torch.equal(quota, pruner.select(alike).details["quota"])
    crops = quota.shape[1]
    assert crops == (16 if keep > 16 else 4)
    assert quota.sum(-1).tolist() == [keep] * 3
    room = [49 // crops + (crop < 49 % crops) for crop in range(crops)]
    assert (quota <= torch.tensor(room)).all()


def test_holov_by_hand():
    """Two crops of four tokens; the first has 3/4 of the attention. Its surplus is handed on."""
    attention = torch.tensor([0.3, 0.1, 0.2, 0.15, 0.05, 0.1, 0.05, 0.05])[None, None]
    features = torch.eye(8)[[0, 0, 0, 0, 5, 4, 4, 4]][None]
    inputs = PruningInputs(features, class_attention=attention)

    def kept(keep, **options):
        selection = get_pruner("holov", keep_tokens=keep, crops=2, **options).select(inputs)
        return selection.indices[0].tolist(), selection.details["quota"][0].tolist()

    assert kept(4) == ([0, 2, 3, 5], [3, 1])
    assert kept(6) == ([0, 1, 2, 3, 5, 6], [4, 2])  # 4.5 and 1.5; token 4 is like none, 6 like some of its crop
    assert get_pruner("holov_release", keep_tokens=6, crops=2).select(inputs).indices.tolist() == [[0, 1, 2, 3, 4, 5]]


def test_holovs_squares():
    features = torch.randn(1, 16, 4, generator=torch.Generator().manual_seed(0))
    attention = torch.zeros(1, 1, 16)
    attention[0, 0, [2, 3, 6, 7]] = 0.25  # the upper right square
    inputs = PruningInputs(features, class_attention=attention)
    selection = get_pruner("holov", keep_tokens=4, crops=4, layout="squares").select(inputs)
    assert selection.indices.tolist() == [[2, 3, 6, 7]]
    with pytest.raises(ValueError, match="squares needs square numbers of crops and tokens, got 3 and 16"):
        get_pruner("holov", keep_tokens=4, crops=3, layout="squares").select(inputs)


# --- PruneSID ------------------------------------------------------------------------------------------------------


@PRECISIONS
@pytest.mark.parametrize("case, tensors", selection_cases("prunesid"))
def test_prunesid_keeps_what_the_published_code_keeps(case, tensors, dtype):
    """With the exact factorisation in place of its random one."""
    hidden = tensors["hidden_states"].to(dtype)
    inputs = PruningInputs(
        hidden[:, 1:],
        encoder_features=hidden[:, 1:],
        class_features=hidden[:, 0],
        class_attention=tensors["attention"].to(dtype)[None],
    )
    selection = get_pruner("prunesid", keep_tokens=case["m"]).select(inputs)
    for name in ("group", "survivors", "quota"):
        assert selection.details[name][0].tolist() == tensors[name].tolist()
    assert selection.indices[0].tolist() == sorted(tensors["kept"].tolist())
    assert torch.equal(selection.made[0, 0], hidden[0, 0])
    assert selection.leading == 1


@pytest.mark.parametrize("class_token", [True, False])
def test_prunesid_leaves_no_group_out(class_token):
    inputs = make_inputs()
    for keep in (5, 12, 30, 48):
        selection = get_pruner("prunesid", keep_tokens=keep, class_token=class_token).select(inputs)
        assert selection.indices.shape[1] == keep - class_token
        assert (selection.made is None) != class_token
        for view in range(3):
            group = selection.details["group"][view]
            assert set(group.tolist()) == set(group[selection.mask[view]].tolist())
            assert selection.details["quota"][view].sum() == keep - class_token


def test_prunesid_suppresses_nothing_once_its_threshold_exceeds_a_cosine():
    inputs = make_inputs()
    near = changed(inputs, encoder_features=inputs.encoder_features + 2)  # mean cosine about 0.8
    assert get_pruner("prunesid", keep_tokens=48).select(near).details["survives"].all()
    assert not get_pruner("prunesid", keep_tokens=12).select(near).details["survives"].all()


# --- Cen-Prune -----------------------------------------------------------------------------------------------------


@PRECISIONS
@pytest.mark.parametrize("selector, order", [("dpp", "order_dpp"), ("max_min", "order_maxmin")])
@pytest.mark.parametrize("case, tensors", selection_cases("cen_prune"))
def test_cen_prune_order_is_that_of_the_published_formulas(case, tensors, selector, order, dtype):
    inputs = PruningInputs(tensors["features"].to(dtype)[None], relevance=tensors["relevance"].to(dtype)[None])
    options = {"selector": selector, "standardise": case["standardised"]}
    selection = get_pruner("cen_prune", keep_tokens=case["m"], **options).select(inputs)
    assert selection.details["order"][0].argsort()[: case["m"]].tolist() == tensors[order].tolist()
    assert torch.allclose(selection.details["weight"][0].float(), tensors["distinctiveness"], atol=1e-5)


def test_cen_prunes_max_min_reads_no_question():
    pruner = get_pruner("cen_prune", selector="max_min")
    assert (pruner.relevance, pruner.reads_question, pruner.needs) == ("none", False, frozenset())
    with pytest.raises(ValueError, match="relevance=clip means nothing with selector=max_min"):
        get_pruner("cen_prune", selector="max_min", relevance="clip")


def test_cen_prune_keeps_padding_out_of_mean_and_weights():
    valid = torch.ones(3, 49, dtype=torch.bool)
    valid[:, 40:] = False
    inputs = make_inputs(valid=valid)
    for options in ({}, {"selector": "max_min"}, {"standardise": True}):
        pruner = get_pruner("cen_prune", keep_tokens=9, **options)
        alone = PruningInputs(
            inputs.features[:, :40], image_embeds=inputs.image_embeds[:, :40], text_embeds=inputs.text_embeds
        )
        assert torch.equal(pruner.select(inputs).indices, pruner.select(alone).indices)


# --- HAWK ----------------------------------------------------------------------------------------------------------


def test_hawk_keeps_the_most_relevant():
    inputs = inputs_for("hawk")
    expected = inputs.relevance.topk(9).indices.sort().values
    assert torch.equal(get_pruner("hawk", keep_tokens=9).select(inputs).indices, expected)
    other = get_pruner("hawk", keep_tokens=9, relevance="projector")
    cosine = cosine_similarity(inputs.features, inputs.query_embeds.mean(1, keepdim=True))[:, :, 0]
    expected = cosine.topk(9).indices.sort().values
    assert torch.equal(other.select(changed(inputs, relevance=None)).indices, expected)


def test_hawks_score_by_loops():
    torch.manual_seed(0)
    queries, keys, weights = torch.randn(1, 3, 4, 5).double(), torch.randn(2, 7, 2, 5).double(), torch.rand(4)
    words, shown = torch.tensor([[True, False, True]]), torch.ones(2, 7, dtype=torch.bool)
    shown[1, 5:] = False
    score = unit_products(queries, keys, words, shown, weights)
    for view in range(2):
        expected = torch.zeros(7).double()
        for head in range(4):
            products = torch.zeros(7).double()
            for token in shown[view].nonzero().flatten().tolist():
                products[token] = sum(queries[0, word, head] @ keys[view, token, head // 2] for word in (0, 2)) / 2
            expected += weights[head] * products / products.norm()
        assert torch.allclose(score[view], expected)
    halves = sum(
        unit_products(queries[:, :, heads], keys[:, :, key], words, shown)
        for heads, key in (([0, 1], [0]), ([2, 3], [1]))
    )
    assert torch.allclose(halves, unit_products(queries, keys, words, shown))  # ranks that share the heads


def test_hawks_score_is_finite():
    queries, keys = torch.randn(1, 3, 4, 5), torch.randn(2, 7, 2, 5)
    keys[0, 3], queries[0, 1, 2] = torch.inf, torch.nan
    assert unit_products(queries, keys).isfinite().all()
    assert unit_products(queries, torch.zeros_like(keys)).eq(0).all()


class PlainAttention:
    """A first attention of two heads whose queries and keys are the embeddings themselves."""

    scaling = 1.0

    def queries(self, embeds):
        return embeds.unflatten(-1, (2, -1))

    keys = queries


def test_what_is_asked_reaches_hawk_as_scores_and_mmtok_as_words():
    torch.manual_seed(0)
    table, features = torch.randn(20, 8), torch.randn(2, 7, 8)
    space = LanguageSpace(lambda text: [len(word) for word in text.split()], table.__getitem__, PlainAttention())
    questions, pictures = ["What is the color of the dog?", "Is it?"], torch.tensor([1, 0])
    fields = Asked(get_pruner("hawk"), questions, language=space).fields(pictures, features)
    for view, words in enumerate(([2, 3], [4, 2, 3, 5, 2, 3, 4])):
        expected = unit_products(table[words][None].unflatten(-1, (2, 4)), features[view, None].unflatten(-1, (2, 4)))
        assert torch.allclose(fields["relevance"][view], expected[0], atol=1e-6)
    fields = Asked(get_pruner("mmtok"), questions, language=space).fields(pictures, features)
    assert torch.equal(fields["query_embeds"][1], table[[5, 2, 3]])  # color of dog
    assert fields["query_mask"].tolist() == [[True, True, False], [True, True, True]]


# --- RESTORE -------------------------------------------------------------------------------------------------------

RESTORE = {case.values[0]["case"]: case.values for case in selection_cases("restore")}


@PRECISIONS
def test_restores_anchors_and_groups_are_those_of_the_published_formulas(dtype):
    case, tensors = RESTORE["cluster_n169_m16_g0.25_s93"]
    features = tensors["features"].to(dtype)[None]
    kept = Selection(tensors["pruned_keep"][None], case["n"])
    restore = get_pruner("restore", keep_tokens=case["m"], gamma=case["gamma"], method="fastervlm")
    made = restore.make(PruningInputs(features), kept, restore.count_made(case["m"]))
    assert made.details["anchors"][0].tolist() == tensors["anchors"].tolist()
    assert made.details["sizes"][0].tolist() == tensors["group_size"].tolist()
    assert made.details["positions"][0].tolist() == tensors["merged_position"].tolist()
    assert torch.allclose(made.made[0].float(), tensors["merged"], atol=1e-5)
    rest = torch.ones(1, case["n"], dtype=torch.bool).scatter(1, kept.indices, False)
    groups = groups_of_anchors(cosine_similarity(features), rest, *anchors_of(tensors))
    assert groups[0].int().argmax(0)[rest[0]].tolist() == tensors["assignment"].tolist()


def anchors_of(tensors):
    anchors = tensors["anchors"][None]
    return anchors, torch.ones_like(anchors, dtype=torch.bool)


@PRECISIONS
def test_restores_calibration_is_that_of_the_published_formulas(dtype):
    _, tensors = RESTORE["decay_table"]
    assert torch.allclose(rotary_decay(tensors["distance"].to(dtype), 128).float(), tensors["decay"], atol=1e-5)
    _, tensors = RESTORE["cluster_n169_m16_g0.25_s93"]
    bias = calibration_bias(tensors["prompt_positions"], tensors["prompt_sizes"].to(dtype), 128)
    assert torch.allclose(bias.float(), tensors["bias"], atol=1e-5)
    assert calibration_bias(torch.tensor([4]), torch.ones(1), 64).abs().max() < 1e-6


@pytest.mark.parametrize("name", ["script", "divprune", "fastervlm", "vispruner", "mmtok", "random"])
def test_restore_keeps_what_the_other_method_keeps_and_merges_the_rest(name):
    inputs = make_inputs()
    selection = get_pruner("restore", keep_tokens=12, method=name).select(inputs)
    assert torch.equal(selection.indices, get_pruner(name, keep_tokens=6).select(inputs).indices)
    assert selection.made.shape == (3, 6, 24)
    sizes = selection.details["sizes"]
    assert sizes.sum(-1).tolist() == [49 - 6] * 3
    assert (sizes >= 1).all()
    total = (selection.made * sizes[:, :, None]).sum(1) + selection.gather(inputs.features).sum(1)
    assert torch.allclose(total, inputs.features.sum(1), atol=1e-4)  # every token is in one place


def test_restore_with_the_whole_budget_is_the_other_method():
    inputs = make_inputs()
    selection = get_pruner("restore", keep_tokens=9, method="divprune", gamma=1.0).select(inputs)
    assert selection.made is None
    assert torch.equal(selection.indices, get_pruner("divprune", keep_tokens=9).select(inputs).indices)
    merged = get_pruner("restore", keep_tokens=1, method="divprune", gamma=0.0).select(inputs)
    assert torch.allclose(merged.made[:, 0], inputs.features.mean(1), atol=1e-6)


def test_restore_passes_options_on():
    inputs = make_inputs()
    options = parse_options("restore", ["method=script", "options=tau=0.1,gsp_ratio=0.9", "relevance=projector"])
    restore = get_pruner("restore", keep_tokens=12, **options)
    assert restore.inner == get_pruner("script", tau=0.1, gsp_ratio=0.9, relevance="projector")
    assert restore.needs == {"query_embeds"}
    expected = get_pruner("script", keep_tokens=6, tau=0.1, gsp_ratio=0.9, relevance="projector").select(inputs)
    assert torch.equal(restore.select(inputs).indices, expected.indices)


def test_restore_reads_the_question_as_the_other_method_does():
    settled, choice = settle(get_pruner("restore", method="script"), Offer())
    assert (settled.relevance, settled.inner.relevance, choice.source) == ("clip", "clip", "clip")
    settled, choice = settle(get_pruner("restore", method="hawk"), Offer())
    assert (settled.inner.relevance, choice.source) == ("hawk", "hawk")
    words = get_pruner("restore", method="mmtok")
    assert words.read("What is the color of the dog?") == "color of dog"
    with pytest.raises(ValueError, match=r"no tokenizer\. Instead, here work relevance=none"):
        settle(words, Offer(no_words="no tokenizer"))
    assert settle(get_pruner("restore", method="divprune"), Offer())[1] is None


@pytest.mark.parametrize(
    "options, message",
    [
        ({"method": "sript"}, "unknown pruner 'sript'; known pruners: "),
        ({"method": "trim"}, "around a method that keeps tokens as they are: cdpruner, cen_prune, divprune"),
        ({"method": "fastv"}, "around a method that keeps tokens as they are"),
        ({"method": "restore"}, "around a method that keeps tokens as they are"),
        ({"options": "tau"}, "key=value, got 'tau'"),
        ({"options": "taw=1"}, "pruner 'script' has no option taw"),
        ({"options": "tau=1,scope=global"}, "scope cannot be among the options of the method inside restore"),
        ({"method": "divprune", "relevance": "clip"}, "relevance=clip means nothing: divprune reads no question"),
        ({"method": "divprune", "relevance_sign": 1}, "relevance_sign=1 means nothing with relevance=none"),
    ],
)
def test_restore_refuses_what_it_cannot_go_around(options, message):
    with pytest.raises(ValueError, match=message):
        get_pruner("restore", **options)


# --- DART ----------------------------------------------------------------------------------------------------------


@PRECISIONS
@pytest.mark.parametrize("case, tensors", selection_cases("dart"))
def test_dart_keeps_what_its_port_keeps_where_pivots_are_visited_by_norm(case, tensors, dtype):
    start, end = case["prefix"], case["prefix"] + case["n"]
    keys, state = tensors["keys"].to(dtype).transpose(1, 2).flatten(2), tensors["state"].to(dtype)
    inputs = CutInputs(
        keys=keys[:, start:end], text_keys=keys[:, end:], final=state[:, start:end], text_final=state[:, end:]
    )
    visual, text = pivot_tokens(inputs.keys, inputs.text_keys, case["pivot_image"])
    assert visual[0].tolist() == tensors["image_pivots"].tolist()
    assert text[0].tolist() == tensors["text_pivots"].tolist()
    chosen, _ = get_pruner("dart").choose_at(inputs, case["kept_count"])
    assert chosen[0].tolist() == tensors["kept_recommended"].sort().values.tolist()
