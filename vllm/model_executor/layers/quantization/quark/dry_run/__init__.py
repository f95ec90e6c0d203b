# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a vLLM's own model makes of a checkpoint's tensors, without their bytes.

    python -m vllm.model_executor.layers.quantization.quark.dry_run < QUESTIONS

QUESTIONS is a JSON list of objects: `folder`, where config.json lies, and `tensors`,
name -> [dtype, shape, file]. The model is built on torch's meta device, where tensors
have no memory, and its own `load_weights` is given tensors that have a dtype and a
shape alone (given.py). It is done twice.

- For the structure: a Recorder (recorder.py) takes the place of the quantization
  config, notes what each layer asks of it and leaves all of them unquantized. So it
  does not matter what is wrong with the quantization.
- As the engine does it, with the checkpoint's own quantization config, and in the fork
  with the engine's checks, whose problems are collected (engine_checks.py).

What is written, a JSON list, says which module takes which tensor, what it asks, how
it is quantized, and how far the model got. The vLLM may be a release without the fork:
then `python <this folder>`. It is meant to be a process of its own, with bounds on time
and memory, without network and without code of the checkpoint: quark_check/dry_run.py,
which needs neither torch nor vLLM, starts it so and reads what it writes.
"""
