"""Pruners on tiny random models of the library's own classes: every way to call them gives what it should."""

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from llava.integrations.transformers import TESTED_CLASSES
from llava.pruning import get_pruner
from transformers_families import IMAGE, MAKERS, TEXT, VIDEO, family

FAMILIES = sorted(MAKERS)
NEW = 5
MASK_BEFORE_THE_DOOR = {"gemma3", "paligemma"}  # the language model alone would build another mask
REFUSES_ASSISTANTS = {"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3", "paligemma"}  # the library itself, see below


# The older library builds other masks in chunks (Gemma3) and without a cache (PaliGemma): unpruned prompts differ too.
BEFORE_5_23 = Version(transformers.__version__) < Version("5.23")


def skip_without_a_cache(host):
    if host.name == "paligemma" and BEFORE_5_23:
        pytest.skip("this version of the library answers otherwise without a cache, unpruned too")


@pytest.fixture(params=FAMILIES)
def host(request):
    return family(request.param)


def pruner(keep=3, **options):
    return get_pruner("divprune", keep_tokens=keep, **options)


def greedy(host, arguments, **options):
    with torch.no_grad():
        return host.model.generate(**arguments, **{"max_new_tokens": NEW, "do_sample": False, **options})


def answers(host, arguments, **options):
    """New tokens alone, as everybody cuts them out."""
    output = greedy(host, arguments, **options)
    assert torch.equal(
        output[:, : arguments["input_ids"].shape[1]].unique(dim=0), arguments["input_ids"].unique(dim=0)
    )
    return output[:, arguments["input_ids"].shape[1] :]


def logits(host, arguments, **options):
    with torch.no_grad():
        return host.model(**arguments, **options).logits


def kept_columns(host, handle, arguments):
    """(B, L) bool: what stays of the prompts, by the handle's own account."""
    columns = arguments["attention_mask"].bool().clone()
    for one in handle.kept:
        columns[one.picture.row, one.picture.columns] &= one.kept
    return columns


def test_these_classes_are_called_tested():
    assert {type(family(name).model).__name__ for name in FAMILIES} <= set(TESTED_CLASSES)


@pytest.mark.parametrize("positions", ["auto", "packed", "original"])
def test_keeping_everything_is_the_unpruned_model_bit_for_bit(host, positions):
    several_axes = host.name.startswith("qwen")
    if several_axes and positions == "packed":
        pytest.skip("packed positions of mRoPE differ by definition")
    arguments = host.batch()
    real = arguments["attention_mask"].bool()
    expected, expected_answers = logits(host, arguments), greedy(host, host.batch())
    with pruner(500)(host.model, positions=positions):
        found = logits(host, host.batch())
        assert torch.equal(found[real], expected[real])
        assert torch.equal(greedy(host, host.batch()), expected_answers)


def test_greedy_counts_and_cache(host):
    arguments = host.batch()
    with pruner()(host.model) as handle:
        output = greedy(host, arguments, return_dict_in_generate=True)
    assert torch.equal(output.sequences[:, : arguments["input_ids"].shape[1]], arguments["input_ids"])
    assert output.sequences.shape[1] == arguments["input_ids"].shape[1] + NEW
    text = (arguments["attention_mask"].bool() & (arguments["input_ids"] != IMAGE)).sum(-1)
    kept = torch.zeros_like(text)
    for one in handle.kept:
        assert set(one.per_view) == {3}
        kept[one.picture.row] += sum(one.per_view)
    assert torch.equal(kept_columns(host, handle, arguments).sum(-1), text + kept)
    assert output.past_key_values.get_seq_length() == (text + kept).max() + NEW - 1


def test_forward_is_the_first_step_of_generate(host):
    with pruner()(host.model):
        output = greedy(host, host.batch(), return_dict_in_generate=True, output_logits=True)
        found = logits(host, host.batch())
        torch.testing.assert_close(found[:, -1], output.logits[0], rtol=1e-4, atol=1e-4)
        last = logits(host, host.batch(), logits_to_keep=1)
        torch.testing.assert_close(last, found[:, -1:], rtol=1e-4, atol=1e-4)


def test_ways_of_decoding_agree(host):
    with pruner()(host.model):
        expected = answers(host, host.batch())
        assert torch.equal(answers(host, host.batch(), use_cache=False), expected)
        assert torch.equal(answers(host, host.batch(), cache_implementation="static", disable_compile=True), expected)
        assert torch.equal(
            answers(host, host.batch(), past_key_values=DynamicCache(config=host.model.config)), expected
        )
        if not (host.name == "gemma3" and BEFORE_5_23):
            assert torch.equal(answers(host, host.batch(), prefill_chunk_size=4), expected)


