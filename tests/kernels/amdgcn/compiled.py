# SPDX-License-Identifier: Apache-2.0
"""The launches that are chosen for ROCm, compiled: what `compile_int8` finds, for both
GPUs, without and with what Triton's HIP runtime adds for tensors below 2 GiB.

    python -m tests.kernels.amdgcn.compiled

prints a JSON list of the names of their instructions. Without TRITON_INTERPRET, which
must be 0 when Triton is imported.
"""

import json
from collections.abc import Iterator
from typing import Any

from tests.kernels import compile_int8
from tests.kernels.amdgcn.code import Kernel, parse_kernel

ARCHS = ("gfx942", "gfx950")


def kernels(arch: str, small: bool) -> Iterator[tuple[str, dict[str, Any], Kernel]]:
    """Name and options of each launch, and its kernel; small: below 2 GiB."""
    target, architecture = compile_int8.TARGETS[arch]
    seen = set()
    for kernel, args, options in compile_int8.launches(architecture, has_pdl=False):
        key = f"{kernel.fn.__name__} {options}"
        if key in seen:
            continue
        seen.add(key)
        compiled = compile_int8.compile_launch(
            target, kernel, args, dict(options), small
        )
        metadata = compiled.metadata
        yield (
            kernel.fn.__name__,
            options,
            parse_kernel(compiled.asm["amdgcn"], metadata.num_warps, metadata.shared),
        )


def main() -> None:
    names = {
        inst.name
        for arch in ARCHS
        for small in (False, True)
        for _, _, kernel in kernels(arch, small)
        for inst in kernel.instructions
    }
    print(json.dumps(sorted(names)))


if __name__ == "__main__":
    main()
