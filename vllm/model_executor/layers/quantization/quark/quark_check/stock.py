# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""How a release of vLLM, without the fork, reads a Quark config for a layer.

Told from the sources of the releases that releases.toml names, and compared with their
own QuarkConfig where their wheels are at hand. Needs Python alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from .architectures import Asked, Renames
from .opened import read_key_value_cache
from .releases import Row
from .rules import Config, matches


@dataclass(frozen=True)
class Decision:
    """What a release makes of a layer: `config` of its scheme, None for floats;
    `refusal` where it ends with an error."""

    config: Config | None = None
    refusal: str = ""


_OVERRIDES = "layer_quant_config"


def _names(value: object) -> list[str]:
    """An entry of the config that may be a list of names, or null."""
    return (
        [each for each in value if isinstance(each, str)]
        if (isinstance(value, list))
        else []
    )


class StockConfig:
    """A quantization_config as the releases of a row read it. `mappers`: the model's
    renamings."""

    def __init__(
        self, config: Config, row: Row, mappers: Sequence[Renames] = ()
    ) -> None:
        self._row = row
        read, self.refusal = read_key_value_cache(config)
        # After as many renamings as were made when a layer asks.
        self._renamed: list[Mapping[str, Any]] = [read]
        for mapper in mappers:
            self._renamed.append(_apply(mapper, self._renamed[-1]))

    def decide(self, asked: Asked) -> Decision:
        config = self._renamed[min(asked.mappers, len(self._renamed) - 1)]
        parent, _, last = asked.prefix.rpartition(".")
        names = [asked.prefix]
        if asked.packed is not None:
            names = [asked.prefix.replace(last, each) for each in asked.packed]
        exclude = _names(config.get("exclude"))
        by_expert = self._row.has("expert-names")
        if asked.kind == "experts" and by_expert and _names_part(asked.prefix, exclude):
            return Decision()
        ignored = {_is_ignored(name, exclude) for name in names}
        if self._row.has("own-fused-names") and _is_ignored(asked.prefix, exclude):
            ignored = {True}
        if len(ignored) > 1:
            return Decision(refusal="some shards of a fused layer are excluded")
        if ignored == {True}:
            if asked.kind == "experts" and not by_expert:
                return Decision(refusal="excluded experts are taken for a linear layer")
            return Decision()
        found = [_find(name, config) for name in names]
        if any(each != found[0] for each in found):
            return Decision(refusal="shards of a fused layer have different schemes")
        return Decision(found[0])


def _apply(mapper: Renames, config: Mapping[str, Any]) -> dict[str, Any]:
    renamed: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, list):
            renamed[key] = mapper.apply_list(_names(value))
        elif isinstance(value, dict):
            renamed[key] = mapper.apply_dict(value)
        else:
            renamed[key] = value
    return renamed


def _is_ignored(name: str, exclude: Sequence[str]) -> bool:
    """Full names, and expressions after re:, of vLLM's own names."""
    return name in exclude or any(
        entry.startswith("re:") and matches(name, entry) for entry in exclude
    )


def _names_part(prefix: str, exclude: Sequence[str]) -> bool:
    """Whether an entry is the layer's name or one of a module in it: a glob, too, that
    begins so."""
    return any(each == prefix or each.startswith(f"{prefix}.") for each in exclude)


def _find(name: str, config: Mapping[str, Any]) -> Config:
    for entry, layer in (config.get(_OVERRIDES) or {}).items():
        # A name without a star is looked for in the entry, not the other way around.
        if fnmatch(name, entry) if "*" in entry else name in entry:
            return layer
    return config["global_quant_config"]
