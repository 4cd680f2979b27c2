"""The question read back from prompts as the chat templates of many families render them."""

import pytest

from llava.conversation import conv_templates
from llava.relevance.question import (
    FAMILIES,
    PLAIN,
    check_asked,
    find_family,
    find_questions,
    given_questions,
    last_question,
    question_text,
)

FIRST, SECOND = "What colour is the car?", "And the sky?"
SHORT = "\nAnswer the question using a single word or phrase."
VICUNA_SYSTEM = conv_templates["vicuna_v1"].system

# family, mark of a picture, prompt with two turns of the user: {image} and FIRST, then SECOND
TWO_TURNS = [
    ("vicuna", "<image>", f"{VICUNA_SYSTEM} USER: <image>\n{FIRST} ASSISTANT: Red.</s>USER: {SECOND} ASSISTANT:"),
    ("vicuna", "<image>", f"USER: <image>\n{FIRST}{SHORT} ASSISTANT: Red.USER: {SECOND} ASSISTANT:"),
    ("llava_v0", "<image>", f"A chat.###Human: <image>\n{FIRST}###Assistant: Red.###Human: {SECOND}###Assistant:"),
    (
        "chatml",
        "<|image_pad|>",
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|><|image_pad|>"
        f"<|vision_end|>{FIRST}<|im_end|>\n<|im_start|>assistant\nRed.<|im_end|>\n<|im_start|>user\n{SECOND}"
        "<|im_end|>\n<|im_start|>assistant\n",
    ),
    (
        "chatml",
        "<image>",
        f"<|im_start|>user <image>\n{FIRST}<|im_end|><|im_start|>assistant \nRed.<|im_end|><|im_start|>user \n{SECOND}"
        "<|im_end|><|im_start|>assistant\n",
    ),
    (
        "chatml",
        "<IMG_CONTEXT>",
        f"<|im_start|>user\n<img><IMG_CONTEXT><IMG_CONTEXT></img>\n{FIRST}<|im_end|>\n<|im_start|>assistant\nRed."
        f"<|im_end|>\n<|im_start|>user\n{SECOND}<|im_end|>\n<|im_start|>assistant\n",
    ),
    (
        "idefics",
        "<image>",
        "<|im_start|>User:<fake_token_around_image><global-img><image><image><fake_token_around_image>"
        f"{FIRST}<end_of_utterance>\nAssistant: Red.<end_of_utterance>\nUser:{SECOND}<end_of_utterance>\nAssistant:",
    ),
    (
        "llama_3",
        "<image>",
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user"
        f"<|end_header_id|>\n\n<image>\n{FIRST}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nRed.<|eot_id|>"
        f"<|start_header_id|>user<|end_header_id|>\n\n{SECOND}<|eot_id|><|start_header_id|>assistant<|end_header_id|>",
    ),
    (
        "gemma",
        "<start_of_image>",
        f"<bos><start_of_turn>user\n<start_of_image>{FIRST}<end_of_turn>\n<start_of_turn>model\nRed.<end_of_turn>\n"
        f"<start_of_turn>user\n{SECOND}<end_of_turn>\n<start_of_turn>model\n",
    ),
    (
        "cohere",
        "<|IMG_PATCH|>",
        "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|USER_TOKEN|><|START_OF_IMG|>TILE_GLOBAL<|IMG_PATCH|><|IMG_PATCH|>"
        f"<|END_OF_IMG|>{FIRST}<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>Red.<|END_OF_TURN_TOKEN|>"
        f"<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{SECOND}<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
    ),
    (
        "phi_3",
        "<|image_1|>",
        f"<|user|>\n<|image_1|>\n{FIRST}<|end|>\n<|assistant|>\nRed.<|end|>\n<|user|>\n{SECOND}<|end|>\n<|assistant|>\n",
    ),
    (
        "instruct",
        "<image>",
        f"<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n<image>\n{FIRST} [/INST] Red. </s><s>[INST] {SECOND} [/INST]",
    ),
    (
        "instruct",
        "[IMG]",
        f"<s>[INST][IMG][IMG][IMG_BREAK][IMG][IMG][IMG_END]{FIRST}[/INST] Red.</s>[INST]{SECOND}[/INST]",
    ),
]


@pytest.mark.parametrize("family, mark, prompt", TWO_TURNS)
def test_both_scopes_in_every_family(family, mark, prompt):
    place = prompt.index(mark)
    own = find_questions(prompt, [place], "image_turn")
    latest = find_questions(prompt, [place], "latest_turn")
    assert [(q.text, q.family) for q in own + latest] == [(FIRST, family), (SECOND, family)]
    assert find_questions(prompt)[0].text == SECOND


def test_every_family_is_tested():
    assert {case[0] for case in TWO_TURNS} == {family.name for family in FAMILIES}


