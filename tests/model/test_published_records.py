"""Recorded runs of CDPruner's and Script's published code, from pixels to answers, on the same models."""

import pytest
import torch

from llava.conversation import last_question
from llava.mm_utils import process_images, tokenizer_image_token
from llava.pruning import get_pruner
from llava.pruning.functional import conditional_kernel, cosine_similarity, greedy_map, relevance_scores
from records import FEATURES, LOGITS, PIXELS, Records, load_picture

TOPICS = {
    name: Records(f"records/{name}")
    for name in ("cdpruner/cdpruner_v15", "cdpruner/cdpruner_v16", "script/script_v15", "script/script_v16")
}
CHECKPOINTS = {"v15": "llava-v1.5-tiny-wide", "v16": "llava-v1.6-vicuna-tiny-wide"}
CASES = [(topic, case) for topic, records in TOPICS.items() for case in records.cases()]
CDPRUNER = [(topic, case) for topic, case in CASES if topic.startswith("cdpruner")]
SELECTOR = Records("records/cdpruner/selector_only")
PUBLISHED = {  # the published settings: padding takes part
    "cdpruner": {"name": "cdpruner", "scaling": "picture", "exclude_padding": False},
    "script": {"name": "script_release", "exclude_padding": False},
}


@pytest.fixture(scope="module")
def setting(load):
    """Model, entry, pixels of a case; LLaVA-NeXT in the published setting, every picture as 2 x 2 tiles."""

    def setting(topic, case):
        tokenizer, model, processor, _ = load(CHECKPOINTS[topic[-3:]])
        if topic.endswith("v16"):
            model.config.image_grid_pinpoints = [[672, 672]]
        entry = TOPICS[topic].entries[case]
        pixels = process_images([load_picture(entry["image"])], processor, model.config)
        ids = torch.tensor([tokenizer_image_token(entry["prompt"], tokenizer)])
        return TOPICS[topic], tokenizer, model, entry, pixels, ids

    yield setting
    model = load(CHECKPOINTS["v16"])[1]
    model.config.image_grid_pinpoints = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def joint_relevance(image_embeds, text_embeds, mask=None):
    """CDPruner's scaling: over all views of a picture together, 1e-6 added to the numerator."""
    raw = relevance_scores(image_embeds, text_embeds, mask, sign=-1)
    return (raw - raw.min() + 1e-6) / (raw.max() - raw.min())


@pytest.mark.parametrize("topic, case", CDPRUNER)
def test_embeddings_relevance_and_kernel(setting, topic, case):
    records, _, model, entry, pixels, _ = setting(topic, case)
    records.check(case, "pixels", pixels, PIXELS)
    encoded = model.encode_pictures(pixels, [entry["image_size"]])
    records.check(case, "projected_features", encoded.features, FEATURES)
    tower = model.get_vision_tower()
    records.check(case, "image_embeds_raw", encoded.image_embeds(tower), FEATURES)
    text_embeds, mask = tower.text_embeds([entry["texts"]])
    assert mask.shape[1] == entry["clip_text_segments"]
    if entry["clip_text_segments"] > 1:
        text_embeds, mask = records.parts(case, "text_embeds_raw")["all"][None], None  # the reference lacks end tokens
    records.check(case, "text_embeds_raw", text_embeds[0], FEATURES)
    relevance = joint_relevance(encoded.image_embeds(tower), text_embeds, mask)
    records.check(case, "relevance", relevance, {"default": 1e-4})
    kernel = conditional_kernel(cosine_similarity(encoded.features), relevance)
    records.check(case, "kernel", kernel, {"default": 1e-4, "rowdot": 5e-4})
    order = greedy_map(kernel, entry["keep_per_crop"], epsilon=0.0, stop=1e-10)
    mask = torch.zeros(kernel.shape[:2], dtype=torch.bool).scatter_(1, order, True)
    assert torch.equal(mask, records.parts(case, "mask")["all"].bool())


@pytest.mark.parametrize("topic, case", CASES)
def test_masks_counts_logits_and_answer(setting, topic, case, monkeypatch):
    records, _, model, entry, pixels, ids = setting(topic, case)
    pruner = get_pruner(**PUBLISHED[topic.split("/")[0]], keep_tokens=entry["keep_per_crop"])
    if entry["clip_text_segments"] > 1:  # the reference's segments lack end tokens
        segments = records.parts(case, "text_embeds_raw")["all"][None]
        texts = (segments, torch.ones(segments.shape[:2], dtype=torch.bool))
        monkeypatch.setattr(model.get_vision_tower(), "text_embeds", lambda _: texts)
    with torch.no_grad():
        prompts = model.embed_prompts(ids, images=pixels, image_sizes=[entry["image_size"]], pruner=pruner)
        logits = model(inputs_embeds=prompts.inputs_embeds, attention_mask=prompts.attention_mask.long()).logits
    kept = prompts.kept[0]
    assert kept.selection.indices.tolist() == entry["mask_indices"]
    records.check(case, "relevance", kept.selection.details["relevance"], {"default": 1e-4})
    if graph := records.parts(case, "gsp_scores"):
        assert torch.allclose(kept.selection.details["redundancy"], graph["all"], rtol=1e-4)
        marked = [view.nonzero().flatten().tolist() for view in kept.selection.details["kept_by_gsp"]]
        assert marked == entry["mask_gsp_indices"]
    assert kept.patches == entry["visual_tokens_given_to_llm"]
    assert kept.per_view() == [entry["keep_per_crop"]] * entry["crops"]
    assert prompts.inputs_embeds.shape[1] == entry["merged_length"]
    records.check(case, "inputs_embeds", prompts.inputs_embeds, FEATURES)
    records.check(case, "logits_last", logits[:, -1], LOGITS)
    answer = model.generate(ids, images=pixels, image_sizes=[entry["image_size"]], pruner=pruner, max_new_tokens=16)
    assert answer[0].tolist() == entry["greedy_ids"][0][1:]


@pytest.mark.parametrize("topic, case", CASES)
def test_query_is_read_from_the_prompt(setting, topic, case):
    _, tokenizer, _, entry, _, ids = setting(topic, case)
    assert last_question(tokenizer.decode(ids[0][ids[0] >= 0])) == entry["texts"]


@pytest.mark.parametrize("case", SELECTOR.cases())
def test_selector_alone(case):
    inputs = {
        name: SELECTOR.tensors[f"{case}.in.{name}"] for name in ("projected_features", "image_embeds", "text_embeds")
    }
    relevance = joint_relevance(inputs["image_embeds"], inputs["text_embeds"][None])
    kernel = conditional_kernel(cosine_similarity(inputs["projected_features"]), relevance)
    order = greedy_map(kernel, SELECTOR.entries[case]["keep"], epsilon=0.0, stop=1e-10)
    assert order.sort().values.tolist() == SELECTOR.entries[case]["mask_indices"]
