# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What the numbers of a Quark INT8 checkpoint say: `vllm quark-check --deep`.

Reads every tensor once, a few MiB at a time. Looks for what is certainly wrong (NaN,
infinity, scales of zero or below, zero points that kernels ignore: faults.py), for what
is worth a look (saturated rows, a norm far from its neighbours': outliers.py), and
compares the dequantized weights (measure.py) with a float checkpoint's where one is
given (reference.py). find.py puts them together; plot.py draws the errors.
"""
