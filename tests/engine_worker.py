# SPDX-License-Identifier: Apache-2.0
"""What the tests look at inside each worker of an engine (`--worker-extension-cls`)."""

from typing import Any
from unittest.mock import patch

from vllm.model_executor.layers.fused_moe import int8_moe

_runs = patch.object(
    int8_moe, "run_int8_experts", wraps=int8_moe.run_int8_experts
).start()


def forget() -> None:
    """Count anew: a process may start one engine after the other."""
    _runs.reset_mock()


class Watched:
    """Methods that a worker gets; `LLM.collective_rpc` calls them by name."""

    model_runner: Any

    def int8_moe_runs(self) -> int:
        """How often this worker launched the INT8 MoE's own kernels."""
        return _runs.call_count

    def experts_at(self) -> list[list[int]]:
        """EPLB's physical_to_logical_map, [layers, physical experts]; else empty."""
        state = getattr(self.model_runner, "eplb_state", None)
        if state is None:
            return []
        [model] = state.model_states.values()
        return model.physical_to_logical_map.tolist()

    def parameter(self, name: str) -> list:
        """A parameter's numbers on this worker."""
        return self.model_runner.get_model().get_parameter(name).tolist()
