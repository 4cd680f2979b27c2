"""Compile every kernel for NVIDIA's GPUs, without one: what a trial would launch is noted and compiled.

All combinations of types and options for the oldest and the newest, one for those between. Prints a line
"kernel sm_NN bytes of machine code" for each.
"""

import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from llava.pruning import kernels
from llava.pruning.kernels import trial

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
TYPES = {torch.float32: "*fp32", torch.int64: "*i64", torch.int32: "*i32", torch.bool: "*i1"}
OPTIONS = ("num_warps", "enable_fp_fusion")


def type_of(value):
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def launches():
    """Kernel, signature, constants and compiler options of every launch, each once."""
    found = {}

    def note(kernel, *values, grid, warmup, **named):
        options = {name: named.pop(name) for name in OPTIONS}
        given = dict(zip(kernel.arg_names, values, strict=False)) | named
        fixed = {p.name for p in kernel.params if p.is_constexpr}
        signature = {name: "constexpr" if name in fixed else type_of(given[name]) for name in kernel.arg_names}
        constants = {name: given[name] for name in kernel.arg_names if name in fixed}
        found[repr((kernel.fn.__name__, signature, constants, options))] = (kernel, signature, constants, options)

    JITFunction.run = note
    with kernels.forced(True):
        for compute in trial.computations(torch.device("cpu")).values():
            compute()
    return found.values()


def main():
    seen = set()
    for kernel, signature, constants, options in launches():
        for architecture in (ARCHITECTURES[0], ARCHITECTURES[-1]) if kernel in seen else ARCHITECTURES:
            source = ASTSource(kernel, signature, constexprs=constants)
            compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
            print(kernel.fn.__name__, f"sm_{architecture}", len(compiled.asm["cubin"]))
        seen.add(kernel)
    return 0


if __name__ == "__main__":
    sys.exit(main())
