# SPDX-License-Identifier: Apache-2.0
"""Let vLLM take this machine for one with an MI300X.

    python -m pytest -p tests.platforms.faked_rocm ...

What ROCm's driver would be asked is answered here, tensors lie on the CPU, and Triton
kernels run in Triton's interpreter: the platform's branches are taken, its compiled
kernels are not there.
"""

import sys
from types import ModuleType

ASIC = {"target_graphics_version": "gfx942", "device_id": "0x74a1"}


def _fake_driver() -> None:
    amdsmi = ModuleType("amdsmi")
    answers = {
        "amdsmi_init": None,
        "amdsmi_shut_down": None,
        "amdsmi_get_processor_handles": ["gpu"],
        "amdsmi_get_gpu_asic_info": ASIC,
        "amdsmi_get_gpu_device_uuid": "0",
        "amdsmi_topo_get_link_type": None,
        "amdsmi_topo_get_numa_node_number": 0,
    }
    for name, answer in answers.items():
        setattr(amdsmi, name, lambda *_, answer=answer: answer)
    amdsmi.AmdSmiException = RuntimeError  # type: ignore[attr-defined]
    sys.modules["amdsmi"] = amdsmi


_fake_driver()

from vllm import platforms  # noqa: E402
from vllm.platforms.rocm import RocmPlatform  # noqa: E402

RocmPlatform.device_type = "cpu"
RocmPlatform.dist_backend = "gloo"
platforms._current_platform = RocmPlatform()
