"""LLaVA-OneVision 1.5 as a class of the Transformers library's kind, which the library does not have.

The code that comes with its checkpoints is written for Transformers 4 and does not run on 5. Here is the architecture
on the library's Qwen3, with the names of the published weights, so that everything that works on the library's own
classes works on it. Importing this package makes it known to the auto classes.
"""

from transformers import AutoConfig, AutoModelForImageTextToText

from llava.integrations.onevision_1_5.configuration import OneVision15Config, OneVision15TextConfig, RiceConfig
from llava.integrations.onevision_1_5.model import LLaVAOneVision1_5_ForConditionalGeneration, OneVision15Model

for _config in (OneVision15Config, OneVision15TextConfig, RiceConfig):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
AutoModelForImageTextToText.register(OneVision15Config, LLaVAOneVision1_5_ForConditionalGeneration, exist_ok=True)

__all__ = [
    "LLaVAOneVision1_5_ForConditionalGeneration",
    "OneVision15Config",
    "OneVision15Model",
    "OneVision15TextConfig",
    "RiceConfig",
]
