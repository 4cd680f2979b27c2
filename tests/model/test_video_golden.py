"""Unpruned, the model is official LLaVA-Video and LLaVA-OneVision to the logits: every recorded case."""

import json

import pytest
import torch
from PIL import Image

from llava.conversation import conv_templates
from llava.layout.pooling import pool_patches
from llava.layout.views import NEWLINE
from llava.layout.visuals import picture_layouts
from llava.mm_utils import anyres_grid, parse_pinpoints, process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from records import FEATURES, GOLDEN, LOGITS, PIXELS, Records, golden_bytes

TOPICS = {name: Records(f"video/records/{name}") for name in ("llava_video", "llava_onevision")}
CHECKPOINTS = {"llava_video": "llava-video-tiny-qwen2", "llava_onevision": "llava-onevision-tiny-qwen2-ov"}
CASES = [(topic, name) for topic, records in TOPICS.items() for name in records.cases() if "_features" not in name]
CLIPS = [(topic, name) for topic, records in TOPICS.items() for name in records.cases() if "_features" in name]


def recorded(name):
    return json.loads(golden_bytes(GOLDEN / "video/records" / f"{name}.json"))


@pytest.fixture(scope="module")
def loaded(video):
    """Tokenizer, model and image processor of both checkpoints, by topic."""
    return {
        topic: load_pretrained_model(str(video / "checkpoints" / name), device="cpu")[:3]
        for topic, name in CHECKPOINTS.items()
    }


@pytest.fixture
def configured(loaded, monkeypatch):
    """The model of a topic under the configuration of a case."""

    def configured(topic, values):
        tokenizer, model, processor = loaded[topic]
        for name, value in values.items():
            monkeypatch.setattr(model.config, name, value, raising=False)
        return tokenizer, model, processor

    return configured


SPECIAL_SOURCES = {
    "one_frame_grid_average": ["clipA/0"],
    "two_videos_one_row": ["clipA", "clipB"],
    "separate_frames_one_token_bilinear": ["clipA/0", "clipA/1", "clipA/2"],
    "image_then_video": ["small320x240.png", "clipA"],
    "batch2_right": ["clipA", "clipB"],
    "batch2_left": ["clipA", "clipB"],
}


def sources_of(case, entry):
    """What a case looks at: pictures, clips, or single frames of clips."""
    if "images" in entry:
        return entry["images"]
    return SPECIAL_SOURCES.get(case, ["clipB" if "B" in case.split("_") else "clipA"])


def frames_of(video, clip):
    return [Image.open(path).convert("RGB") for path in sorted((video / "frames" / clip).glob("*.png"))]


def visuals_of(video, sources, processor, config):
    """Pixels of pictures and clips, in the order of their placeholders."""
    visuals = []
    for source in sources:
        if source.endswith(".png"):
            visuals.append(process_images([Image.open(video / "images" / source)], processor, config)[0])
            continue
        clip, _, frame = source.partition("/")
        frames = frames_of(video, clip)
        frames = [frames[int(frame)]] if frame else frames
        visuals.append(processor(images=frames, return_tensors="pt")["pixel_values"])
    return visuals


def prepare(video, configured, monkeypatch, topic, case):
    """Tokenizer, model, entry, and the arguments of `embed_prompts` for a recorded case."""
    entry = TOPICS[topic].entries[case]
    tokenizer, model, processor = configured(topic, entry["config"])
    if f"{case}.faster_token" in TOPICS[topic].tensors:
        token = torch.nn.Parameter(TOPICS[topic].tensors[f"{case}.faster_token"])
        monkeypatch.setattr(model.get_model(), "faster_token", token, raising=False)
    rows = [tokenizer_image_token(prompt, tokenizer) for prompt in entry["prompts"]]
    ids = torch.tensor(entry.get("batch_input_ids", rows))
    arguments = {
        "input_ids": ids,
        "attention_mask": torch.tensor(entry.get("batch_attention_mask", [[1] * ids.shape[1]])),
        "images": visuals_of(video, sources_of(case, entry), processor, model.config),
        "image_sizes": entry.get("image_sizes"),
        "modalities": entry["modalities"],
    }
    return tokenizer, model, entry, arguments, rows


