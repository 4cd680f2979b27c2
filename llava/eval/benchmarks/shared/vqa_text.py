"""Answer normalisation and soft accuracy of the VQA family (TextVQA, VizWiz, VQAv2), as the published scorers have it.

Three of their slips are part of the definition, because every published number contains them: a period after a digit
is not protected, only the first 32 periods are deleted, and one entry of the contraction list is reversed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6"} | {
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}
ARTICLES = ("a", "an", "the")
MAX_PERIODS = 32  # the published code hands a flag (value 32) to where the number of replacements goes

# A contraction's spelled form; the forms without one of its apostrophes are derived from it below.
SPELLED = """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's
    isn't it'd it'll ma'am might've mightn't must've mustn't needn't not've o'clock oughtn't shan't should've
    shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd
    there're there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've
    when's where'd where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all
    you'd you'll you're you've
"""
TWICE_SPELLED = """
    couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've
    something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll y'all'd've you'd've 'ow's'at
"""


def _contractions() -> dict[str, str]:
    """Every form that lacks one apostrophe, to its spelled form; and the list's one reversed entry."""
    forms = {}
    for spelled in (SPELLED + TWICE_SPELLED).split():
        for place, character in enumerate(spelled):
            if character == "'":
                forms[spelled[:place] + spelled[place + 1 :]] = spelled
    return forms | {"somebody'd": "somebodyd"}


CONTRACTIONS = _contractions()

_PERIOD = re.compile(r"\.(?!\d)")
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")


def remove_punctuation(text: str) -> str:
    """Steps 3 and 4: delete or blank out `PUNCTUATION`, then delete periods that no digit follows."""
    result = text
    has_grouped_digits = _DIGIT_COMMA_DIGIT.search(text) is not None
    for character in PUNCTUATION:
        stands_at_space = character + " " in text or " " + character in text
        result = result.replace(character, "" if stands_at_space or has_grouped_digits else " ")
    return _PERIOD.sub("", result, count=MAX_PERIODS)


def replace_words(text: str) -> str:
    """Step 5: lower-case, number words to digits, no articles, contractions spelled, single spaces."""
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def one_line(text: str) -> str:
    """Newlines and tabs to spaces; stripped."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def normalise(answer: str) -> str:
    """The full normaliser ("EvalAI"), of TextVQA, VizWiz and every upload file."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return replace_words(remove_punctuation(one_line(text)))


def normalise_vqa(answer: str) -> str:
    """Steps 3 to 5 alone, as the evaluation code of VQAv2 applies them."""
    return replace_words(remove_punctuation(answer))


def soft_score(prediction: str, human: Sequence[str]) -> float:
    """Soft accuracy 0..1 of a prediction against (as a rule ten) human answers, all already normalised.

    For each person, the number of *other* people who gave ``prediction``, divided by 3 and cut at 1; their mean.
    """
    equal = [answer == prediction for answer in human]
    total = sum(equal)
    return sum(min(1.0, (total - own) / 3) for own in equal) / len(equal)


def vqa_score(prediction: str, human: Sequence[str]) -> float:
    """Soft score 0..1 of VQAv2's own code: normalised only where the ten human answers are not all the same."""
    prediction, human = one_line(prediction), [one_line(answer) for answer in human]
    if len(set(human)) > 1:
        prediction, human = normalise_vqa(prediction), [normalise_vqa(answer) for answer in human]
    return soft_score(prediction, human)


def vqa_score_older(prediction: str, human: Sequence[str]) -> float:
    """Soft score of an older revision: prediction always normalised, human answers for punctuation alone."""
    prediction, human = one_line(prediction), [one_line(answer) for answer in human]
    if len(set(human)) > 1:
        human = [remove_punctuation(answer) for answer in human]
    return soft_score(normalise_vqa(prediction), human)