def test_beams_and_returned_sequences(host):
    skip_without_a_cache(host)
    options = {"num_beams": 3, "num_return_sequences": 3, "return_dict_in_generate": True, "output_scores": True}
    with pruner()(host.model):
        cached = greedy(host, host.batch(), **options)
        uncached = greedy(host, host.batch(), use_cache=False, **options)
        assert torch.equal(cached.sequences, uncached.sequences)
        torch.testing.assert_close(cached.sequences_scores, uncached.sequences_scores, rtol=1e-4, atol=1e-4)
        best = answers(host, host.batch(), num_beams=3)
    width = host.batch()["input_ids"].shape[1]
    assert torch.equal(cached.sequences[::3, width:], best)


def test_sampling(host):
    skip_without_a_cache(host)
    options = {"do_sample": True, "num_return_sequences": 2, "top_k": 20}
    with pruner()(host.model):
        drawn = []
        for cached in (True, True, False):
            torch.manual_seed(7)
            drawn.append(greedy(host, host.batch(), use_cache=cached, **options))
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])
    assert drawn[0].shape[0] == 4


@pytest.mark.parametrize("positions", ["auto", "original"])
@pytest.mark.parametrize("cached", [True, False])
def test_a_row_alone_is_the_row_in_its_batch(host, positions, cached):
    with pruner()(host.model, positions=positions):
        together = answers(host, host.batch(), use_cache=cached)
        for row in range(2):
            assert torch.equal(answers(host, host.single(row), use_cache=cached)[0], together[row])


def test_a_budget_that_finds_itself_in_a_batch_and_alone(host):
    """Views with counts of their own, within floor and ceiling; a row's do not depend on its batch."""
    method = get_pruner("script", keep_tokens="auto:0.8:floor=2:ceiling=0.9", relevance="none", gsp=False)
    arguments = host.batch()
    with method(host.model) as handle:
        output = answers(host, arguments)
        together = handle.kept
        for row in range(len(output)):
            alone = answers(host, host.single(row))
            assert torch.equal(alone[0], output[row])
            own = [one for one in together if one.picture.row == row]
            assert [one.per_view for one in handle.kept] == [one.per_view for one in own]
    for one in together:
        sizes = one.picture.view_sizes()
        assert all(min(2, size - 1) <= kept < size for kept, size in zip(one.per_view, sizes, strict=True))


def test_prompt_lookup_is_greedy(host):
    with pruner()(host.model):
        expected = answers(host, host.single(1), max_new_tokens=12)
        assert torch.equal(answers(host, host.single(1), max_new_tokens=12, prompt_lookup_num_tokens=3), expected)


def test_a_text_assistant_is_greedy(host):
    torch.manual_seed(1)
    assistant = LlamaForCausalLM(LlamaConfig(**TEXT)).eval()
    if host.name in REFUSES_ASSISTANTS:  # token types go to the assistant, pruner or not
        with pytest.raises(ValueError, match="token_type_ids"):
            greedy(host, host.single(1), assistant_model=assistant)
        return
    with pruner()(host.model):
        expected = answers(host, host.single(1))
        assert torch.equal(answers(host, host.single(1), assistant_model=assistant), expected)


def test_it_is_the_language_model_on_the_kept_rows(host):
    """Independent of the mechanism: watch the unpruned call, drop rows by hand, run the language model on the rest."""
    if host.name in MASK_BEFORE_THE_DOOR:
        pytest.skip("its base model builds the mask")
    language_model = getattr(host.model.model, "language_model", None) or host.model.model.text_model
    seen = {}
    watch = language_model.register_forward_pre_hook(
        lambda module, positional, named: seen.update(named), with_kwargs=True
    )
    arguments = host.single(1)
    logits(host, arguments)
    watch.remove()
    outputs = []
    with pruner()(host.model) as handle:
        watch = language_model.register_forward_hook(lambda module, inputs, output: outputs.append(output[0]))
        logits(host, host.single(1))
        watch.remove()
    kept = kept_columns(host, handle, arguments)[0]
    given = {"inputs_embeds": seen["inputs_embeds"][:, kept]}
    given["attention_mask"] = torch.ones(given["inputs_embeds"].shape[:2], dtype=torch.long)
    if seen.get("position_ids") is not None:
        given["position_ids"] = seen["position_ids"][..., kept]
    if seen.get("deepstack_visual_embeds") is not None:
        visual = seen["visual_pos_masks"][0]
        given["visual_pos_masks"] = seen["visual_pos_masks"][:, kept]
        given["deepstack_visual_embeds"] = [layer[kept[visual]] for layer in seen["deepstack_visual_embeds"]]
    with torch.no_grad():
        expected = language_model(**given)[0]
    torch.testing.assert_close(outputs[-1], expected, rtol=1e-4, atol=1e-4)


