"""Questions, prompts and greedy answers on the tiny checkpoints."""

import torch

from llava.mm_utils import tokenizer_image_token

V15, V16 = "llava-v1.5-tiny-wide", "llava-v1.6-vicuna-tiny-wide"


QUESTIONS = ["What is shown in this image?", "Is the red circle next to the blue square?", "How many dogs are there?"]


def prompt_of(question, images=1):
    system = "A chat between a curious user and an artificial intelligence assistant."
    return f"{system} USER: {'<image>' * images}\n{question} ASSISTANT:"


def ids_of(tokenizer, *prompts, side="left"):
    rows = [tokenizer_image_token(prompt, tokenizer) for prompt in prompts]
    length = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    return ids, mask


def answer(model, ids, mask=None, **options):
    return model.generate(ids, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, **options).tolist()
