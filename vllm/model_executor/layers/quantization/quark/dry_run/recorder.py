# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a model's layers ask of a quantization config."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

# What a layer is to a quantization config, by its bases' names: their modules move
# between releases. The most special base counts.
_KINDS = {
    "FusedMoE": "experts",
    "RoutedExperts": "experts",
    "LinearBase": "linear",
    "ParallelLMHead": "head",
    "VocabParallelEmbedding": "embedding",
    "Attention": "attention",
    "MLAAttention": "attention",
}


def kind_of(module: nn.Module) -> str:
    """The kind of a layer: of `_KINDS`, or "other"."""
    bases = [each.__name__ for each in type(module).__mro__]
    return next((_KINDS[each] for each in bases if each in _KINDS), "other")


class Recorder(QuantizationConfig):
    """Quantizes nothing and notes what it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: dict[int, dict[str, Any]] = {}
        self.mappers: list[dict[str, Any]] = []

    def get_name(self):
        return "quark"

    def get_supported_act_dtypes(self):
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls):
        return 0

    @staticmethod
    def get_config_filenames():
        return []

    @classmethod
    def from_config(cls, config):
        return cls()

    def apply_vllm_mapper(self, hf_to_vllm_mapper):
        found = {}
        for part in ("regex", "substr", "prefix", "suffix"):
            renames = getattr(hf_to_vllm_mapper, f"orig_to_new_{part}", None) or {}
            found[part] = [
                [getattr(old, "pattern", old), new] for old, new in renames.items()
            ]
        self.mappers.append(found)

    def get_quant_method(self, layer, prefix):
        from vllm.model_executor.layers.fused_moe import UnquantizedFusedMoEMethod
        from vllm.model_executor.layers.linear import UnquantizedLinearMethod

        packed = self.packed_modules_mapping.get(prefix.rpartition(".")[2])
        self.asked[id(layer)] = {
            "prefix": prefix,
            "packed": list(packed) if packed else None,
            "mappers": len(self.mappers),
        }
        kind = kind_of(layer)
        if kind == "linear":
            return UnquantizedLinearMethod()
        if kind == "experts":
            return UnquantizedFusedMoEMethod(layer.moe_config)
        return None


def modules_of(model: nn.Module, asked: Mapping[int, Any]) -> dict[str, Any]:
    """What is known of each module that asked, or that has parameters."""
    found = {}
    nothing = {"prefix": None, "packed": None, "mappers": 0}
    for name, module in model.named_modules(remove_duplicate=False):
        parameters = {
            each: list(tensor.shape)
            for each, tensor in module.named_parameters(recurse=False)
        }
        if not parameters and id(module) not in asked:
            continue
        method = getattr(module, "quant_method", None)
        scheme = getattr(module, "scheme", None)
        # Told here, without a module of this fork's: releases are asked too.
        of_experts = getattr(module, "moe_config", None)
        found[name] = {
            **asked.get(id(module), nothing),
            "kind": kind_of(module),
            "class": type(module).__name__,
            "parameters": parameters,
            "experts": getattr(of_experts, "num_logical_experts", None)
            or getattr(module, "global_num_experts", None),
            "method": "" if method is None else type(method).__name__,
            "scheme": "" if scheme is None else type(scheme).__name__,
        }
    return found
