# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What is asked about one export while its model is built, and what was found."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from vllm import envs
from vllm.config import ModelConfig, get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.quark_int8_compat import (
    ExpertsLayer,
)
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.quark.load_checks.model import (
    count_problem,
)
from vllm.model_executor.layers.quantization.quark.quark_check.checkpoint import (
    read_checkpoint,
)
from vllm.model_executor.layers.quantization.quark.quark_check.export import (
    Export,
    Layer,
    Mapper,
)
from vllm.model_executor.layers.quantization.quark.quark_check.problems import (
    KINDS,
    Problem,
)
from vllm.model_executor.layers.quantization.quark.quark_check.rules import (
    Config,
    has_int8,
)

logger = init_logger(__name__)

# Names that a message shows of many.
_NUM_SHOWN = 3


class Checks:
    """What is asked about one export, and what was found so far.

    model: a folder, or a name on a hub, as the engine was given it; config: the
    quantization_config as the file has it. Travels to worker processes, each of which
    reads the headers when it is first asked.
    """

    def __init__(self, model: str, revision: str | None, config: Config) -> None:
        self.model, self.revision, self.config = model, revision, config
        self.problems: list[Problem] = []
        self._export: Export | None = None
        self._is_read = False
        self._mappers: list[Mapper] = []
        self._num_seen = 0

    def __getstate__(self) -> dict[str, Any]:
        kept = self.__dict__ | {"_export": None, "_is_read": False, "_num_seen": 0}
        return kept | {"problems": []}

    @property
    def export(self) -> Export | None:
        """The files' tensors beside the config; None where there are no safetensors."""
        if not self._is_read:
            self._is_read = True
            folder = self._folder()
            tensors = read_checkpoint(folder) if folder is not None else {}
            if tensors:
                self._export = Export(tensors, self.config)
                for mapper in self._mappers:
                    self._export.rename(mapper)
        return self._export

    def _folder(self) -> Path | None:
        """Where the files are. A model of a hub is downloaded now, as it would be when
        its weights are loaded."""
        from vllm.model_executor.model_loader import get_model_loader
        from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

        if Path(self.model).is_dir():
            return Path(self.model)
        loader = get_model_loader(get_current_vllm_config().load_config)
        if not isinstance(loader, DefaultModelLoader):
            return None
        try:
            found = loader._prepare_weights(self.model, None, self.revision, True, None)
        except (OSError, RuntimeError):  # the loader will say what is wrong
            self._is_read = False
            return None
        return Path(found[0])

    def rename(self, mapper: Mapper) -> None:
        """Follow a model that renames the modules of its checkpoint."""
        self._mappers.append(mapper)
        if self._export is not None:
            self._export.rename(mapper)

    def layer(
        self, layer: nn.Module, prefix: str, packed: Mapping[str, Sequence[str]]
    ) -> Layer | None:
        """What the files hold for a layer that is being built; None for nothing that
        is known. Raises CheckpointError for what would be read wrong."""
        if self.export is None:
            return None
        if isinstance(layer, ExpertsLayer):
            is_new = self.export.asked(prefix) is None
            found = self.export.experts(prefix)
            if is_new and found is not None:
                problem = count_problem(prefix, layer, found)
                if problem is not None:
                    self.report(problem)
        elif isinstance(layer, LinearBase):
            found = self.export.linear(prefix, packed)
        else:
            return None
        new = self.export.problems[self._num_seen :]
        self._num_seen += len(new)
        for problem in new:
            self.report(problem)
        return found

    def asked(self, prefix: str) -> Layer | None:
        """What `layer` answered for that name; None where nobody asked."""
        return None if self._export is None else self._export.asked(prefix)

    def report(self, problem: Problem) -> None:
        """Raise an error, or keep it and a warning for the log."""
        is_error = problem.kind.severity == "error"
        if is_error and envs.VLLM_QUARK_INT8_CHECKS == "error":
            raise problem.error
        self.problems.append(problem)

    def log(self) -> None:
        """Say once what was found of each kind."""
        by_kind: dict[str, list[Problem]] = defaultdict(list)
        for problem in self.problems:
            by_kind[problem.id].append(problem)
        for id, problems in by_kind.items():
            logger.warning_once(_in_words(id, problems))
        self.problems = []


def _in_words(id: str, problems: Sequence[Problem]) -> str:
    """One warning about all problems of a kind."""
    kind = KINDS[id]
    names = list(dict.fromkeys(problem.name for problem in problems))
    more = f" and {len(names) - _NUM_SHOWN} more" if len(names) > _NUM_SHOWN else ""
    seen = f"{', '.join(names[:_NUM_SHOWN])}{more}"
    if kind.severity == "warning":
        return f"Quark INT8: {kind.summary} ({id}): {seen}. {kind.why}"
    return (
        f"Quark INT8: ANSWERS WILL BE WRONG: {problems[0].error}. {kind.why} "
        f"({id}: {seen}; VLLM_QUARK_INT8_CHECKS=warn lets it pass)"
    )


def checks_of(model: nn.Module, model_config: ModelConfig) -> Checks | None:
    """Those that the layers of the model asked while they were built."""
    for module in model.modules():
        quant_config = getattr(module, "quant_config", None)
        if (checks := getattr(quant_config, "checks", None)) is not None:
            return checks
    config = _quantization_config(model_config)
    if not has_int8(config):
        return None
    checks = Checks(model_config.model, model_config.revision, config)
    if (mapper := getattr(model, "hf_to_vllm_mapper", None)) is not None:
        checks.rename(mapper)
    packed = getattr(model, "packed_modules_mapping", None) or {}
    for name, module in model.named_modules():
        if isinstance(module, ExpertsLayer):
            # Newer releases hold it in a runner, by whose name it asks.
            name = getattr(module, "layer_name", name)
        checks.layer(module, name, packed)
    return checks


def _quantization_config(model_config: ModelConfig) -> Config:
    config = getattr(model_config.hf_config, "quantization_config", None)
    text = getattr(model_config.hf_config, "text_config", None)
    return config or getattr(text, "quantization_config", None) or {}
