# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What is wrong with a checkpoint, and what comes of it on which vLLM.

Of this fork the engine's own checks decide, or the same told from what is known of the
model (fork.py); of releases it is told from their models and their way to read a config
(releases.py, scales.py). What is not known is said so (unknown.py). find.py puts them
together.
"""
