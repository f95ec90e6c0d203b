# SPDX-License-Identifier: Apache-2.0
"""ask_checkpoints.py for stock vLLM and compressed-tensors checkpoints.

On a GPU it changes nothing. On a CPU stock vLLM has no kernel for INT8 experts in that
format: the kernel alone is taken from the fork (fused_moe/experts/quark_int8_cpu.py).
Stock still reads the config, chooses what is quantized, loads and shapes every tensor,
and has its own linear layers.
"""

import ask_checkpoints  # beside this script
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (  # noqa: E501
    compressed_tensors_moe_w8a8_int8 as stock,
)
from vllm.platforms import current_platform


def main() -> None:
    if current_platform.is_cpu():
        from vllm.model_executor.layers.fused_moe.experts.quark_int8_cpu import (
            Int8CpuExperts,
        )

        stock.select_int8_moe_backend = lambda **config: (None, Int8CpuExperts)
    ask_checkpoints.main()


if __name__ == "__main__":
    main()
