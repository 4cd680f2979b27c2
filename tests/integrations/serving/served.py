"""A family in vLLM beside the same weights in the library's class, and what must hold between them."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from engines import Spy, logprobs
from test_serving_llava import make_cold
from transformers import AutoProcessor
from transformers.video_utils import VideoMetadata
from vllm import SamplingParams

from llava.pruning import get_pruner

TOKENS = 8


def chat(mark, question="What is red?"):
    return f"<|im_start|>user\n{mark}{question}<|im_end|>\n<|im_start|>assistant\n"


@dataclass
class Served:
    """One engine and the library's model.

    Args:
        without: what the library's class is not given of its processor's inputs.
        agreeing, tolerance: how many tokens of an answer must be the same, and how close their logprobs are.
    """

    llm: Any
    model: Any
    folder: Any
    without: tuple[str, ...] = ()
    agreeing: int = TOKENS
    tolerance: float = 2e-3

    def __post_init__(self):
        self.spy = Spy(self.llm)
        self.processor = AutoProcessor.from_pretrained(self.folder)

    def ask(self, prompt, media, **options):
        """Greedy answers with logprobs; a list of them where prompts are listed."""
        several = isinstance(prompt, list)
        rows = zip(prompt, media, strict=True) if several else [(prompt, media)]
        requests = [
            {"prompt": text, "multi_modal_data": own, "mm_processor_kwargs": options or None} for text, own in rows
        ]
        sampling = SamplingParams(temperature=0, max_tokens=TOKENS, logprobs=5, ignore_eos=True)
        outputs = self.llm.generate(requests, sampling, use_tqdm=False)
        return outputs if several else outputs[0]

    def library(self, prompt, inputs, pruner=None):
        """Greedy tokens and logprobs of the library's class, and the indices that it kept."""
        wanted = {"output_logits": True, "return_dict_in_generate": True, "pad_token_id": 0}
        made = self.processor(text=prompt, return_tensors="pt", **inputs)
        made = {name: values for name, values in made.items() if name not in self.without}
        # Random weights answer with any token, the one that ends an answer among them.
        wanted |= {"eos_token_id": -1, "max_new_tokens": TOKENS, "do_sample": False}
        with torch.inference_mode(), pruner(self.model, self.processor) if pruner else nullcontext() as handle:
            output = self.model.generate(**made, **wanted)
            kept = [one.kept for one in handle.kept] if pruner else []
        new = output.sequences[0, made["input_ids"].shape[1] :].tolist()
        theirs = [row[0].log_softmax(-1)[token].item() for row, token in zip(output.logits, new, strict=True)]
        return new, theirs, kept

    def equals_the_library(self, prompt, media, inputs, pruner=None, **options):
        """Cold and warm, the same tokens are kept, answered and as probable as in the library's class."""
        make_cold(self.llm)
        self.spy.reset()
        cold = self.ask(prompt, media, **options)
        tokens, theirs, kept = self.library(prompt, inputs, pruner)
        if pruner and len(self.spy.chosen) == 1:
            kept = [torch.cat(kept)]  # the library's class takes each crop for a picture of its own
        for own, mask in zip(self.spy.chosen, kept, strict=False):
            assert own.tolist() == mask.nonzero().flatten().tolist()
        warm = self.ask(prompt, media, **options)
        for served in (cold, warm):
            assert list(served.outputs[0].token_ids)[: self.agreeing] == tokens[: self.agreeing]
            assert logprobs(served)[: self.agreeing] == pytest.approx(theirs[: self.agreeing], abs=self.tolerance)
        return cold, warm

    def batch_equals_singles(self, prompts, media):
        make_cold(self.llm)
        singles = [self.ask(text, own) for text, own in zip(prompts, media, strict=True)]
        make_cold(self.llm)
        together = self.ask(prompts, media)
        for alone, beside in zip(singles, together, strict=True):
            assert beside.prompt_token_ids == alone.prompt_token_ids
            assert beside.outputs[0].token_ids == alone.outputs[0].token_ids
            assert logprobs(beside) == pytest.approx(logprobs(alone), abs=self.tolerance)


def script(keep, **options):
    return get_pruner("script", keep_tokens=keep, **options)


def filmed(frames):
    """A video for vLLM and for the library's processor, which are told alike when each frame was taken."""
    count = len(frames)
    told = {"fps": 2.0, "total_num_frames": count, "frames_indices": list(range(count)), "duration": count / 2}
    told["video_backend"] = "opencv"
    ours = {"video": [(frames, {**told, "do_sample_frames": False})]}
    return ours, {"videos": [frames], "video_metadata": [VideoMetadata(**told)], "do_sample_frames": False}
