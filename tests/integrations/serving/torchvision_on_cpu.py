"""Lets a CUDA build of torchvision be imported beside a CPU build of torch: for tests on machines without a GPU only.

Package indexes without PyTorch's own CPU wheels give torchvision's CUDA build, whose kernels a CPU torch cannot load;
its Python part then fails at two operators that it expects to exist. vLLM needs the Python part alone. Here the two
are declared just before torchvision is imported. scripts/test_vllm.sh puts this file into its environment, with a
``.pth`` that imports it, since vLLM starts processes of its own; with torchvision's CPU build it does not.
"""

import sys
from importlib.abc import MetaPathFinder

_declared = []  # a library's declarations live as long as it does


class _BeforeTorchvision(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            if torch.version.cuda is None:
                library = torch.library.Library("torchvision", "FRAGMENT")
                _declared.append(library)
                for operator in ("nms", "qnms"):
                    library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, _BeforeTorchvision())
