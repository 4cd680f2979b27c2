"""Token names and numbers that the LLaVA checkpoints were trained with."""

IGNORE_INDEX = -100  # label that the loss skips
IMAGE_TOKEN_INDEX = -200  # placeholder id in the token sequence, replaced by visual tokens
DEFAULT_IMAGE_TOKEN = "<image>"
DEFAULT_IMAGE_PATCH_TOKEN = "<im_patch>"
DEFAULT_IM_START_TOKEN = "<im_start>"
DEFAULT_IM_END_TOKEN = "<im_end>"

# Sentences that ask for a form of answer and say nothing about the picture: not part of a pruner's query.
ANSWER_FORMAT_INSTRUCTIONS = (
    "Answer the question using a single word or phrase.",
    "Answer with the option's letter from the given choices directly.",
    "请直接回答选项字母。",
    # of the benchmarks that come through lmms-eval
    "Answer the question with a single word.",
    "Select the best answer to the following multiple-choice question based on the video and the subtitles. "
    "Respond with only the letter (A, B, C, or D) of the correct option.",
    "The best answer is:",
    "Only give the best option.",
    "Best option: (",
)
