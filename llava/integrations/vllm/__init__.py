"""Query-conditioned pruning of visual tokens inside vLLM, as a plugin: no fork, no file of vLLM changed.

    front end   options, checked (options.py), and the question (prompt.py) -> plan (plan.py), part of the picture's
                hash and of its number of placeholders (processing.py)
    engine      the plan of a request and the picture's pixels, which came once for all plans (shipping.py)
    worker      pixels -> tower -> projector -> bounded cache of unpruned features (features.py) -> `Pruner.select`
                (selection.py) -> the kept rows for vLLM (model.py, and a file for each family)
    both        where questions are read (relevance.py): decided by one rule

vLLM finds `register` by the entry point ``vllm.general_plugins`` in every process it starts; a model is served pruned
where it is started under one of the names in `ARCHITECTURES`.
"""

from llava.integrations.vllm.registration import ARCHITECTURES, register

__all__ = ["ARCHITECTURES", "register"]
