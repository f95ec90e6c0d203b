# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What will happen to a Quark INT8 checkpoint, told from its files.

plan.py says what vLLM does with every module, issues.py what is wrong with that,
verdicts.py which vLLM answers right, from the facts of releases.py; report.py writes it
down. hub.py fetches headers instead of weights, limits.py bounds what a stranger's
files may take, deep.py and plot.py read the tensors, relayout.py plans another
checkpoint and rewrite.py writes it. run.py puts them together for
vllm/entrypoints/cli/quark_check.py.
"""
