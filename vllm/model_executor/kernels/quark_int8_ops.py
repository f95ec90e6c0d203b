# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The namespace of the fork's operators: `torch.ops.quark_int8`.

Each is registered by the module that holds it, which whoever calls it imports at the
top: a process that finds its graph in torch.compile's cache runs no Python of the
model's forward, and needs the operator all the same.
"""

from collections.abc import Callable
from typing import Any

from torch.library import Library
from vllm.utils.torch_utils import direct_register_custom_op

# Operators live as long as this.
_LIBRARY = Library("quark_int8", "FRAGMENT")


def register_op(op_name: str, op_func: Callable, **options: Any) -> None:
    """`direct_register_custom_op` as `torch.ops.quark_int8.<op_name>`."""
    direct_register_custom_op(op_name, op_func, target_lib=_LIBRARY, **options)
