# SPDX-License-Identifier: Apache-2.0
"""vLLM's process groups for a process that has no engine."""

from pathlib import Path


def start_process_groups(meeting_point: Path) -> None:
    """Start them for this process alone; `meeting_point` is a file that is made."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.platforms import current_platform

    with set_current_vllm_config(VllmConfig()):
        parallel_state.init_distributed_environment(
            world_size=1,
            rank=0,
            distributed_init_method=f"file://{meeting_point}",
            local_rank=0,
            backend=current_platform.dist_backend,
        )
        parallel_state.ensure_model_parallel_initialized(1, 1)
