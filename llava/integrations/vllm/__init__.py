"""Query-conditioned pruning of visual tokens inside vLLM, as a plugin: no fork, no file of vLLM changed.

    prompt tokens -> question -> plan (method, budget, question), part of the picture's hash
    pixels -> tower -> projector -> bounded cache of unpruned features -> `Pruner.select` -> m rows for vLLM

vLLM finds `register` by the entry point ``vllm.general_plugins`` in every process it starts; a model is served pruned
where it is started under one of the names in `ARCHITECTURES`.
"""

from llava.integrations.vllm.registration import ARCHITECTURES, register

__all__ = ["ARCHITECTURES", "register"]
