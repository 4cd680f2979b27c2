"""Mistral, Llama 3 and Yi behind LLaVA-NeXT: they load, and are asked as they were trained."""

import shutil

import pytest
import torch

from checkpoint_copies import (
    LLAMA_3_MARKS,
    NEXT,
    copy_checkpoint,
    copy_llama_3,
    copy_mistral,
    copy_yi,
    edit,
    load_cpu,
)
from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates, template_for
from llava.mm_utils import get_model_name_from_path, tokenizer_image_token
from llava.model.builder import find_template
from llava.model.language_model.llava_mistral import LlavaMistralForCausalLM
from llava.pruning import get_pruner
from llava.serve import cli
from records import GOLDEN

PICTURE = str(GOLDEN / "images/land640x480.png")


@pytest.fixture
def mistral(tmp_path):
    return copy_mistral(tmp_path)


@pytest.fixture
def llama_3(tmp_path):
    return copy_llama_3(tmp_path)


@pytest.fixture
def yi(tmp_path):
    return copy_yi(tmp_path)


@pytest.mark.parametrize("method", [None, "script", "fastv"])
def test_mistral_computes_what_llama_does_with_the_same_weights(mistral, load, pixels_of, method):
    """Without its sliding window, the two are one architecture."""
    model = load_cpu(mistral)[1]
    assert isinstance(model, LlavaMistralForCausalLM)
    pixels, sizes = pixels_of(NEXT, "land640x480")
    pruner = None if method is None else get_pruner(method, keep_tokens=64)
    options = {"images": pixels, "image_sizes": sizes, "pruner": pruner, "query": "a", "max_new_tokens": 5}
    ids = torch.tensor([[1, -200, 300, 301]])
    assert torch.equal(model.generate(ids, **options), load(NEXT)[1].generate(ids, **options))


def test_a_saved_mistral_is_loaded_again(mistral, tmp_path):
    model = load_cpu(mistral)[1]
    saved = tmp_path / "saved"
    model.save_pretrained(saved)
    for file in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(mistral / file, saved)
    assert isinstance(load_cpu(saved)[1], LlavaMistralForCausalLM)


def test_mistral_is_asked_in_brackets(mistral, capsys):
    assert find_template(str(mistral)) == "mistral_instruct"
    conversation = conv_templates["mistral_instruct"].copy()
    conversation.append_message("USER", "<image>\nWhat?")
    conversation.append_message("ASSISTANT", None)
    assert conversation.get_prompt() == "[INST] <image>\nWhat? [/INST]"
    arguments = ["--model-path", str(mistral), "--image-file", PICTURE, "--query", "What?", "--keep-tokens", "32"]
    assert cli.main([*arguments, "--device", "cpu", "--max-new-tokens", "3"]) == 0
    assert "160 of 2880 visual tokens" in capsys.readouterr().out


