# SPDX-License-Identifier: Apache-2.0
"""Triton's launches compiled for an AMD GPU and run in the machine on CPU tensors.

Triton itself says how its HIP runtime specializes a kernel on its arguments; tensors of
2 GiB or more, which lack `tt.pointer_range`, can be had of small ones.
"""

import ctypes
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from tests.kernels.amdgcn.code import Kernel, parse_kernel
from tests.kernels.amdgcn.machine import Machine, Options, Statistics


@dataclass
class Launcher:
    """Takes the place of `JITFunction.run`."""

    arch: str = "gfx942"
    # Whether the compiler is told that offsets fit into 32 bits, as the runtime does
    # for tensors below 2 GiB: then it uses instructions for buffers.
    pointer_range: bool = True
    options: Options = field(default_factory=Options)
    # Called with each launch's kernel: what it returns is run.
    change: Callable[[Kernel], Kernel] | None = None
    kernels: dict[str, Kernel] = field(default_factory=dict)
    machines: dict[int, Machine] = field(default_factory=dict)
    statistics: list[tuple[Kernel, Statistics]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.target = GPUTarget("hip", self.arch, 64)
        self.backend = make_backend(self.target)
        self.binders: dict[int, Callable] = {}

    def compile(self, function: JITFunction, args: tuple, kwargs: dict) -> tuple:
        """The kernel, and what its arguments are bound to."""
        if "OPERAND" in kwargs:
            # The router asks whether its tensors are on a GPU.
            kwargs["OPERAND"] = tl.bfloat16
        binder = self.binders.get(id(function))
        if binder is None:
            binder = self.binders[id(function)] = create_function_from_signature(
                function.signature, function.params, self.backend
            )
        bound, specialization, options = binder(*args, debug=False, **kwargs)
        if not self.pointer_range:
            specialization = [
                (kind, value.replace("S", "") if kind.startswith("*") else value)
                for kind, value in specialization
            ]
        key = f"{function.fn.__name__} {specialization} {options}"
        if key not in self.kernels:
            options, signature, constants, attributes = function._pack_args(
                self.backend, kwargs, bound, specialization, options
            )
            source = ASTSource(function, signature, constants, attributes)
            compiled = compile(source, target=self.target, options=options.__dict__)
            metadata = compiled.metadata
            self.kernels[key] = parse_kernel(
                compiled.asm["amdgcn"], metadata.num_warps, metadata.shared
            )
        kinds = [kind for kind, _ in specialization]
        return self.kernels[key], list(zip(bound.values(), kinds, strict=True))

    def run(
        self, function: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any
    ) -> None:
        kernel, arguments = self.compile(function, args, kwargs)
        packed = [
            pack_argument(f"argument {i} of {kernel.name}", value, kind)
            for i, (value, kind) in enumerate(arguments)
            if kind != "constexpr"
        ]
        machine = self.machines.get(id(kernel))
        if machine is None:
            changed = self.change(kernel) if self.change else kernel
            machine = self.machines[id(kernel)] = Machine(changed, self.options)
        self.statistics.append((kernel, machine.launch(tuple(grid), packed)))


def octets_of(tensor: torch.Tensor) -> np.ndarray:
    """The bytes from a tensor's first number to its last."""
    spans = zip(tensor.shape, tensor.stride(), strict=True)
    count = sum((size - 1) * stride for size, stride in spans) + 1
    count = count * tensor.element_size() if tensor.numel() else 0
    kind = ctypes.c_uint8 * count
    return np.ctypeslib.as_array(kind.from_address(tensor.data_ptr() or 1))


def pack_argument(name: str, value: Any, kind: str) -> bytes | np.ndarray:
    if isinstance(value, torch.Tensor):
        return octets_of(value)
    formats = {"i32": "<i", "i64": "<q", "u64": "<Q", "fp32": "<f"}
    if kind not in formats:
        raise NotImplementedError(
            f"{name} is a {kind}, which the machine does not know"
        )
    return struct.pack(formats[kind], value)
