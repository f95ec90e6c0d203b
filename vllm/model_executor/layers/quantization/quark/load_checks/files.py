# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What judges the files and the config of a model: nothing is built yet."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from vllm.config import ModelConfig
from vllm.model_executor.layers.quantization.quark.load_checks.checks import Checks
from vllm.model_executor.layers.quantization.quark.quark_check.checkpoint import (
    CheckpointError,
    read_checkpoint,
)
from vllm.model_executor.layers.quantization.quark.quark_check.config import (
    config_problems,
    number_problems,
)
from vllm.model_executor.layers.quantization.quark.quark_check.problems import (
    EXPORT_AGAIN,
    Problem,
    of_tensor,
)
from vllm.model_executor.layers.quantization.quark.quark_check.rules import (
    Config,
    has_int8,
)
from vllm.model_executor.layers.quantization.quark.quark_check.weights import (
    int8_with_scales,
)
from vllm.platforms import current_platform

if TYPE_CHECKING:
    from vllm.model_executor.layers.quantization.quark.quark import QuarkConfig


def check_model(
    model_config: ModelConfig, quant_config: "QuarkConfig"
) -> Checks | None:
    """Look into the files of a model on disk while vLLM reads its config: nothing is
    started yet. Changes neither config.

    Returns what the layers will ask about an export of INT8, None for another. Raises
    CheckpointError for damaged files.
    """
    config = quant_config.quant_config
    if not has_int8(config):
        return None
    if Path(model_config.model).is_dir():
        read_checkpoint(Path(model_config.model))
    checks = Checks(model_config.model, model_config.revision, config)
    settings = model_config.hf_config.to_dict()
    for problem in (
        *number_problems(settings),
        *config_problems(config),
        *architecture_problems(model_config),
    ):
        checks.report(problem)
    checks.log()
    return checks


def architecture_problems(model_config: ModelConfig) -> list[Problem]:
    """Whether vLLM's own code computes this architecture, where nobody asked for
    other code."""
    if (
        model_config.model_impl != "auto"
        or not model_config.using_transformers_backend()
    ):
        return []
    name = model_config.architectures[0]
    expected, found = "an architecture that this vLLM has", "none of that name"
    folder, media = Path(model_config.model), model_config.multimodal_config
    if media is None or not folder.is_dir():
        return [Problem("architecture-of-transformers", name, expected, found)]
    limits = media.limit_per_prompt.values()
    is_asked = not limits or any(getattr(each, "count", each) for each in limits)
    if is_asked and not any(folder.glob("*processor_config.json")):
        found += ", and no preprocessor_config.json for Transformers' code"
        return [Problem("architecture-missing", name, expected, found)]
    return [Problem("architecture-of-transformers", name, expected, found)]


def without_scheme(prefix: str, config: Config) -> NotImplementedError:
    """The error for a layer whose config asks for what vLLM cannot compute here."""
    parts = []
    for kind in ("weight", "input_tensors", "output_tensors", "bias"):
        part = config.get(kind)
        if isinstance(part, Mapping):
            how = "dynamic" if part.get("is_dynamic") else "static"
            parts.append(f"{kind} {part.get('dtype')} {part.get('qscheme')} {how}")
        elif part:
            parts.append(f"{kind} {part!r:.100}")
    return NotImplementedError(
        f"{prefix}: expected a scheme that vLLM has a kernel for on "
        f"{current_platform.device_type}, found {', '.join(parts)}; {EXPORT_AGAIN} "
        "with another scheme for it, or run it on another device"
    )


def refuse_int8_without_config(folder: Path) -> None:
    """A checkpoint that lost its quantization_config would be read as floats."""
    try:
        tensors = read_checkpoint(folder)
    except CheckpointError:
        return  # not known to be INT8, so left to the loader
    for tensor in int8_with_scales(tensors):
        expected = "a quantization_config in config.json, since it is stored as INT8"
        problem = of_tensor("config-lost", tensor, expected, "none")
        checks = Checks(str(folder), None, {})
        checks.report(problem)
        checks.log()
        return
