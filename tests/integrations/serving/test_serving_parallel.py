"""Two tensor-parallel ranks on a CPU: each has half of the heads, and both read the question as one process does."""

import os

import pytest
import torch
from engines import ask, prompt_of, start

from llava.pruning import PruningInputs, get_pruner
from llava.relevance.asked import Asked, LanguageSpace
from llava.relevance.first_attention import FirstAttention

KEEP = 16
QUESTION = "What colour is the circle?"


def note_choices(model):
    """Let a rank write down what it would choose alone, before the first rank's choice is sent around."""
    selector, model.script_noted = model.script_selector, []

    def noted(indices):
        model.script_noted.append(indices)
        return indices

    selector.agree = noted


def choices(model):
    return [indices.tolist() for indices in model.script_noted], model.script_selector.language.attention is not None


def features_of(model):
    return next(reversed(model.script_cache._pictures.values())).features


@pytest.fixture(scope="module")
def llm(toy):
    os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    parallel = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp", "max_model_len": 1024}
    return start(toy("v1.5"), "ScriptLlavaForConditionalGeneration", {"keep_tokens": KEEP}, **parallel)


def test_every_rank_reads_the_question_as_one_process(llm, toy, square):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = toy("v1.5")
    decoder = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval().model.language_model
    tokenizer = AutoProcessor.from_pretrained(folder).tokenizer
    language = LanguageSpace(
        lambda text: tokenizer(text, add_special_tokens=False).input_ids,
        decoder.embed_tokens,
        FirstAttention.find(decoder),
    )
    llm.apply_model(note_choices)
    sources = ("language", "qk", "words")
    for source in sources:
        output = ask(llm, prompt_of(QUESTION), square, image_pruning_args={"relevance": source})
        text = len(tokenizer(prompt_of(QUESTION)).input_ids) - 1
        assert len(output.prompt_token_ids) == text + KEEP
    ranks = llm.apply_model(choices)
    assert len(ranks) == 2
    assert ranks[0] == ranks[1]
    features = llm.apply_model(features_of)[0]
    for source, chosen in zip(sources, ranks[0][0], strict=True):
        pruner = get_pruner("script", keep_tokens=KEEP, relevance=source)
        with torch.inference_mode():
            fields = Asked(pruner, [QUESTION], language=language).fields(torch.tensor([0]), features)
        assert chosen == pruner.select(PruningInputs(features, **fields)).indices.tolist()
