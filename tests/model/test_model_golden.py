"""Unpruned, the model is official LLaVA to the logits: every recorded case of records/llava."""

import pytest
import torch

from llava.mm_utils import tokenizer_image_token
from records import FEATURES, LOGITS, PIXELS, Records, load_picture

TOPICS = {name: Records(f"records/llava/{name}") for name in ("llava_v15", "llava_v16", "llava_sharded")}
CASES = [(topic, case) for topic, records in TOPICS.items() for case in records.cases()]
CHECKPOINTS = {"llava_v15": "llava-v1.5-tiny", "llava_v16": "llava-v1.6-vicuna-tiny"}


def prepare(load, pixels_of, topic, case):
    """Model, entry, pixels, sizes and padded ids of a recorded case."""
    records = TOPICS[topic]
    checkpoint = CHECKPOINTS.get(topic) or case.rsplit(".", 1)[0]
    tokenizer, model, processor, _ = load(checkpoint)
    entry = records.entries[case]
    pixels, sizes = None, None
    if entry["images_kind"] == "list_of_single_crops":
        pictures = [load_picture(name) for name in entry["images"]]
        pixels = [processor(images=picture, return_tensors="pt")["pixel_values"][0] for picture in pictures]
        sizes = [picture.size for picture in pictures]
    elif entry["images"]:
        pixels, sizes = pixels_of(checkpoint, *entry["images"])
    rows = [tokenizer_image_token(prompt, tokenizer) for prompt in entry["prompts"]]
    length = max(map(len, rows))
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(length - len(row), length) if entry.get("padding_side") == "left" else slice(0, len(row))
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    return records, model, entry, pixels, sizes, ids, mask, rows


@pytest.mark.parametrize("topic, case", CASES)
def test_recorded_case(load, pixels_of, topic, case):
    records, model, entry, pixels, sizes, ids, mask, rows = prepare(load, pixels_of, topic, case)
    assert rows == entry["input_ids"]

    if "pixels" in entry:
        records.check(case, "pixels", pixels, PIXELS)
    for i in range(len(entry["images"])):
        if f"pixels{i}" in entry:
            records.check(case, f"pixels{i}", pixels[i], PIXELS)
    if "vision_features" in entry:
        views = torch.cat([p if p.ndim == 4 else p[None] for p in pixels])
        records.check(case, "vision_features", model.get_vision_tower()(views), FEATURES)
        records.check(case, "encode_images", model.encode_images(views), FEATURES)

    side = entry.get("padding_side")
    with torch.no_grad():
        prompts = model.embed_prompts(ids, mask, ids, pixels, sizes, padding_side=side)
    records.check(case, "inputs_embeds", prompts.inputs_embeds, FEATURES)
    assert prompts.attention_mask.sum(-1).tolist() == entry.get("merged_lengths", [len(rows[0])])
    for name, ours in (
        ("attention_mask", prompts.attention_mask),
        ("position_ids_when_passed_in", prompts.position_ids),
        ("labels_when_labels_are_input_ids", prompts.labels),
    ):
        if recorded := records.parts(case, name):
            assert torch.equal(ours.long(), recorded["all"].long()), name

    with torch.no_grad():
        logits = model(
            inputs_embeds=prompts.inputs_embeds,
            attention_mask=prompts.attention_mask.long(),
            position_ids=prompts.position_ids,
        ).logits
    last = prompts.attention_mask.long().cumsum(-1).argmax(-1)
    records.check(case, "logits_last", logits[torch.arange(len(rows)), last], LOGITS)
    logsumexp, recorded = logits.logsumexp(-1), records.parts(case, "logsumexp_all")["all"]
    real = prompts.attention_mask
    assert (logsumexp[real] - recorded[real]).abs().max() <= LOGITS["default"]


@pytest.mark.parametrize("topic, case", CASES)
def test_recorded_answer(load, pixels_of, topic, case):
    _, model, entry, pixels, sizes, ids, mask, _ = prepare(load, pixels_of, topic, case)
    answer = model.generate(ids, images=pixels, image_sizes=sizes, attention_mask=mask, max_new_tokens=16)
    for row, (ours, recorded) in enumerate(zip(answer.tolist(), entry["greedy_ids"], strict=True)):
        if entry.get("padding_side") == "right" and entry["merged_lengths"][row] < entry["merged_padded_length"]:
            continue  # the reference reads the last padded position there: see the next test
        assert ours == recorded[1:]


@pytest.mark.parametrize("topic", CHECKPOINTS)
def test_right_padded_rows_answer_as_if_alone(load, pixels_of, topic):
    """Where the reference answers from a padded position, ours gives each row the answer it gets on its own."""
    _, model, _, pixels, sizes, ids, mask, rows = prepare(load, pixels_of, topic, "batch2_right")
    together = model.generate(ids, images=pixels, image_sizes=sizes, attention_mask=mask, max_new_tokens=8)
    for i, row in enumerate(rows):
        alone = model.generate(
            torch.tensor([row]),
            images=[pixels[i]] if isinstance(pixels, list) else pixels[i : i + 1],
            image_sizes=sizes[i : i + 1],
            max_new_tokens=8,
        )
        assert alone[0].tolist() == together[i].tolist()


@pytest.mark.parametrize("case", TOPICS["llava_v16"].cases())
def test_newline_rows_stand_where_recorded(load, pixels_of, case):
    _, model, entry, pixels, sizes, ids, mask, _ = prepare(load, pixels_of, "llava_v16", case)
    if "image_newline_rows" not in entry or "padding_side" in entry:
        pytest.skip("not recorded for this case")
    with torch.no_grad():
        embeds = model.embed_prompts(ids, mask, images=pixels, image_sizes=sizes).inputs_embeds[0]
    newline = model.get_model().image_newline
    assert (embeds == newline).all(-1).nonzero().flatten().tolist() == entry["image_newline_rows"][0]


def test_context_length_is_llavas(load):
    assert load("llava-v1.5-tiny")[3] == TOPICS["llava_v15"].entries["_model"]["context_len"]
