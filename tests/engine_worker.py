# SPDX-License-Identifier: Apache-2.0
"""What the tests look at inside each worker of an engine (`--worker-extension-cls`)."""

from types import ModuleType
from typing import Any
from unittest.mock import patch

from triton import JITFunction

from tests.groups import has_group
from tests.moe_layers import plain_name

# What launches the fork's own kernels: of the INT8 MoE, of INT8 linear layers of few
# tokens, of attention's gate with more of them, of its queries and keys.
_LAUNCHES: dict[str, tuple[ModuleType, str]] = {}
_KERNELS: tuple[ModuleType, ...] = ()
if has_group("kernels"):
    from vllm.model_executor.kernels.linear.scaled_mm import int8_few_tokens
    from vllm.model_executor.layers.fused_moe.experts.quark_int8 import (
        experts,
        few_kernels,
        product_kernels,
        sort_kernels,
    )
    from vllm.model_executor.layers.fused_moe.router import triton_router
    from vllm.model_executor.layers.rotary_embedding import qk_norm_rope

    _LAUNCHES = {
        "moe": (experts, "apply_experts"),
        "linear": (int8_few_tokens, "run_int8_linear"),
        "gate": (int8_few_tokens, "run_gate_and_quantize"),
        "heads": (qk_norm_rope, "launch"),
    }
    _KERNELS = (
        sort_kernels,
        product_kernels,
        few_kernels,
        int8_few_tokens,
        triton_router,
        qk_norm_rope,
    )
_runs = {
    what: patch.object(module, name, wraps=getattr(module, name)).start()
    for what, (module, name) in _LAUNCHES.items()
}


def forget() -> None:
    """Count anew: a process may start one engine after the other."""
    for mock in _runs.values():
        mock.reset_mock()


class Watched:
    """Methods that a worker gets; `LLM.collective_rpc` calls them by name."""

    model_runner: Any

    def runs(self) -> dict[str, int]:
        """How often this worker launched each of the fork's own kernels."""
        return {what: mock.call_count for what, mock in _runs.items()}

    def compiled_kernels(self) -> int:
        """How many variants of the fork's Triton kernels it has compiled or loaded."""
        return sum(
            len(cache[0])
            for module in _KERNELS
            for kernel in vars(module).values()
            if isinstance(kernel, JITFunction)
            for cache in kernel.device_caches.values()
        )

    def experts_at(self) -> list[list[int]]:
        """EPLB's physical_to_logical_map, [layers, physical experts]; else empty."""
        state = getattr(self.model_runner, "eplb_state", None)
        if state is None:
            return []
        [model] = state.model_states.values()
        return model.physical_to_logical_map.tolist()

    def parameter(self, name: str) -> list:
        """A parameter's numbers on this worker; of experts by the name where a layer of
        them is one module."""
        model = self.model_runner.get_model()
        names = {plain_name(own): own for own, _ in model.named_parameters()}
        return model.get_parameter(names[name]).tolist()
