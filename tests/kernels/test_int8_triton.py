# SPDX-License-Identifier: Apache-2.0
"""What the Triton kernels may ask of a GPU, told by GPUs that need not be here."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.model_executor.kernels.int8_triton import has_dot4, has_pdl


@pytest.mark.parametrize(
    ("is_cuda", "hip", "capability", "dot4", "pdl"),
    [
        (True, None, (9, 0), True, True),
        (True, None, (10, 0), True, True),
        (True, None, (8, 0), True, False),
        (True, "7.0", (9, 4), False, False),
        (False, None, (9, 0), False, False),
    ],
    ids=["H100", "B200", "A100", "MI300", "CPU"],
)
def test_asks_for_what_the_gpu_has(
    is_cuda: bool,
    hip: str | None,
    capability: tuple[int, int],
    dot4: bool,
    pdl: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch calls an AMD GPU cuda, and its gfx94x capability (9, 4)."""
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    x: Any = SimpleNamespace(is_cuda=is_cuda, device="cuda:0")
    assert has_dot4(x) == dot4
    assert has_pdl(x) == pdl