def test_labels_follow_their_tokens(host):
    arguments = host.batch()
    labels = arguments["input_ids"].masked_fill(arguments["input_ids"] == IMAGE, -100)
    labels = labels.masked_fill(arguments["attention_mask"].cumsum(-1) <= 1, -100)  # nothing foretells the first token
    with torch.no_grad(), pruner()(host.model) as handle:
        output = host.model(**host.batch(), labels=labels)
    columns = kept_columns(host, handle, arguments)
    total, count = 0.0, 0
    for row in range(2):
        kept = labels[row][columns[row]]
        scores = output.logits[row, -len(kept) :]
        target = kept[1:]
        losses = torch.nn.functional.cross_entropy(scores[:-1].float(), target, reduction="none", ignore_index=-100)
        total, count = total + losses.sum(), count + int((target != -100).sum())
    torch.testing.assert_close(output.loss, total / count, rtol=1e-4, atol=1e-4)


def test_text_passes_and_nothing_is_left_on_the_model(host):
    model = host.model
    text = {"input_ids": torch.tensor([[1, 5, 6, 7]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    expected, unpruned = logits(host, text), logits(host, host.batch())
    answer = greedy(host, host.batch())

    def state():
        modules = dict(model.named_modules())
        return {
            name: (set(m.__dict__), len(m._forward_pre_hooks), len(m._forward_hooks)) for name, m in modules.items()
        }

    before = state()
    with pruner()(model):
        assert torch.equal(logits(host, text), expected)
        assert logits(host, host.batch()).shape[1] < unpruned.shape[1]
        greedy(host, host.batch())
        assert torch.equal(greedy(host, text, max_new_tokens=2)[:, :4], text["input_ids"])
    assert state() == before
    assert torch.equal(logits(host, host.batch()), unpruned)
    assert torch.equal(greedy(host, host.batch()), answer)


# --- prompts of other shapes ---------------------------------------------------------------------------------------


def test_a_row_without_picture_beside_one_with(host):
    """The row with the picture answers as it does alone; the text row as without any pruner."""
    if host.name in ("idefics3", "smolvlm"):
        mixed = host.prompts([["image", 5], [6]], [0])
        mixed |= host.pick([0], [1, 0])
    else:
        mixed = host.prompts([["image", 5], [6]], [0])
    alone = host.prompts([["image", 5]], [0])
    own = mixed["attention_mask"][1].bool()
    text = {name: mixed[name][1:, own] for name in ("input_ids", "attention_mask", "token_type_ids") if name in mixed}
    expected_text = greedy(host, text)[:, text["input_ids"].shape[1] :]
    with pruner()(host.model):
        found = answers(host, mixed)
        assert torch.equal(found[:1], answers(host, alone))
    if host.name != "paligemma":  # its text rows see their whole prefix, whose mask is another for text alone
        assert torch.equal(found[1:], expected_text)


def test_right_padding_in_forward_is_left_padding(host):
    if not host.adjacent or host.name == "paligemma":
        rows = [[3, "image", 5], [2, "image", 1, "image", 4]]
    else:
        rows = [[3, "image", 5], [2, "image", "image", 4]]
    last = []
    for side in ("left", "right"):
        arguments = host.prompts(rows, [0, 1, 2], padding=side)
        with pruner()(host.model) as handle:
            found = logits(host, arguments)
        lengths = kept_columns(host, handle, arguments).sum(-1)
        ends = [-1, -1] if side == "left" else [int(length) - 1 for length in lengths]
        last.append(torch.stack([found[row, end] for row, end in enumerate(ends)]))
    torch.testing.assert_close(last[0], last[1], rtol=1e-3, atol=1e-3)


VIDEO_FAMILIES = [
    name
    for name in FAMILIES
    if name in ("llava_next_video", "llava_onevision", "video_llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
]


@pytest.mark.parametrize("name", VIDEO_FAMILIES)
def test_video_and_image_in_one_prompt(name):
    host = family(name)
    frames = 3
    together = host.prompts([[2, "video", 3, "image", 4], [7]], [0], video=True)
    expected = greedy(host, together)
    with pruner(500)(host.model):
        assert torch.equal(greedy(host, together), expected)
    with pruner()(host.model) as handle:
        found = answers(host, together)
        assert torch.equal(answers(host, together, use_cache=False), found)
        of_video, of_image = handle.kept
        assert together["input_ids"][0, of_video.picture.columns[0]] == VIDEO
        assert of_video.per_view == [3] * frames
        assert set(of_image.per_view) == {3}
        alone = host.prompts([[2, "video", 3, "image", 4]], [0], video=True)
        assert torch.equal(answers(host, alone)[0], found[0])
