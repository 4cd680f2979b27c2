"""What a new question about a known picture costs vLLM's front end, unpruned and pruned in turn in one process.

    python scripts/serving_front_end.py converted/llava-toy-v1.6 --keep-tokens 64

Prints the least milliseconds of vLLM's multi-modal processor for a question, and the bytes of tensors that the request
sends to the engine: of the first question about the picture and of the others. Needs vLLM, starts no engine.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
from PIL import Image
from vllm.engine.arg_utils import EngineArgs
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.cache import processor_cache_from_config


class FrontEnd:
    """vLLM's processor of one server, with its cache."""

    def __init__(self, model: str, overrides: dict[str, object]) -> None:
        config = EngineArgs(model=model, hf_overrides=overrides, dtype="float32", max_model_len=4096)
        self.config = config.create_engine_config()
        self.processor = MULTIMODAL_REGISTRY.create_processor(self.config.model_config)
        self.cache = processor_cache_from_config(self.config)
        self.times: list[float] = []
        self.sent: list[int] = []

    def ask(self, picture: Image.Image, question: str) -> None:
        start = time.perf_counter()
        items = self.processor.info.parse_mm_data({"image": picture})
        request = self.processor(f"USER: <image>\n{question} ASSISTANT:", items, cache=self.cache)
        self.times.append(1000 * (time.perf_counter() - start))
        (item,) = request["mm_kwargs"]["image"]
        self.sent.append(sum(element.data.nbytes for element in (item or {}).values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder in the format of the Transformers library")
    parser.add_argument("--keep-tokens", type=int, default=64)
    parser.add_argument("--size", type=int, nargs=2, default=(900, 600), help="width and height of the picture")
    parser.add_argument("--questions", type=int, default=60)
    arguments = parser.parse_args()
    architecture = json.loads((Path(arguments.model) / "config.json").read_text())["architectures"][0]
    pruned = {
        "architectures": ["Script" + architecture],
        "script_pruning": {"keep_tokens": arguments.keep_tokens, "image_pruning_args": {"relevance": "language"}},
    }
    front_ends = {"unpruned": FrontEnd(arguments.model, {}), "pruned": FrontEnd(arguments.model, pruned)}
    width, height = arguments.size
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    for number in range(arguments.questions):
        for front_end in front_ends.values():
            front_end.ask(picture, f"How many circles are left of house {number}?")
    for name, front_end in front_ends.items():
        first, others = front_end.times[0], min(front_end.times[1:])
        print(
            f"{name}: first question {first:.1f} ms, {front_end.sent[0]} bytes; another {others:.2f} ms, "
            f"{max(front_end.sent[1:])} bytes"
        )


if __name__ == "__main__":
    main()
