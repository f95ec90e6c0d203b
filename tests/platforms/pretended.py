# SPDX-License-Identifier: Apache-2.0
"""Platforms that are not here, for code that only asks which one it is."""

from functools import cache

from vllm.platforms.interface import DeviceCapability, Platform, PlatformEnum


def cuda(major: int, minor: int) -> Platform:
    """A CUDA GPU of this compute capability."""

    class Pretended(Platform):
        _enum = PlatformEnum.CUDA
        device_name = device_type = "cuda"

        # In a cache as upstream's, into which torch.compile cannot look.
        @classmethod
        @cache
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return DeviceCapability(major, minor)

    return Pretended()


def rocm() -> Platform:
    """A GPU of AMD's."""

    class Pretended(Platform):
        _enum = PlatformEnum.ROCM
        device_name, device_type = "rocm", "cuda"

    return Pretended()


def cpu() -> Platform:
    class Pretended(Platform):
        _enum = PlatformEnum.CPU
        device_name = device_type = "cpu"

    return Pretended()
