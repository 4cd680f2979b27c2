"""One vLLM engine on a CPU, in this process, with a tiny model; and how to ask it."""

import os

import pytest

os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="WARNING",
)
pytest.importorskip(
    "vllm", reason="vLLM is not installed: scripts/test_vllm.sh runs these in an environment of its own"
)

from vllm import LLM, SamplingParams

BLOCK = 32  # tokens of a KV block: small enough that tiny prompts fill some


def start(folder, architecture, pruning, **options):
    """An engine that serves ``folder`` under ``architecture`` with ``script_pruning``."""
    settings = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 3072,
        "max_num_seqs": 4,
        "block_size": BLOCK,
        "distributed_executor_backend": "uni",
        "limit_mm_per_prompt": {"image": 3},
        "disable_log_stats": True,
    }
    overrides = {"architectures": [architecture], "script_pruning": pruning}
    return LLM(model=str(folder), hf_overrides=overrides, **{**settings, **options})


def model_of(llm):
    """The model inside the engine."""
    return llm.apply_model(lambda model: model)[0]


class Spy:
    """Notes which indices are chosen, and how many views go through the tower."""

    def __init__(self, llm):
        self.model = model_of(llm)
        self.chosen = []
        self.encoded = 0
        choose, features = self.model.script_choose, self.model.script_features

        def noted_choice(pictures, plans):
            chosen = choose(pictures, plans)
            self.chosen += chosen
            return chosen

        def noted_features(plans, shapes, encode, device):
            def counted(numbers):
                made = encode(numbers)
                self.encoded += sum(len(one.features) for one in made)
                return made

            return features(plans, shapes, counted, device)

        self.model.script_choose = noted_choice
        self.model.script_features = noted_features

    def reset(self):
        self.chosen, self.encoded = [], 0


def prompt_of(question, images=1, mark="<image>\n"):
    return f"A chat. USER: {mark * images}{question} ASSISTANT:"


def ask(llm, prompt, images, tokens=8, **processor_kwargs):
    """Greedy answer with logprobs; several prompts at once where lists are given."""
    rows = prompt if isinstance(prompt, list) else [prompt]
    pictures = images if isinstance(prompt, list) else [images]
    kwargs = processor_kwargs.pop("each", [processor_kwargs] * len(rows))
    requests = [
        {"prompt": text, "multi_modal_data": {"image": shown}, "mm_processor_kwargs": own or None}
        for text, shown, own in zip(rows, pictures, kwargs, strict=True)
    ]
    sampling = SamplingParams(temperature=0, max_tokens=tokens, logprobs=5, ignore_eos=True)
    outputs = llm.generate(requests, sampling, use_tqdm=False)
    return outputs if isinstance(prompt, list) else outputs[0]


def logprobs(output):
    """Logprob of every answered token."""
    answer = output.outputs[0]
    return [step[token].logprob for step, token in zip(answer.logprobs, answer.token_ids, strict=True)]
