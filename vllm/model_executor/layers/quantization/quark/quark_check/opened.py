# SPDX-License-Identifier: Apache-2.0
"""A checkpoint as its config, index and headers show it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm.model_executor.layers.quantization.quark.checkpoint import (
    INDEX,
    Files,
    LocalFiles,
    TensorInfo,
    misfit,
    read_checkpoint,
    read_json,
)
from vllm.model_executor.layers.quantization.quark.export import Export, check_config
from vllm.model_executor.layers.quantization.quark.layout import first_value
from vllm.model_executor.layers.quantization.quark.rules import Config, has_int8

CONFIG = "config.json"
# Weights in formats of other programs.
_OTHERS = (".bin", ".pt", ".pth", ".gguf")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as its config, index and headers show it.

    export is None where no INT8 of Quark's is asked for; problem says why not where
    the quantization_config is one that vLLM cannot read. keys_twice: the keys that
    config.json has more than once.
    """

    name: str
    tensors: Mapping[str, TensorInfo]
    model: Mapping[str, Any]
    export: Export | None
    problem: ValueError | None = None
    has_keys_twice: bool = False

    @property
    def architecture(self) -> str:
        names = self.model.get("architectures")
        first = names[0] if isinstance(names, list) and names else None
        return first if isinstance(first, str) else "unknown architecture"

    @property
    def num_bytes(self) -> int:
        return sum(tensor.end - tensor.start for tensor in self.tensors.values())

    @property
    def num_files(self) -> int:
        return len({tensor.file for tensor in self.tensors.values()})


def quantization_config(model: Mapping[str, Any]) -> Config | None:
    """The quantization_config of a config.json, or of its text_config."""
    found = first_value(model, "quantization_config")
    return found if isinstance(found, dict) else None


def open_checkpoint(folder: Path, files: Files | None = None) -> Checkpoint:
    """Read config.json, the index and the headers. Raises CheckpointError."""
    files = files or LocalFiles(folder)
    try:
        names = files.sizes()
    except OSError as error:
        remedy = "give the folder of a checkpoint, or owner/name on Hugging Face"
        raise misfit(folder, "a readable folder", str(error), remedy) from None
    if CONFIG not in names:
        remedy = "give the folder of a checkpoint as Hugging Face has it"
        raise misfit(folder, f"{CONFIG} in it", "none", remedy)
    # transformers takes the last of two keys of one name.
    model = read_json(folder / CONFIG, "the config", files, unique=False)
    try:
        read_json(folder / CONFIG, "the config", files)
        has_keys_twice = False
    except ValueError:
        has_keys_twice = True
    tensors = read_checkpoint(folder, files)
    if not tensors:
        other = min((name for name in names if name.endswith(_OTHERS)), default=None)
        if other is not None:
            expected, found = "weights in safetensors", f"{other}: not looked into"
            remedy = "vLLM may read it; export as safetensors to have it looked into"
            raise misfit(folder, expected, found, remedy)
        expected = f"{INDEX} or *.safetensors in it"
        raise misfit(folder, expected, "neither", "download the weights as well")
    name = folder.resolve().name if isinstance(files, LocalFiles) else str(folder)
    config = quantization_config(model)
    if config is None or config.get("quant_method") != "quark":
        return Checkpoint(name, tensors, model, None, None, has_keys_twice)
    try:
        check_config(config)
        export = Export(tensors, config) if has_int8(config) else None
    except ValueError as error:
        return Checkpoint(name, tensors, model, None, error, has_keys_twice)
    return Checkpoint(name, tensors, model, export, None, has_keys_twice)
