# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What is wrong with a config.json and its quantization_config as a whole."""

from collections.abc import Iterator, Mapping
from typing import Any

from .problems import Problem
from .rules import Config, has_int8


def _online_rotation(config: Config) -> str | None:
    """The online rotation that a config's algo_config has, if any: r3, r4 and an online
    r1 turn activations while the model runs; r1 and r2 alone are in the weights."""
    algorithms = config.get("algo_config")
    for each in algorithms if isinstance(algorithms, list) else [algorithms]:
        if isinstance(each, Mapping) and each.get("name") in ("rotation", "quarot"):
            for key in ("online_r1_rotation", "r3", "r4"):
                if each.get(key):
                    return key
    return None


def _is_objects(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(each, dict) for each in value.values()
    )


def check_config(config: Config) -> None:
    """Raise CheckpointError for a quantization_config of INT8 that cannot be read."""
    for problem in config_problems(config):
        if problem.id == "config-unreadable":
            raise problem.error


def config_problems(config: Config) -> Iterator[Problem]:
    """What is wrong with a quantization_config as a whole."""
    scheme = config.get("global_quant_config")
    kinds = ("weight", "input_tensors")
    is_scheme = isinstance(scheme, dict) and all(
        # FP8 with INT4 has a list of two.
        isinstance(scheme.get(kind) or {}, (dict, list))
        for kind in kinds
    )
    if is_scheme and not has_int8(config):
        return
    export = config.get("export")
    is_export = isinstance(export, dict) and (
        _is_names(export.get("kv_cache_group") or [])
    )
    overrides = ("layer_quant_config", "layer_type_quant_config")
    wrong = {
        "global_quant_config": not is_scheme,
        "export": not is_export,
        "exclude": not _is_names(config.get("exclude")),
        **{key: not _is_objects(config.get(key) or {}) for key in overrides},
    }
    for key, is_wrong in wrong.items():
        if is_wrong:
            expected = "a list of names" if key == "exclude" else "an object"
            if key in overrides:
                expected = "an object of objects"
            if key == "export" and isinstance(export, dict):
                key, expected = "export.kv_cache_group", "a list of names or null"
                found: object = export.get("kv_cache_group")
            else:
                found = config.get(key, "nothing")
            yield Problem(
                "config-unreadable",
                f"config.json, quantization_config, {key}",
                expected,
                f"{found!r:.100}",
            )
            return
    if rotation := _online_rotation(config):
        yield Problem(
            "rotation-not-applied",
            "config.json, quantization_config, algo_config",
            "no rotation that is applied while the model runs",
            f"{rotation} true",
        )
    if isinstance(export, dict) and export.get("weight_format") == "fake_quantized":
        yield Problem(
            "fake-quantized",
            "config.json, quantization_config, export.weight_format",
            "real_quantized",
            "'fake_quantized'",
        )


def number_problems(settings: Mapping[str, Any], at: str = "") -> Iterator[Problem]:
    """Whole numbers of config.json that are beyond all that a computer counts with."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from number_problems(value, f"{at}{key}.")
        elif isinstance(value, int) and abs(value) >= 1 << 63:
            name = f"config.json, {at}{key}"
            found = f"one of {value.bit_length()} bits"
            yield Problem("config-unreadable", name, "a number of 64 bits", found)


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)
