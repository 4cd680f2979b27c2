"""Templates and token ids, to the character, and reading the question back out of a prompt."""

import json

import pytest

from llava.conversation import clean_question, conv_templates, last_question, template_for
from llava.mm_utils import get_model_name_from_path, tokenizer_image_token
from records import GOLDEN, golden_bytes

RECORDS = json.loads(golden_bytes(GOLDEN / "records/llava/prompts_tokens.json"))
FIRST, SECOND, OPEN = RECORDS["turns"]
TURNS = {
    "one_full_turn": FIRST,
    "two_full_turns": FIRST + SECOND,
    "two_turns_and_open_question": FIRST + SECOND + OPEN,
    "first_message_is_image_tuple": [(FIRST[0], None, "Default"), FIRST[1], *SECOND, *OPEN],
    "one_open_question": [FIRST[0], None],
}
CASES = [(name, kind) for name, kinds in RECORDS["prompts"].items() for kind in kinds if kind in TURNS]


def build(name, turns):
    conversation = conv_templates[name].copy()
    for i, message in enumerate(turns):
        conversation.append_message(conversation.roles[i % 2], message)
    return conversation


@pytest.mark.parametrize("name, kind", CASES)
def test_recorded_prompt(load, name, kind):
    recorded = RECORDS["prompts"][name][kind]
    prompt = build(name, TURNS[kind]).get_prompt()
    if recorded["prompt"] is None:  # the reference raises TypeError for a second turn without roles
        assert prompt.startswith(FIRST[0])
        return
    assert prompt == recorded["prompt"]
    assert tokenizer_image_token(prompt, load("llava-v1.5-tiny")[0]) == recorded["input_ids"]


@pytest.mark.parametrize("name, kind", CASES)
def test_last_question_is_found_in_every_template(name, kind):
    if "plain" in name and kind != "one_open_question":
        pytest.skip("without roles the whole text is the question")
    asked = [turn for turn in TURNS[kind][::2] if turn]
    last = asked[-1][0] if isinstance(asked[-1], tuple) else asked[-1]
    assert last_question(build(name, TURNS[kind]).get_prompt()) == last.replace("<image>\n", "")


@pytest.mark.parametrize("name", conv_templates)
def test_a_copy_is_independent(name):
    before = conv_templates[name].get_prompt()
    build(name, TURNS["one_full_turn"])
    assert conv_templates[name].get_prompt() == before
    assert list(conv_templates)[: len(RECORDS["prompts"])] == list(RECORDS["prompts"])  # Qwen's stand behind


@pytest.mark.parametrize("entry", RECORDS["tokenize"], ids=lambda entry: repr(entry["text"]))
def test_recorded_token_ids(load, entry):
    for checkpoint in ("llava-v1.5-tiny", "llava-v1.5-tiny-sharded"):  # the latter calls its model_type "llava"
        assert tokenizer_image_token(entry["text"], load(checkpoint)[0]) == entry["input_ids"]


def test_token_ids_as_tensor(load):
    tokenizer = load("llava-v1.5-tiny")[0]
    ids = tokenizer_image_token("<image>\nhello", tokenizer, return_tensors="pt")
    assert ids.tolist() == tokenizer_image_token("<image>\nhello", tokenizer)
    with pytest.raises(ValueError, match="'pt' or None"):
        tokenizer_image_token("hello", tokenizer, return_tensors="np")


@pytest.mark.parametrize(
    "question, cleaned",
    [
        ("<image>\nWhat?\nAnswer the question using a single word or phrase.", "What?"),
        ("What?\nA. x\nB. y\nAnswer with the option's letter from the given choices directly.", "What?\nA. x\nB. y"),
        ("这是什么？\nA. x\n请直接回答选项字母。", "这是什么？\nA. x"),
        ("<image>", ""),
    ],
)
def test_answer_instructions_are_no_part_of_the_query(question, cleaned):
    assert clean_question(question) == cleaned


@pytest.mark.parametrize(
    "path, template",
    [
        ("liuhaotian/llava-v1.5-7b", "vicuna_v1"),
        ("/ckpt/llava-v1.6-vicuna-13b/", "vicuna_v1"),
        ("llava-v1.6-mistral-7b", "mistral_instruct"),
        ("llava-v1.6-34b", "chatml_direct"),
        ("llava-llama-2-13b-chat", "llava_llama_2"),
        ("runs/llava-v1.5-7b/checkpoint-500", "vicuna_v1"),
    ],
)
def test_template_by_name(path, template):
    assert template_for(get_model_name_from_path(path)) == template