@pytest.mark.parametrize("name", [name for name in conv_templates if "plain" not in name])
def test_agrees_with_the_llava_host_on_its_own_templates(name):
    conversation = conv_templates[name].copy()
    for role, message in zip(conversation.roles * 2, [("<image>\n" + FIRST, None), "Red.", SECOND, None], strict=True):
        conversation.append_message(role, message)
    prompt = conversation.get_prompt()
    assert find_questions(prompt)[0].text == last_question(prompt) == SECOND
    own = find_questions(prompt, [prompt.rindex("<image>")])[0]
    assert own.text == FIRST  # with mmtag templates the picture has a turn of its own, without words


def test_pictures_of_different_turns_have_their_own_questions():
    prompt = f"USER: <image><image>\n{FIRST} ASSISTANT: Red.</s>USER: <image>\n{SECOND} ASSISTANT:"
    places = [i for i in range(len(prompt)) if prompt.startswith("<image>", i)]
    assert [q.text for q in find_questions(prompt, places)] == [FIRST, FIRST, SECOND]
    assert [q.text for q in find_questions(prompt, places, "latest_turn")] == [SECOND] * 3


def test_the_image_turns_question_stays_as_the_conversation_goes_on():
    prompt = f"USER: <image>\n{FIRST} ASSISTANT:"
    place = [prompt.index("<image>")]
    longer = prompt + f" Red.</s>USER: {SECOND} ASSISTANT:"
    assert find_questions(prompt, place) == find_questions(longer, place)


def test_words_of_the_question_are_not_taken_for_a_template():
    asked = "What do [INST], USER and <|im_start|>user\nmean?"
    assert find_questions(f"A chat. USER: <image>\n{asked} ASSISTANT:", [15])[0].text == asked
    system = "<|im_start|>system\nUSER: is a word.<|im_end|>\n<|im_start|>user\n<image>"
    assert find_family(system + f"{FIRST}<|im_end|>").name == "chatml"


def test_a_picture_between_words_leaves_the_whole_turn():
    prompt = "USER: Is the car in <image> red? ASSISTANT:"
    assert find_questions(prompt, [20])[0].text.split() == ["Is", "the", "car", "in", "red?"]


@pytest.mark.parametrize(
    "prompt, text",
    [
        (f"<image>\n{FIRST}", FIRST),
        (f"Some words before. <image>{FIRST}\n", FIRST),
        (f"{FIRST}<image>\n", FIRST),
        (FIRST, FIRST),
        ("<image>", ""),
        ("", ""),
    ],
)
def test_without_a_template_the_text_behind_the_picture_counts(prompt, text):
    found = find_questions(prompt)[0]
    assert (found.text, found.family) == (text, PLAIN)


def test_marks_of_frames_times_and_unknown_pictures_are_no_question():
    assert question_text(f"Frame1: <image>\nFrame2: <image>\n{FIRST}{SHORT}") == FIRST
    assert question_text(f"<0.5 seconds><|video_pad|><1.5 seconds><|video_pad|>{FIRST}") == FIRST
    assert question_text(f"<|my_image|>{FIRST}", ["<|my_image|>"]) == FIRST


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"image_turn, latest_turn"):
        find_questions("USER: hello", scope="last")
    with pytest.raises(ValueError, match=r"no picture can stand at 99"):
        find_questions("USER: hello", [99])


@pytest.mark.parametrize(
    "prompt, question",
    [
        ("SYSTEM. USER: <image>\n### Task\nWhat color is the star? ASSISTANT:", "### Task\nWhat color is the star?"),
        (
            "<|im_start|>user\n<image>\nShe said Human: stop, then left. Why?<|im_end|>\n<|im_start|>assistant\n",
            "She said Human: stop, then left. Why?",
        ),
        ("[INST] <image>\n### Sign ###\nWhat does it say? [/INST]", "### Sign ###\nWhat does it say?"),
        ("A chat. USER: <image>\nWho wrote USER? ASSISTANT:", "Who wrote USER?"),
    ],
)
def test_marks_of_other_templates_are_words_of_the_question(prompt, question):
    assert last_question(prompt) == question


def test_given_questions_are_cleaned_like_those_that_are_read():
    asked = "<image>\nWhat?\nAnswer the question using a single word or phrase."
    assert given_questions(asked, 2) == ["What?", "What?"]
    assert given_questions(["a", asked], 2) == ["a", "What?"]
    assert given_questions(None, 2) is None
    with pytest.raises(ValueError, match=r"2 prompts but 1 queries"):
        given_questions(["a"], 2)
    with pytest.raises(TypeError, match=r"got 7"):
        given_questions([7], 1)


@pytest.mark.parametrize(
    "question, message", [("", "asks nothing"), (" ?! ", "asks nothing"), (None, "without a tokenizer")]
)
def test_an_empty_question_is_refused_with_what_to_do(question, message):
    with pytest.raises(ValueError, match=r"'script' selects by the question.*prompt 1"):
        check_asked(["what?", question], "script")
    with pytest.raises(ValueError, match=message):
        check_asked([question], "script")
