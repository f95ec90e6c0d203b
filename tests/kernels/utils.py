# SPDX-License-Identifier: Apache-2.0
"""Where tests of Triton kernels run: on a GPU if there is one, else on the CPU in
Triton's interpreter, or in the machine of tests/kernels/amdgcn."""

import os

import pytest
import torch

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
MACHINE = os.environ.get("AMDGCN_MACHINE") == "1"
interpreted = pytest.mark.skipif(
    not GPU and not MACHINE and os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs a GPU, or TRITON_INTERPRET=1 in the environment",
)
