# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A checkpoint as its config, index and headers show it."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from .checkpoint import (
    INDEX,
    Files,
    LocalFiles,
    TensorInfo,
    misfit,
    read_checkpoint,
    read_json,
)
from .config import check_config
from .export import Export
from .layout import first_value
from .rules import Config, has_int8

CONFIG = "config.json"
# Weights in formats of other programs.
_OTHERS = (".bin", ".pt", ".pth", ".gguf")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as its config, index and headers show it.

    export is None where no INT8 of Quark's is asked for; problem says why not where
    the quantization_config is one that vLLM cannot read; has_keys_twice says whether
    config.json has a key more than once.
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


def read_key_value_cache(config: Config) -> tuple[dict[str, Any], str]:
    """The config as vLLM reads it: the scheme of a quantized key/value cache is taken
    out of those of its layers. And why a release refuses it, "" for not at all."""
    read = copy.deepcopy(dict(config))
    export = read.get("export")
    group = export.get("kv_cache_group") if isinstance(export, dict) else None
    if not isinstance(group, list):
        # Releases ask for its length.
        return read, "export.kv_cache_group is no list"
    overrides = read.get("layer_quant_config")
    if not group or not isinstance(overrides, dict):
        return read, "no layer_quant_config for kv_cache_group" if group else ""
    names = [each for each in group if isinstance(each, str)]
    found = [
        layer
        for name, layer in overrides.items()
        if any(fnmatchcase(name, pattern) for pattern in names)
    ]
    if isinstance(queries := overrides.get("*q_proj"), dict):
        found.append(queries)
    for layer in found:
        if isinstance(layer, dict):
            layer["output_tensors"] = None
    return read, "" if found else "no layer_quant_config for kv_cache_group"


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
        read, _ = read_key_value_cache(config)
        export = Export(tensors, read) if has_int8(config) else None
    except ValueError as error:
        return Checkpoint(name, tensors, model, None, error, has_keys_twice)
    return Checkpoint(name, tensors, model, export, None, has_keys_twice)
