"""The user's question: as it is given, or read back from the prompt text that a chat template has rendered.

A model sees the prompt and not the conversation. The words of a query-conditioned method are found in three steps:
which family of templates wrote this prompt, where its user's turns are, and what of the turn is question (no
placeholder of a picture, no system text, no plea for a short answer). All hosts read questions here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from llava.constants import ANSWER_FORMAT_INSTRUCTIONS, DEFAULT_IMAGE_TOKEN

QueryScope = Literal["image_turn", "latest_turn"]
QUERY_SCOPES: tuple[QueryScope, ...] = ("image_turn", "latest_turn")


@dataclass(frozen=True)
class TemplateFamily:
    """How a family of chat templates marks the turns of a conversation.

    Args:
        name: what the family is called in messages.
        turn: regular expression of the mark before a turn of anybody, by which the family is recognised.
        user: regular expression of the mark before a user's turn.
        end: regular expression of what stands behind a user's turn.
        models: whose prompts look like this.
    """

    name: str
    turn: str
    user: str
    end: str
    models: str


FAMILIES = (
    TemplateFamily(
        "chatml",
        r"<\|im_start\|>",
        r"<\|im_start\|>user(?:[ \n]|(?=<))",
        r"<\|im_end\|>",
        "Qwen-VL, InternVL, LLaVA-OneVision, LLaVA-1.6-34b, MPT",
    ),
    TemplateFamily(
        "idefics",
        r"(?:<\|im_start\|>|<\|begin_of_text\|>|<end_of_utterance>\n?|^)(?:System|User|Assistant):",
        r"(?:<\|im_start\|>|<\|begin_of_text\|>|<end_of_utterance>\n?|^)User:",
        r"<end_of_utterance>",
        "SmolVLM, Idefics2, Idefics3",
    ),
    TemplateFamily(
        "llama_3",
        r"<\|start_header_id\|>",
        r"<\|start_header_id\|>user<\|end_header_id\|>",
        r"<\|eot_id\|>",
        "Llama-3 hosts",
    ),
    TemplateFamily(
        "gemma", r"<start_of_turn>", r"<start_of_turn>user\n", r"<end_of_turn>", "Gemma 3, PaliGemma chats"
    ),
    TemplateFamily(
        "cohere",
        r"<\|START_OF_TURN_TOKEN\|>",
        r"<\|START_OF_TURN_TOKEN\|><\|USER_TOKEN\|>",
        r"<\|END_OF_TURN_TOKEN\|>",
        "Aya Vision, Command A Vision",
    ),
    TemplateFamily(
        "phi_3",
        r"<\|(?:system|user|assistant)\|>",
        r"<\|user\|>",
        r"<\|end\|>|<\|assistant\|>",
        "Phi-3 Vision, GLM-4V",
    ),
    TemplateFamily(
        "instruct", r"\[INST\]", r"\[INST\]", r"\[/INST\]", "Llama-2 hosts, LLaVA-NeXT-Mistral, Pixtral, Mistral 3"
    ),
    TemplateFamily("vicuna", r"USER:", r"USER:", r"ASSISTANT:|</s>", "LLaVA-1.5, LLaVA-NeXT-Vicuna, Video-LLaVA"),
    TemplateFamily("llava_v0", r"Human:", r"Human:", r"###", "LLaVA of April 2023"),
)
PLAIN = "plain"  # no family's mark: all text is the user's

_SYSTEM_BLOCK = re.compile(r"<<SYS>>.*?<</SYS>>", re.DOTALL)
_VISUAL_MARKS = re.compile(
    r"(?:Frame ?-?\d+: ?)?<(?:image|video|IMG_CONTEXT|image_soft_token)>|</?(?:img|Image|video_frame)>"
    r"|<\|(?:vision_start|vision_end|image_pad|video_pad|image|image_\d+|begin_of_image|end_of_image)\|>"
    r"|<(?:start_of_image|end_of_image|fake_token_around_image|global-img|row_\d+_col_\d+)>"
    r"|\[IMG(?:_BREAK|_END)?\]|<\|(?:START_OF_IMG|END_OF_IMG|IMG_PATCH)\|>|TILE_(?:\d+|GLOBAL)"
    r"|<\d+(?:\.\d+)? seconds>|<im_(?:start|end|patch)>"
)
_WORD = re.compile(r"\w")


@dataclass(frozen=True)
class Question:
    """The text of a question, and the name of the family whose marks it was found by (`PLAIN` for none)."""

    text: str
    family: str


def find_family(prompt: str) -> TemplateFamily | None:
    """The family whose mark of a turn stands first in the prompt; of two at one place, the earlier in `FAMILIES`.

    What a user writes comes behind the template's own first mark, so words in a question are never taken for one.
    ``None`` where no family's mark is found.
    """
    found = [(match.start(), family) for family in FAMILIES if (match := re.search(family.turn, prompt))]
    if not found:
        return None
    first = min(start for start, _ in found)
    at_first = [family for start, family in found if start == first]
    # SmolVLM opens its first turn with chat-ml's mark, but names the speaker as Idefics does.
    return next((family for family in at_first if re.search(family.user, prompt)), at_first[0])


def find_questions(
    prompt: str,
    places: Sequence[int] = (),
    scope: QueryScope = "image_turn",
    placeholders: Sequence[str] = (),
) -> list[Question]:
    """The question that goes with each picture of a rendered prompt.

    Args:
        prompt: the text as the chat template wrote it, special tokens included.
        places: where the pictures stand in it, as positions of characters.
        scope: "image_turn" reads the user's turn that a picture stands in, or the first with words after it where
            that turn shows pictures only: the same at every later turn of the conversation. "latest_turn" reads the
            last turn with words, for all pictures.
        placeholders: marks of pictures beside the known ones, for example a tokenizer's image token.

    Returns:
        One question per place, or the one of the latest turn where no places are given. Its text may be empty.

    Raises:
        ValueError: an unknown scope, or a place outside the prompt.
    """
    if scope not in QUERY_SCOPES:
        raise ValueError(f"query_scope must be one of {', '.join(QUERY_SCOPES)}; got {scope!r}")
    outside = [place for place in places if not 0 <= place < max(len(prompt), 1)]
    if outside:
        raise ValueError(f"no picture can stand at {outside[0]} in a prompt of {len(prompt)} characters")
    family = find_family(prompt)
    name = PLAIN if family is None else family.name
    if family is None:
        return [Question(_plain_question(prompt, placeholders), name)] * max(len(places), 1)
    turns = [(end, question_text(prompt[start:end], placeholders)) for start, end in user_turns(prompt, family)]
    with_words = [(end, text) for end, text in turns if _WORD.search(text)]
    latest = with_words[-1][1] if with_words else ""
    if scope == "latest_turn" or not places:
        return [Question(latest, name)] * max(len(places), 1)
    return [Question(next((text for end, text in with_words if end > place), latest), name) for place in places]


def last_question(prompt: str) -> str:
    """What the user asked last in a rendered prompt; may be empty."""
    return find_questions(prompt, scope="latest_turn")[0].text


def clean_question(question: str) -> str:
    """Drop image placeholders and sentences that only ask for a form of answer; what is left may be empty."""
    for phrase in (DEFAULT_IMAGE_TOKEN, *ANSWER_FORMAT_INSTRUCTIONS):
        question = question.replace(phrase, "")
    return question.strip()


def given_questions(query: str | Sequence[str] | None, rows: int) -> list[str] | None:
    """What a caller gave as ``query=``, cleaned, one for each of ``rows`` prompts; ``None`` if nothing was given.

    Raises:
        TypeError: something else than text.
        ValueError: another number of questions than prompts.
    """
    if query is None:
        return None
    texts = [query] * rows if isinstance(query, str) else list(query)
    strange = [text for text in texts if not isinstance(text, str)]
    if strange:
        raise TypeError(f"query must be text, or one text for each prompt; got {strange[0]!r}")
    if len(texts) != rows:
        raise ValueError(f"{rows} prompts but {len(texts)} queries: query= takes one question, or one for each prompt")
    return [clean_question(text) for text in texts]


def check_asked(questions: Sequence[str | None] | Mapping[int, str | None], method: str) -> None:
    """Raise ValueError unless every prompt has a question for ``method`` to read.

    Args:
        questions: of prompts 0, 1, ..., or by the numbers of those that show pictures.
    """
    numbered = questions.items() if isinstance(questions, Mapping) else enumerate(questions)
    for row, question in numbered:
        if question is None:
            raise ValueError(
                f"pruner '{method}' selects by the question, and without a tokenizer it cannot be read out of prompt "
                f"{row}: load or attach the model with its tokenizer, or pass query="
            )
        if not _WORD.search(question):
            raise ValueError(
                f"pruner '{method}' selects by the question, and prompt {row} asks nothing ({question!r}): ask "
                "something, pass query=, or take relevance=none or a method that reads no question"
            )


def user_turns(prompt: str, family: TemplateFamily) -> list[tuple[int, int]]:
    """(start, end) of the text of every user's turn; an open turn ends with the prompt."""
    turns, cursor = [], 0
    user, end = re.compile(family.user), re.compile(family.end)
    while (mark := user.search(prompt, cursor)) is not None:
        stop = end.search(prompt, mark.end())
        turns.append((mark.end(), len(prompt) if stop is None else stop.start()))
        if stop is None:
            break
        cursor = stop.start()  # Idefics' mark of the next turn may begin with the end of this one
    return turns


def question_text(turn: str, placeholders: Sequence[str] = ()) -> str:
    """A user's turn without system text, marks of pictures and instructions for the form of the answer."""
    turn = _VISUAL_MARKS.sub("", _SYSTEM_BLOCK.sub("", turn))
    for mark in placeholders:
        turn = turn.replace(mark, "")
    return clean_question(turn)


def _plain_question(prompt: str, placeholders: Sequence[str]) -> str:
    """Without turns: what stands behind the last picture, or all text where nothing does."""
    marks = [_VISUAL_MARKS.pattern, *(re.escape(mark) for mark in placeholders if mark)]
    last = [match.end() for match in re.finditer("|".join(marks), prompt)][-1:] or [0]
    behind = question_text(prompt[last[0] :], placeholders)
    return behind if _WORD.search(behind) else question_text(prompt, placeholders)
