# SPDX-License-Identifier: Apache-2.0
"""The fixtures of vLLM's own tests/conftest.py that the tests beside it use, so that
they run here too: `pytest examples/upstream`."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import (
    cleanup_dist_env_and_memory,
    init_distributed_environment,
    initialize_model_parallel,
)


@pytest.fixture
def default_vllm_config() -> Iterator[None]:
    with set_current_vllm_config(VllmConfig()):
        yield


@pytest.fixture
def dist_init(default_vllm_config: None, tmp_path: Path) -> Iterator[None]:
    init_distributed_environment(1, 0, f"file://{tmp_path}/rank", 0, "gloo")
    initialize_model_parallel(1, 1)
    yield
    cleanup_dist_env_and_memory()
