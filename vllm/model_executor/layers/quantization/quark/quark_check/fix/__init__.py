# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A checkpoint written anew, laid out otherwise: `vllm quark-check --fix`.

relayout.py plans it from headers, of tensors (tensors.py) and a config (new_config.py)
that planned.py describes; rewrite.py writes it and reads it back.
"""
