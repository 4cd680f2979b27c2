"""LLaVA inference with pruning inside."""

try:
    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
    from llava.model.language_model.llava_mistral import LlavaMistralConfig, LlavaMistralForCausalLM
    from llava.model.language_model.llava_qwen import LlavaQwenConfig, LlavaQwenForCausalLM
except ImportError as error:  # the library says only which of its classes it could not import
    try:
        import torchvision  # noqa: F401
    except ModuleNotFoundError:
        raise error from None
    except Exception as reason:
        raise ImportError(
            f"the torchvision of this environment does not fit its torch ({reason}): install the release and build "
            "that do (constraints.txt; CPU and CUDA builds do not mix), or remove it"
        ) from error
    raise

__all__ = [
    "LlavaConfig",
    "LlavaLlamaForCausalLM",
    "LlavaMistralConfig",
    "LlavaMistralForCausalLM",
    "LlavaQwenConfig",
    "LlavaQwenForCausalLM",
]
