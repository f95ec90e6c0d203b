# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The engine's checks, where a vLLM has them: what they find is collected."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm.model_executor.layers.quantization import quark
from vllm.model_executor.layers.quantization.quark.dry_run.stand_ins import in_place_of
from vllm.model_executor.layers.quantization.quark.quark_check.checkpoint import (
    TensorInfo,
)

_PROBLEM = ("id", "name", "expected", "found", "remedy", "where")


def has_checks() -> bool:
    """Whether this vLLM has them, and not the folder of this file alone."""
    return Path(quark.__path__[0], "load_checks").is_dir()


@contextmanager
def collected(
    headers: Mapping[str, Any], problems: list[dict[str, str]]
) -> Generator[None, None, None]:
    """The checks note their problems there instead of raising the first, know the
    tensors by HEADERS and do not look at numbers."""
    if not has_checks():
        yield
        return
    from vllm.model_executor.layers.quantization.quark.load_checks import (
        checks,
        files,
        loading,
    )

    tensors = {
        name: TensorInfo(name, dtype, tuple(shape), Path(file), 0, 0)
        for name, (dtype, shape, file) in headers.items()
    }

    def report(self: Any, problem: Any) -> None:
        problems.append({key: getattr(problem, key) for key in _PROBLEM})

    is_harmless = loading.CheckedModel._is_harmless

    def is_harmless_if_there(self: Any, tensor: Any) -> bool:
        try:
            return is_harmless(self, tensor)
        except (OSError, ValueError, RuntimeError):
            return False

    with (
        in_place_of(checks, "read_checkpoint", lambda folder: tensors),
        in_place_of(files, "read_checkpoint", lambda folder: tensors),
        in_place_of(loading, "check_values", lambda *_: None),
        in_place_of(checks.Checks, "report", report),
        in_place_of(loading.CheckedModel, "_is_harmless", is_harmless_if_there),
    ):
        yield
