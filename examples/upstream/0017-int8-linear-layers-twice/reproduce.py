# SPDX-License-Identifier: Apache-2.0
"""Weights of a Quark INT8 linear layer that are loaded a second time.

    python reproduce.py

vLLM does so after a sleep at level 2 and in `reload_weights`. Exits with 1 where it
fails with Triton's kernel, which ROCm has. A few seconds on a CPU, where that kernel
prepares its weights as on a GPU; nothing is downloaded.
"""

import os
import sys
import tempfile

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.model_executor.kernels.linear.scaled_mm.triton import (
    TritonInt8ScaledMMLinearKernel,
)
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.quantization.quark.quark import QuarkConfig
from vllm.model_executor.model_loader.reload.layerwise import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)

WEIGHT = {"dtype": "int8", "qscheme": "per_channel", "ch_axis": 0, "symmetric": True}
CONFIG = {
    "quant_method": "quark",
    "export": {"kv_cache_group": [], "pack_method": "reorder"},
    "global_quant_config": {
        "weight": {**WEIGHT, "is_dynamic": False},
        "input_tensors": {**WEIGHT, "ch_axis": 1, "is_dynamic": True},
    },
    "layer_quant_config": {},
    "layer_type_quant_config": {},
    "exclude": [],
}


class Kernel(TritonInt8ScaledMMLinearKernel):
    @classmethod
    def is_supported(cls, compute_capability: int | None = None):
        return True, None  # it multiplies on GPUs, but prepares weights anywhere


def load(layer: torch.nn.Module, value: int) -> None:
    for name, tensor in (
        ("weight", torch.full((64, 64), value, dtype=torch.int8)),
        ("weight_scale", torch.full((64,), value / 128)),
    ):
        param = getattr(layer, name)
        param.weight_loader(param, tensor)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{folder}/rank", 0, "gloo")
        initialize_model_parallel(1, 1)
        config = QuarkConfig.from_config(CONFIG)
        layer = ReplicatedLinear(64, 64, bias=False, quant_config=config, prefix="fc")
        of_cpu = layer.scheme.kernel
        names = of_cpu.layer_param_names
        layer.scheme.kernel = Kernel(of_cpu.config, names)
        record_metadata_for_reloading(layer)
        load(layer, 1)
        layer.quant_method.process_weights_after_loading(layer)
        initialize_layerwise_reload(layer)
        try:
            load(layer, 2)
            finalize_layerwise_reload(layer, None)
        except KeyError as error:
            sys.exit(
                f"INT8 linear layer: expected to load a second time, found {error!r}"
            )
    assert (layer.weight == 2).all() and (layer.weight_scale == 2 / 128).all()
    print("INT8 linear layer: loaded a second time")


if __name__ == "__main__":
    main()
