# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""INT8 (W8A8) experts in Triton, and for many tokens on Hopper in Gluon.

experts.py          the class that vLLM's oracle chooses, and what it serves
layer.py            the layer: its tensors, checks, and the choice of a path
few_tokens.py       the path for a few tokens, kernels in few_kernels.py
many_tokens.py      the path for many, in sort_kernels.py, product_kernels.py and
                    hopper_kernels.py
tiles.py            how the products are cut, by device and shape
common_kernels.py   pieces that kernels share
"""
