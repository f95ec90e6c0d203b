# SPDX-License-Identifier: Apache-2.0
"""What will happen to a Quark INT8 checkpoint, told from its files.

plan.py says what vLLM does with every module, releases.py what each release of vLLM
makes of the checkpoint, report.py writes it down, hub.py fetches headers instead of
weights, deep.py reads the tensors, rewrite.py writes another checkpoint. The command is
vllm/entrypoints/cli/quark_check.py.
"""
