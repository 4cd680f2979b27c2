"""A LLaVA-1.5 of middle size with random weights, in the format of the Transformers library: for measuring speed only.

    python scripts/random_llava.py /tmp/random-llava

Tokenizer, pictures and CLIP's text side are the toy's; the language model is large enough that reading the prompt is
most of the work, as it is in real models.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import torch
from convert_to_transformers import convert
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

TOY = Path(__file__).resolve().parents[1] / "playground/toy/llava-toy-v1.5"


def build(target: Path, hidden: int, layers: int) -> None:
    """Write the model into the new folder ``target``: the toy's eye, and random weights."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        toy = Path(scratch) / "toy"
        convert(str(TOY), toy)
        shutil.copytree(toy, target, ignore=shutil.ignore_patterns("model*"))
        tower = {}
        for file in toy.glob("model-*.safetensors"):
            tower |= {name: t for name, t in load_file(file).items() if name.startswith("vision_tower.")}
    config = json.loads((target / "config.json").read_text())
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": hidden * 8 // 3 // 64 * 64,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "head_dim": 64,
    }
    config["text_config"] |= sizes
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    language = LlamaForCausalLM(LlamaConfig(**config["text_config"]))
    width = config["vision_config"]["hidden_size"]
    tensors = {f"language_model.{name}": tensor for name, tensor in language.state_dict().items()} | tower
    for number, inputs in ((1, width), (2, hidden)):
        tensors[f"multi_modal_projector.linear_{number}.weight"] = torch.randn(hidden, inputs) * inputs**-0.5
        tensors[f"multi_modal_projector.linear_{number}.bias"] = torch.zeros(hidden)
    halves = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in tensors.items()}
    save_file(halves, target / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path, help="folder to write, which must not exist")
    parser.add_argument("--hidden", type=int, default=768, help="width of the language model, a multiple of 64")
    parser.add_argument("--layers", type=int, default=12)
    arguments = parser.parse_args()
    if arguments.hidden % 64 or arguments.hidden < 64 or arguments.layers < 1:
        parser.error("--hidden must be a multiple of 64, --layers at least 1")
    if arguments.target.exists():
        parser.error(f"{arguments.target} exists already")
    build(arguments.target, arguments.hidden, arguments.layers)


if __name__ == "__main__":
    main()
