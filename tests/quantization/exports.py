# SPDX-License-Identifier: Apache-2.0
"""Quark's exports of the small Step-3.5, to be changed and loaded in this process."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FIXTURES = Path(__file__).parents[1] / "fixtures/step3p5-tiny"
STACKED, PER_EXPERT = "int8-3key", "int8-per-expert"


class Export:
    """An export in memory: edit `tensors` and `config`, then `write` it.

    tensors: as in the files; config: config.json.
    """

    def __init__(self, name: str) -> None:
        self.tensors: dict[str, Tensor] = {}
        for file in sorted((FIXTURES / name).glob("*.safetensors")):
            self.tensors |= load_file(file)
        self.config: dict[str, Any] = json.loads(
            (FIXTURES / name / "config.json").read_text()
        )

    @property
    def quark(self) -> dict[str, Any]:
        return self.config["quantization_config"]

    def rename(self, old: str, new: str) -> None:
        self.tensors[new] = self.tensors.pop(old)

    def write(self, folder: Path, num_shards: int = 1) -> Path:
        """Write config.json and the tensors; with an index where they are split."""
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        if num_shards == 1:
            save_file(self.tensors, folder / "model.safetensors")
            return folder
        weight_map: dict[str, str] = {}
        for shard in range(num_shards):
            name = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
            names = sorted(self.tensors)[shard::num_shards]
            save_file({each: self.tensors[each] for each in names}, folder / name)
            weight_map |= dict.fromkeys(names, name)
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder


def load_model(
    folder: Path, is_checked: bool = True, enable_expert_parallel: bool = False
) -> nn.Module:
    """Build and load the model as a worker of the engine does, without an engine.

    Without `is_checked`, what is judged before the model is built is left out.
    """
    from vllm.config import (
        LoadConfig,
        ModelConfig,
        ParallelConfig,
        VllmConfig,
        set_current_vllm_config,
    )
    from vllm.model_executor.layers.quantization.quark.load_checks import files
    from vllm.model_executor.model_loader import get_model_loader

    model_config = ModelConfig(
        model=str(folder), skip_tokenizer_init=True, dtype="bfloat16"
    )
    check_model = files.check_model
    if not is_checked:
        files.check_model = lambda *arguments: None
    try:
        vllm_config = VllmConfig(
            model_config=model_config,
            load_config=LoadConfig(),
            parallel_config=ParallelConfig(
                enable_expert_parallel=enable_expert_parallel
            ),
        )
    finally:
        files.check_model = check_model
    with set_current_vllm_config(vllm_config):
        loader = get_model_loader(vllm_config.load_config)
        return loader.load_model(vllm_config, model_config)
