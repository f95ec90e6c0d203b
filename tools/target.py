# SPDX-License-Identifier: Apache-2.0
"""Which device to build for: VLLM_TARGET_DEVICE, else what is installed here."""

import os
import runpy
import shutil
import sysconfig
from importlib.metadata import distributions

from tools.errors import ForkError
from tools.upstream import TARGETS


def target_device() -> tuple[str, str]:
    """Return the target and the reason for it. Raises ForkError."""
    if target := os.environ.get("VLLM_TARGET_DEVICE"):
        if target not in TARGETS:
            raise ForkError(
                f"VLLM_TARGET_DEVICE={target!r} is not supported. Expected one of "
                f"{', '.join(TARGETS)}."
            )
        return target, "VLLM_TARGET_DEVICE"
    if (target := _target_of_torch()) is not None:
        return target, "the installed torch"
    for program, target in (("nvidia-smi", "cuda"), ("rocm-smi", "rocm")):
        if shutil.which(program):
            return target, f"{program} is here"
    return "cpu", "no torch, nvidia-smi or rocm-smi is here"


def site_folders() -> list[str]:
    """Where this Python's packages are, seen from pip's isolated builds too."""
    return [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]


def _target_of_torch() -> str | None:
    """Read torch's version.py rather than import torch: pip's isolated builds hide
    the environment's packages from import, and importing takes seconds."""
    for dist in distributions(name="torch", path=site_folders()):
        version = runpy.run_path(str(dist.locate_file("torch/version.py")))
        if version.get("hip"):
            return "rocm"
        return "cuda" if version.get("cuda") else "cpu"
    return None