@pytest.mark.parametrize("topic, case", CASES)
def test_recorded_case(video, configured, monkeypatch, topic, case):
    records = TOPICS[topic]
    _, model, entry, arguments, rows = prepare(video, configured, monkeypatch, topic, case)
    assert rows == entry["input_ids"]
    visuals = arguments["images"]
    for i, pixels in enumerate(visuals):
        suffix = "" if len(visuals) == 1 else str(i)
        views = pixels if pixels.ndim == 4 else pixels[None]
        if f"pixels{suffix}" in entry:
            records.check(case, f"pixels{suffix}", views, PIXELS)
        if f"vision_features{suffix}" in entry:
            records.check(case, f"vision_features{suffix}", model.get_vision_tower()(views), FEATURES)
            records.check(case, f"encode_images{suffix}", model.encode_images(views), FEATURES)

    side = entry["config"]["tokenizer_padding_side"]
    with torch.no_grad():
        prompts = model.embed_prompts(**arguments, padding_side=side)
    count = entry["rows_returned"]  # the reference loses rows that have no modality of their own
    length = entry["merged_padded_length"]
    assert len(prompts.inputs_embeds) == len(rows)
    records.check(case, "inputs_embeds", prompts.inputs_embeds[:count, :length], FEATURES)
    assert prompts.attention_mask.sum(-1).tolist()[:count] == entry["merged_lengths"]
    newline = model.get_model().image_newline
    found = [(row == newline).all(-1).nonzero().flatten().tolist() for row in prompts.inputs_embeds[:count]]
    assert found == entry["image_newline_rows"]
    if "faster_token_rows" in entry:
        end = (prompts.inputs_embeds[0] == model.get_model().faster_token).all(-1)
        assert end.nonzero().flatten().tolist() == entry["faster_token_rows"][0]

    with torch.no_grad():
        logits = model(
            inputs_embeds=prompts.inputs_embeds,
            attention_mask=prompts.attention_mask.long(),
            position_ids=prompts.position_ids,
        ).logits[:count, :length]
    records.check(case, "logits_last", logits[torch.arange(count), torch.tensor(entry["last_real_position"])], LOGITS)
    parts = records.parts(case, "logsumexp_all")
    real = prompts.attention_mask[:count, :length]
    assert (logits.logsumexp(-1)[real] - parts["all"][real]).abs().max() <= LOGITS["default"]


@pytest.mark.parametrize("topic, case", CASES)
def test_recorded_answer(video, configured, monkeypatch, topic, case):
    _, model, entry, arguments, _ = prepare(video, configured, monkeypatch, topic, case)
    assert model.generation_config.repetition_penalty == 1.05
    for name, options in (("greedy_ids", {}), ("greedy_no_penalty_ids", {"repetition_penalty": 1.0})):
        answers = model.generate(**arguments, max_new_tokens=12, **options)
        for row, want in enumerate(entry.get(name, [])):
            if entry["merged_lengths"][row] < entry["merged_padded_length"] and case != "batch2_left":
                continue  # the reference reads the padded end of the shorter row
            assert answers[row].tolist() == want


@pytest.mark.parametrize("topic, case", CLIPS)
def test_recorded_clip(video, loaded, topic, case):
    records, (_, model, processor) = TOPICS[topic], loaded[topic]
    frames = frames_of(video, records.entries[case]["frames"])
    pixels = processor(images=frames, return_tensors="pt")["pixel_values"]
    records.check(case, "pixels", pixels, PIXELS)
    records.check(case, "vision_features", model.get_vision_tower()(pixels), FEATURES)
    with torch.no_grad():
        patches = model.encode_images(pixels)
    records.check(case, "encode_images", patches, FEATURES)
    for mode in ("average", "max", "bilinear"):
        records.check(case, f"pooled_{mode}", pool_patches(patches, mode), FEATURES)


GEOMETRY = recorded("anyres_geometry")


@pytest.mark.parametrize("key", GEOMETRY)
def test_recorded_geometry_of_pictures(loaded, key):
    aspect = "_".join(key.split("_")[:3])
    for entry in GEOMETRY[key]:
        _, model, _ = loaded["llava_video"]
        pinpoints = {"anyres_max_9_range_string_2x2_to_3x3": "(2x2),...,(3x3)"}.get(key, "(1x1),...,(6x6)")
        size = tuple(entry["size"])
        grid = anyres_grid(size, parse_pinpoints(pinpoints, 384), 384)
        assert grid == (entry["grid_w"], entry["grid_h"])
        config = type(
            "Config", (), dict(vars(model.config), image_aspect_ratio=aspect, image_grid_pinpoints=pinpoints)
        )
        layout, _ = picture_layouts(config, 1 + grid[0] * grid[1], 27, 729, 384, size, True)
        assert len(layout.sequence) == entry["visual_tokens"]
        rows = int((layout.sequence == NEWLINE).sum())
        assert [rows, (len(layout.sequence) - 729) // rows - 1] == entry["final_hw"]
        assert (layout.derived is not None) is entry["shrunk"]
        whole = layout.of_patches or layout
        assert int((whole.sequence == NEWLINE).sum()) == entry["unpadded_hw"][0]


def test_recorded_templates(loaded):
    tokenizer = loaded["llava_video"][0]
    for entry in recorded("prompts_tokens")["conversations"]:
        conversation = conv_templates[entry["template"]].copy()
        for i, turn in enumerate(entry["turns"]):
            conversation.append_message(conversation.roles[i % 2], turn)
        assert conversation.get_prompt() == entry["prompt"]
        assert tokenizer_image_token(entry["prompt"], tokenizer) == entry["input_ids"]


def test_recorded_token_ids(loaded):
    for tokenizer in (loaded["llava_video"][0], loaded["llava_onevision"][0]):  # without and with tokenizer.json
        for entry in recorded("prompts_tokens")["strings"]:
            assert tokenizer_image_token(entry["text"], tokenizer) == entry["input_ids"], entry["text"]