def test_llama_3_is_asked_with_its_headers_and_one_start_token(llama_3, capsys):
    assert find_template(str(llama_3)) == "llava_llama_3"
    tokenizer = load_cpu(llama_3)[0]
    conversation = conv_templates["llava_llama_3"].copy()
    conversation.append_message("user", "<image>\nWhat? ")
    conversation.append_message("assistant", "A cup.")
    conversation.append_message("user", "And now?")
    conversation.append_message("assistant", None)
    system = (
        "You are a helpful language and vision assistant. You are able to understand the visual content that the "
        "user provides, and assist the user with a variety of tasks using natural language."
    )
    prompt = (
        f"<|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA cup.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nAnd now?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert conversation.get_prompt() == prompt
    assert conversation.stop_string == "<|eot_id|>"
    ids = tokenizer_image_token(prompt, tokenizer)
    before, after = prompt.split("<image>")
    assert ids == [*tokenizer(before).input_ids, -200, *tokenizer(after).input_ids[1:]]
    assert ids.count(tokenizer.bos_token_id) == 1
    arguments = ["--model-path", str(llama_3), "--image-file", PICTURE, "--query", "What?", "--keep-tokens", "32"]
    assert cli.main([*arguments, "--device", "cpu", "--max-new-tokens", "3"]) == 0
    assert "160 of 2880 visual tokens" in capsys.readouterr().out


@pytest.mark.parametrize("copy", [copy_mistral, copy_llama_3])
@pytest.mark.parametrize(
    "picture, tokens",  # overview and grid without its padding, a newline after each of its rows
    [("land640x480", 576 + 36 * 49), ("tall300x900", 576 + 72 * 25), ("wide1000x400", 576 + 24 * 61)],
)
def test_keeping_all_of_an_unpadded_grid_is_the_unpruned_model(copy, picture, tokens, tmp_path, pixels_of):
    tokenizer, model, _, _ = load_cpu(copy(tmp_path))
    pixels, sizes = pixels_of(NEXT, picture)
    ids = tokenizer_image_token("a <image>\nb", tokenizer, return_tensors="pt")[None]
    assert ids[0].tolist().count(tokenizer.bos_token_id) == 1
    assert ids[0].tolist().count(IMAGE_TOKEN_INDEX) == 1
    shown = {"images": pixels, "image_sizes": sizes}
    with torch.no_grad():
        expected = model(ids, **shown).logits
        assert expected.shape[1] == tokens + ids.shape[1] - 1
        for newlines in ("drop", "keep"):
            everything = get_pruner("divprune", keep_tokens=576, newlines=newlines)
            assert torch.equal(model(ids, **shown, pruner=everything).logits, expected)
        few = get_pruner("divprune", keep_tokens=4)
        assert model.embed_prompts(ids, **shown, pruner=few).kept[0].per_view() == [4] * pixels.shape[1]


@pytest.mark.parametrize("end", ["<|eot_id|>", "<|end_of_text|>"])
def test_an_answer_of_llama_3_ends_with_its_turn(end, tmp_path, pixels_of):
    """Meta's first files say <|end_of_text|>; a turn ends with <|eot_id|>. The configuration names neither here."""
    tokenizer, model, _, _ = load_cpu(copy_llama_3(tmp_path, end))
    stop = conv_templates["llava_llama_3"].stop_string
    assert model.config.eos_token_id not in tokenizer.convert_tokens_to_ids([stop, end])
    ids = tokenizer_image_token("a <image>\nb", tokenizer, return_tensors="pt")[None]
    pixels, sizes = pixels_of(NEXT, "square336")
    states = []
    model.lm_head.register_forward_pre_hook(lambda _, positional: states.append(positional[0]))
    with torch.no_grad():
        model(ids, images=pixels, image_sizes=sizes)
        model.lm_head.weight.zero_()[tokenizer.convert_tokens_to_ids(stop)] = states[0][0, -1]
    options = {"images": pixels, "image_sizes": sizes, "max_new_tokens": 4}
    text = {} if stop == tokenizer.eos_token else {"stop_strings": [stop], "tokenizer": tokenizer}
    assert model.generate(ids, **options, **text).shape == (1, 1)


def test_yi_is_asked_in_chatml_without_a_start_token(yi):
    assert find_template(str(yi)) == "chatml_direct"
    tokenizer = load_cpu(yi)[0]
    assert tokenizer("What?").input_ids[0] != tokenizer.bos_token_id
    assert tokenizer.bos_token_id not in tokenizer_image_token("<|im_start|>user\n<image>\nWhat?", tokenizer)


@pytest.mark.parametrize(
    "name, family, tokens, chat, template",
    [
        ("0123abc", "llava_qwen", {"<|im_end|>"}, "", "qwen_1_5"),
        ("llava-next-72b", "llava_qwen", {"<|im_end|>"}, "", "qwen_1_5"),
        ("llava-v1.6-mistral-7b", "llava_mistral", set(), "", "mistral_instruct"),
        ("my-own", "llava_mistral", set(), "", "mistral_instruct"),
        ("llama3-llava-next-8b", "llava_llama", set(LLAMA_3_MARKS), "", "llava_llama_3"),
        ("llava-v1.6-34b", "llava_llama", {"<|im_start|>", "<|im_end|>"}, "", "chatml_direct"),
        ("0123abc", "llava_llama", {"<|im_start|>", "<|im_end|>"}, "", "chatml_direct"),
        ("llava-v1.5-7b", "llava_llama", set(), "", "vicuna_v1"),
        ("0123abc", "llava_llama", set(), "", "vicuna_v1"),
        ("0123abc", "llava_llama", set(), "{{ '[INST] ' + message['content'] }}", "llava_llama_2"),
        ("llava-llama-2-13b-chat", "llava_llama", set(), "", "llava_llama_2"),
        ("LLaVA-7B-v0", "llava_llama", set(), "", "llava_v0"),
        ("llama3-llava-next-8b", None, None, "", "llava_llama_3"),
    ],
)
def test_the_template_follows_the_files_before_the_name(name, family, tokens, chat, template):
    assert template_for(name, family, tokens, chat) == template


@pytest.mark.parametrize("name", ["llama3-llava-next-8b", "llava-v1.6-34b", "llava-onevision-copy"])
def test_a_name_that_the_tokenizer_contradicts_is_asked_about(name):
    with pytest.raises(ValueError, match=rf"{name} stands for .* does not know its .*--conv-mode"):
        template_for(name, "llava_llama", set())


@pytest.mark.parametrize(
    "path, name",
    [
        ("/hub/models--liuhaotian--llava-v1.6-34b/snapshots/0123abcd", "llava-v1.6-34b"),
        ("/hub/models--llava-tiny/snapshots/0123abcd/", "llava-tiny"),
        ("snapshots/0123abcd", "0123abcd"),
    ],
)
def test_a_snapshot_of_the_hub_has_its_models_name(path, name):
    assert get_model_name_from_path(path) == name


@pytest.mark.parametrize("flag", [True, False])
def test_the_start_token_is_the_tokenizers_own_choice(tmp_path, flag):
    folder = copy_checkpoint("llava-v1.5-tiny", tmp_path)
    edit(folder, "tokenizer_config.json", add_bos_token=flag)
    tokenizer = load_cpu(folder)[0]
    ids = tokenizer_image_token("USER<image>a", tokenizer)
    assert (ids[0] == tokenizer.bos_token_id) is flag
    assert ids.count(tokenizer.bos_token_id) == int(flag)
    assert tokenizer_image_token("<image>", tokenizer) == [tokenizer.bos_token_id] * flag + [-200]


def test_marks_stand_around_every_picture_once(tmp_path):
    folder = copy_checkpoint("llava-v1.5-tiny", tmp_path)
    edit(folder, mm_use_im_start_end=True, vocab_size=386)
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = torch.cat([state[name], state[name][:2]])
    torch.save(state, folder / "pytorch_model.bin")
    tokenizer = load_cpu(folder)[0]
    start, end = tokenizer.convert_tokens_to_ids(["<im_start>", "<im_end>"])
    assert (start, end) == (384, 385)
    plain = tokenizer_image_token("a <image>\n<image>\nWhat?", tokenizer)
    written = tokenizer_image_token("a <im_start><image><im_end>\n<im_start><image><im_end>\nWhat?", tokenizer)
    for ids in (plain, written):
        at = [i for i, token in enumerate(ids) if token == -200]
        assert [ids[i - 1 : i + 2] for i in at] == [[start, -200, end]] * 2
        assert (ids.count(start), ids.count(end)) == (2, 2)
