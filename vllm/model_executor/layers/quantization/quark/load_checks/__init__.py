# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""No silence while a Quark INT8 checkpoint is loaded.

Three times something is asked.

- files.py, while vLLM reads the config: are the files whole, and is the config one that
  can be read?
- checks.py, while the model is built: what do the files hold for this layer?
  model.py, once it is built: do their shapes fit its layers, are scales finite and
  above zero?
- loading.py, while weights are loaded: is every tensor taken by a parameter of its
  kind, is every parameter filled? watch.py sees the writes.

What would make an answer wrong ends in a CheckpointError that names the tensor, what
was expected, what was found and a remedy; with VLLM_QUARK_INT8_CHECKS=warn it is logged
instead. What cannot change an answer is logged once. Checkpoints without INT8 weights
are left as upstream has them. What is judged without torch, by `vllm quark-check` as
well, is in quark_check.
"""
