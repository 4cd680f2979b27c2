"""Checkpoints converted for the Transformers library: same prompts, ids, pixels and logits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from convert_to_transformers import chat_template_of, convert
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from checkpoint_copies import copy_llama_3, copy_mistral, copy_yi, edit
from llava.conversation import conv_templates
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import TOY_FOLDER, find_template, load_pretrained_model
from records import golden_checkpoint

ROOT = Path(__file__).parents[2]
CHECKPOINTS = [
    TOY_FOLDER / "llava-toy-v1.5",
    TOY_FOLDER / "llava-toy-v1.6",
    "llava-v1.5-tiny-sharded",
    "llava-v1.6-vicuna-tiny",
    copy_mistral,
    copy_llama_3,
    copy_yi,
]
PICTURES = sorted((TOY_FOLDER / "data/eval/MME/MME_Benchmark_release_version/count").glob("*.png"))[:4]
SYSTEM = conv_templates["vicuna_v1"].system
PROMPTS = [
    f"{SYSTEM} USER: <image>\nHow many circles?\nAnswer the question using a single word or phrase. ASSISTANT:",
    "USER: <image>\n<image>\nWhich  is  redder? ASSISTANT: The first.</s>USER: Why? ASSISTANT:",
    "Look at <image>\nand tell.",
    "Look at <image> and<image>tell.",
]


@pytest.fixture(scope="module", params=CHECKPOINTS, ids=lambda one: getattr(one, "__name__", None) or Path(one).name)
def both(request, tmp_path_factory):
    """(ours, converted): each a tokenizer or processor with its model."""
    source = request.param
    if not isinstance(source, Path):
        source = golden_checkpoint(source) if isinstance(source, str) else source(tmp_path_factory.mktemp("original"))
    target = tmp_path_factory.mktemp("converted") / source.name
    convert(str(source), target)
    tokenizer, model, image_processor, _ = load_pretrained_model(str(source), device="cpu")
    processor = AutoProcessor.from_pretrained(target)
    converted, report = AutoModelForImageTextToText.from_pretrained(
        target, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    model.template = find_template(str(source))
    model.stored_rows = json.loads((source / "config.json").read_text())["vocab_size"]
    return (tokenizer, model, image_processor), (processor, converted.eval(), target)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_same_token_ids(both, prompt):
    (tokenizer, _, _), (processor, converted, _) = both
    image = converted.config.image_token_index
    ours = [image if token == -200 else token for token in tokenizer_image_token(prompt, tokenizer)]
    assert processor.tokenizer(prompt).input_ids == ours
    assert len(processor.tokenizer) <= converted.get_input_embeddings().weight.shape[0]
    assert converted.get_input_embeddings().weight.shape[0] % 64 == 0


@pytest.mark.parametrize("number", range(2))
def test_unpruned_logits_are_ours(both, number):
    (tokenizer, model, image_processor), (processor, converted, _) = both
    picture = Image.open(PICTURES[number]).convert("RGB")
    prompt = PROMPTS[0]
    ids = tokenizer_image_token(prompt, tokenizer, return_tensors="pt")[None]
    pixels = process_images([picture], image_processor, model.config)
    with torch.inference_mode():
        ours = model(ids, images=pixels, image_sizes=[picture.size]).logits
        inputs = processor(images=picture, text=prompt, return_tensors="pt")
        theirs = converted(**inputs).logits
    assert theirs.shape[1] == ours.shape[1]
    torch.testing.assert_close(inputs["pixel_values"].flatten(), pixels.flatten(), atol=2e-6, rtol=0)
    known = slice(model.stored_rows)  # not those of tokens that the copy's tokenizer got without a row
    torch.testing.assert_close(theirs[..., known], ours[..., known], atol=2e-4, rtol=0)
    assert torch.equal(theirs.argmax(-1), ours.argmax(-1))  # rows that were added never win


def test_chat_template_writes_the_checkpoints_prompt(both):
    (_, model, _), (processor, _, _) = both
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "Where?"},
    ]
    conversation = conv_templates[model.template].copy()
    for role, message in zip(conversation.roles * 2, ["<image>\nWhat is it?", "A cat.", "Where?", None], strict=True):
        conversation.append_message(role, message)
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text == processor.tokenizer.bos_token + conversation.get_prompt()
    messages[0]["content"].reverse()  # as in OpenAI's own examples: text before the picture
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == text


@pytest.mark.parametrize("name", ["llava_v1", "llava_llama_2", "llava_llama_3", "chatml_direct", "mpt"])
def test_chat_templates_of_other_styles(both, name):
    _, (processor, _, _) = both
    conversation = conv_templates[name].copy()
    messages = []
    for i, text in enumerate(["<image>\nWhat is it?", "A cat.", "Where?"]):
        conversation.append_message(conversation.roles[i % 2], text)
        messages.append({"role": ("user", "assistant")[i % 2], "content": text})
    conversation.append_message(conversation.roles[1], None)
    text = processor.apply_chat_template(
        messages, chat_template=chat_template_of(conv_templates[name]), add_generation_prompt=True
    )
    assert text == processor.tokenizer.bos_token + conversation.get_prompt()
    with pytest.raises(ValueError, match="no chat template"):
        chat_template_of(conv_templates["plain"])


def test_what_pruners_need_stays_in_the_configuration(both):
    (_, model, _), (_, _, target) = both
    config = json.loads((target / "config.json").read_text())
    assert (target / config["mm_vision_tower"] / "config.json").is_file()
    assert not Path(config["mm_vision_tower"]).is_absolute()
    assert {file.stat().st_mode & 0o777 for file in target.iterdir()} == {0o644}
    assert config.get("mm_relevance_sign") == getattr(model.config, "mm_relevance_sign", None)
    weights = json.loads((target / "model.safetensors.index.json").read_text())["weight_map"]
    assert "vision_tower.vision_model.embeddings.class_embedding" in weights
    assert "language_model.model.embed_tokens.weight" in weights


def test_an_answer_ends_where_the_template_ends_a_turn(both, tmp_path):
    (tokenizer, model, _), (_, converted, _) = both
    stop = tokenizer.convert_tokens_to_ids(conv_templates[model.template].stop_string)
    ends = converted.generation_config.eos_token_id
    assert stop in (ends if isinstance(ends, list) else [ends])


def test_a_llama_3_whose_tokenizer_calls_another_token_the_end(tmp_path):
    folder = copy_llama_3(tmp_path, "<|end_of_text|>")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 260}))
    convert(str(folder), tmp_path / "out")
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["eos_token_id"] == [260, 259]


def test_mistrals_window_is_the_checkpoints(tmp_path):
    for number, window in enumerate((None, 512)):
        folder = copy_mistral(tmp_path / str(number))
        edit(folder, sliding_window=window)
        convert(str(folder), tmp_path / f"out{number}")
        config = json.loads((tmp_path / f"out{number}/config.json").read_text())["text_config"]
        assert (config["model_type"], config["sliding_window"]) == ("mistral", window)


def test_qwen_is_refused_with_where_to_get_it(tmp_path):
    folder = copy_mistral(tmp_path)
    edit(folder, model_type="llava_qwen", architectures=["LlavaQwenForCausalLM"])
    with pytest.raises(ValueError, match=r"is a llava_qwen: this converts .* are on the hub"):
        convert(str(folder), tmp_path / "out")


def test_refusals(tmp_path):
    with pytest.raises(OSError, match="no checkpoint at"):
        convert(str(tmp_path / "nothing"), tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(ValueError, match="is not empty"):
        convert(str(CHECKPOINTS[0]), tmp_path / "full")
    copy = tmp_path / "linear"
    copy.mkdir()
    for file in CHECKPOINTS[0].iterdir():
        (copy / file.name).symlink_to(file)
    values = json.loads((copy / "config.json").read_text())
    values |= {"mm_projector_type": "linear", "mm_vision_tower": str(CHECKPOINTS[0].parent / "clip-toy-336")}
    (copy / "config.json").unlink()
    (copy / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="mm_projector_type 'linear'"):
        convert(str(copy), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_command(tmp_path):
    def run(source, target):
        command = [sys.executable, "scripts/convert_to_transformers.py", str(source), str(target)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)

    done = run(CHECKPOINTS[0], tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"wrote {tmp_path / 'out'}"
    refused = run("nowhere", tmp_path / "two")
    assert refused.returncode == 1
    assert "error: no checkpoint at" in refused.stderr
