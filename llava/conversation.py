"""Prompt templates of the LLaVA family, as the checkpoints were trained with them.

The wording of every template is part of the checkpoints: a changed character is another prompt.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from enum import Enum

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.relevance.question import clean_question as clean_question  # read there, known by this name here
from llava.relevance.question import last_question as last_question


class SeparatorStyle(Enum):
    """How turns are joined."""

    SINGLE = "one separator after every turn"
    TWO = "one separator after the user, another after the assistant"
    MPT = "roles carry their own markers"
    PLAIN = "no roles"
    LLAMA_2 = "instruction brackets, the system text inside the first"
    CHATML = "roles carry their own markers, each turn ends its line; an empty message is still to be answered"
    LLAMA_3 = "headers carry the roles, an end-of-turn token ends every turn"


@dataclass
class Conversation:
    """A template and the turns so far.

    Args:
        system: text before the first turn.
        roles: names of user and assistant as they stand in the prompt.
        messages: turns as (role, message); a message is text, ``None`` (still to be answered), or a tuple
            (text, image, ...), of which the text counts.
        offset: number of turns that belong to the template itself.
        sep, sep2: separators; ``sep2`` ends the assistant's turn.
        version: family of the template; "mmtag" families put the first image into a turn of its own.
    """

    system: str
    roles: tuple[str, str]
    sep_style: SeparatorStyle
    sep: str
    sep2: str | None = None
    version: str = "Unknown"
    messages: list[tuple[str, str | tuple | None]] = field(default_factory=list)
    offset: int = 0

    def append_message(self, role: str, message: str | tuple | None) -> None:
        self.messages.append((role, message))

    def copy(self) -> Conversation:
        return Conversation(
            self.system,
            self.roles,
            self.sep_style,
            self.sep,
            self.sep2,
            self.version,
            list(self.messages),
            self.offset,
        )

    @property
    def stop_string(self) -> str:
        """What the model writes when its turn is over."""
        if self.sep_style in (SeparatorStyle.TWO, SeparatorStyle.LLAMA_2):
            return self.sep2
        return self.sep

    def get_prompt(self) -> str:
        """The whole conversation as one string, ending where the model goes on."""
        turns = [(role, _text(message)) for role, message in self._turns_with_image_in_place()]
        match self.sep_style:
            case SeparatorStyle.SINGLE:
                return self.system + self.sep + "".join(_labelled(role, text, self.sep) for role, text in turns)
            case SeparatorStyle.TWO:
                ends = (self.sep, self.sep2)
                return self.system + self.sep + "".join(_labelled(r, t, ends[i % 2]) for i, (r, t) in enumerate(turns))
            case SeparatorStyle.MPT:
                body = "".join(role if text is None else role + text + self.sep for role, text in turns)
                return self.system + self.sep + body
            case SeparatorStyle.CHATML:
                end = self.sep + "\n"
                system = self.system + end if self.system else ""
                return system + "".join(role + text + end if text else role for role, text in turns)
            case SeparatorStyle.PLAIN:
                ends = (self.sep, self.sep2 or self.sep)
                return self.system + "".join(t + ends[i % 2] for i, (_, t) in enumerate(turns) if t is not None)
            case SeparatorStyle.LLAMA_3:
                system = [("system", self.system)] if self.system else []
                return "".join(_headed(role, text, self.sep) for role, text in system + turns)
            case SeparatorStyle.LLAMA_2:
                return self._llama_2_prompt([text for _, text in turns])

    def _llama_2_prompt(self, texts: list[str | None]) -> str:
        prompt = ""
        for i, text in enumerate(texts):
            if text is None:
                continue
            if i % 2:
                prompt += f" {text} {self.sep2}"
                continue
            if i == 0 and self.system:
                text = f"<<SYS>>\n{self.system}\n<</SYS>>\n\n{text}"
            prompt += f"{self.sep}[INST] {text} [/INST]"
        return prompt.removeprefix(self.sep)

    def _turns_with_image_in_place(self) -> list[tuple[str, str | tuple | None]]:
        """An image handed over with the first message goes before its text, or into a turn of its own."""
        if not self.messages or not isinstance(self.messages[0][1], tuple):
            return self.messages
        role, message = self.messages[0]
        question = message[0].replace(DEFAULT_IMAGE_TOKEN, "").strip()
        if "mmtag" in self.version:
            shown = [(self.roles[0], f"<Image>{DEFAULT_IMAGE_TOKEN}</Image>"), (self.roles[1], "Received.")]
            return [*shown, (role, question), *self.messages[1:]]
        return [(role, f"{DEFAULT_IMAGE_TOKEN}\n{question}"), *self.messages[1:]]


def _text(message: str | tuple | None) -> str | None:
    return message[0] if isinstance(message, tuple) else message


def _labelled(role: str, text: str | None, end: str) -> str:
    return f"{role}:" if text is None else f"{role}: {text}{end}"


def _headed(role: str, text: str | None, end: str) -> str:
    head = f"<|start_header_id|>{role}<|end_header_id|>\n\n"
    return head if text is None else f"{head}{text.strip()}{end}"


CURIOUS_USER = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
CURIOUS_HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
IMAGE_TAGS = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant is able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
    "The visual content will be provided with the following format: <Image>visual content</Image>."
)
LLAMA_2_SYSTEM = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information."
)
LLAVA_LLAMA_2_SYSTEM = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
MPT_SYSTEM = (
    "<|im_start|>system\nA conversation between a user and an LLM-based AI assistant. "
    "The assistant gives helpful and honest answers."
)
ENERGY_QUESTION = "What are the key differences between renewable and non-renewable energy sources?"
ENERGY_ANSWER = (
    "Renewable energy sources are those that can be replenished naturally in a relatively short amount of "
    "time, such as solar, wind, hydro, geothermal, and biomass. Non-renewable energy sources, on the other "
    "hand, are finite and will eventually be depleted, such as coal, oil, and natural gas. Here are some key "
    "differences between renewable and non-renewable energy sources:\n"
    "1. Availability: Renewable energy sources are virtually inexhaustible, while non-renewable energy sources "
    "are finite and will eventually run out.\n"
    "2. Environmental impact: Renewable energy sources have a much lower environmental impact than "
    "non-renewable sources, which can lead to air and water pollution, greenhouse gas emissions, and other "
    "negative effects.\n"
    "3. Cost: Renewable energy sources can be more expensive to initially set up, but they typically have "
    "lower operational costs than non-renewable sources.\n"
    "4. Reliability: Renewable energy sources are often more reliable and can be used in more remote locations "
    "than non-renewable sources.\n"
    "5. Flexibility: Renewable energy sources are often more flexible and can be adapted to different "
    "situations and needs, while non-renewable sources are more rigid and inflexible.\n"
    "6. Sustainability: Renewable energy sources are more sustainable over the long term, while non-renewable "
    "sources are not, and their depletion can lead to economic and social instability.\n"
)

USER_ASSISTANT = ("USER", "ASSISTANT")
HUMAN_ASSISTANT = ("Human", "Assistant")
CHATML = ("<|im_start|>user\n", "<|im_start|>assistant\n")
SINGLE, TWO, MPT, PLAIN, LLAMA_2, CHATML_LINES, LLAMA_3 = SeparatorStyle

_V0 = Conversation(
    CURIOUS_HUMAN,
    HUMAN_ASSISTANT,
    SINGLE,
    "###",
    messages=[("Human", ENERGY_QUESTION), ("Assistant", ENERGY_ANSWER)],
    offset=2,
)
_VICUNA_V1 = Conversation(CURIOUS_USER, USER_ASSISTANT, TWO, " ", "</s>", "v1")
_PLAIN = Conversation("", ("", ""), PLAIN, "\n")
QWEN_SYSTEM = "<|im_start|>system\nYou are a helpful assistant."
QWEN_2_5_SYSTEM = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant."
_QWEN = Conversation(QWEN_SYSTEM, CHATML, CHATML_LINES, "<|im_end|>", version="qwen")
_CHATML = Conversation("<|im_start|>system\nAnswer the questions.", CHATML, MPT, "<|im_end|>", version="mpt")

conv_templates: dict[str, Conversation] = {
    "default": _V0,
    "v0": _V0,
    "v1": _VICUNA_V1,
    "vicuna_v1": _VICUNA_V1,
    "llama_2": Conversation(LLAMA_2_SYSTEM, USER_ASSISTANT, LLAMA_2, "<s>", "</s>", "llama_v2"),
    "mistral_instruct": Conversation("", USER_ASSISTANT, LLAMA_2, "", "</s>", "llama_v2"),
    "chatml_direct": _CHATML,
    "mistral_direct": _CHATML,
    "plain": _PLAIN,
    "v0_plain": _PLAIN,
    "llava_v0": Conversation(CURIOUS_HUMAN, HUMAN_ASSISTANT, SINGLE, "###"),
    "v0_mmtag": Conversation(IMAGE_TAGS, HUMAN_ASSISTANT, SINGLE, "###", version="v0_mmtag"),
    "llava_v1": Conversation(CURIOUS_HUMAN, USER_ASSISTANT, TWO, " ", "</s>", "v1"),
    "v1_mmtag": Conversation(IMAGE_TAGS, USER_ASSISTANT, TWO, " ", "</s>", "v1_mmtag"),
    "llava_llama_2": Conversation(LLAVA_LLAMA_2_SYSTEM, USER_ASSISTANT, LLAMA_2, "<s>", "</s>", "llama_v2"),
    "mpt": Conversation(MPT_SYSTEM, CHATML, MPT, "<|im_end|>", version="mpt"),
    "qwen_1_5": _QWEN,
    "qwen_2": _QWEN,
    "qwen_2_5": Conversation(QWEN_2_5_SYSTEM, CHATML, CHATML_LINES, "<|im_end|>", version="qwen"),
    # The start token is the tokenizer's, once, as in training (LLaVA-NeXT's own scripts write it twice).
    "llava_llama_3": Conversation(
        LLAVA_LLAMA_2_SYSTEM, ("user", "assistant"), LLAMA_3, "<|eot_id|>", version="llama_v3"
    ),
}
MARKS = {  # tokens that a template is written with: a tokenizer that lacks them was trained with another
    "llava_llama_3": "<|eot_id|>",
    "chatml_direct": "<|im_end|>",
    "mpt": "<|im_end|>",
    "qwen_1_5": "<|im_end|>",
}


def template_for(
    model_name: str, model_type: str | None = None, tokens: Collection[str] | None = None, chat_template: str = ""
) -> str:
    """Name of the template that a checkpoint was trained with.

    What its files say comes first; LLaVA's own naming rules decide among those that fit them.

    Args:
        model_type: of its configuration, as our classes call it ("llava_llama", "llava_mistral", "llava_qwen").
        tokens: those that its tokenizer's files add to the vocabulary; ``None`` if they are not known.
        chat_template: its tokenizer's, where that has one.

    Raises:
        ValueError: the name stands for a template whose marks the tokenizer does not know.
    """
    if model_type == "llava_qwen":
        return "qwen_1_5"
    if model_type == "llava_mistral":
        return "mistral_instruct"
    named = _template_by_name(model_name)
    if tokens is None:
        return named
    if MARKS["llava_llama_3"] in tokens:
        return "llava_llama_3"
    if MARKS["chatml_direct"] in tokens:
        return named if MARKS.get(named) in tokens else "chatml_direct"
    if named in MARKS:
        raise ValueError(
            f"the name {model_name} stands for the conversation template {named}, but the checkpoint's tokenizer does "
            f"not know its {MARKS[named]}: say which template it was trained with (--conv-mode)"
        )
    return "llava_llama_2" if named == "vicuna_v1" and "[INST]" in chat_template else named


def _template_by_name(model_name: str) -> str:
    name = model_name.lower()
    if re.search(r"llama-?3", name):
        return "llava_llama_3"
    if "llama-2" in name:
        return "llava_llama_2"
    if "mistral" in name:
        return "mistral_instruct"
    if "v1.6-34b" in name:
        return "chatml_direct"
    if "mpt" in name:
        return "mpt"
    if "qwen" in name or "llava-video" in name or "onevision" in name:
        return "qwen_1_5"
    if "v0" in name and "v1" not in name:
        return "llava_v0"
    return "vicuna_v1"
