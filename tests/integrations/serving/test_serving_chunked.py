"""A picture whose tokens are spread over several prefill steps: the same logprobs as in one piece."""

import pytest
import torch
from engines import ask, logprobs, prompt_of, start
from transformers import AutoModelForImageTextToText, AutoProcessor

from llava.pruning import get_pruner

QUESTION = "What colour is the circle?"


def test_chunked_equals_whole(toy, square):
    folder = toy("v1.5")
    pruning = {"image_pruning_method": "divprune"}
    llm = start(
        folder,
        "ScriptLlavaForConditionalGeneration",
        pruning,
        mm_processor_kwargs={"keep_tokens": 64},  # the server's other place for options
        max_num_batched_tokens=80,
        max_num_seqs=2,
        max_model_len=512,
    )
    prompt = "A chat." + " And another word." * 12 + prompt_of(QUESTION)  # the picture begins within a step
    served = ask(llm, prompt, square)
    assert len(served.prompt_token_ids) > 80
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor(images=square, text=prompt, return_tensors="pt")
    wanted = {"output_logits": True, "return_dict_in_generate": True}
    with torch.inference_mode(), get_pruner("divprune", keep_tokens=64)(model, processor):
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False, **wanted)
    new = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    assert list(served.outputs[0].token_ids)[: len(new)] == new
    theirs = [row[0].log_softmax(-1)[token].item() for row, token in zip(output.logits, new, strict=True)]
    assert logprobs(served)[: len(new)] == pytest.approx(theirs, abs=2e-4)
