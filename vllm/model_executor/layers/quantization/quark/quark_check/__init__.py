# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What will happen to a Quark INT8 checkpoint, told from its files.

Pure Python: nothing here imports vLLM, and modules import each other relatively. So the
folder runs as it stands, beside any vLLM or none, and wherever it is copied to:

    python vllm/model_executor/layers/quantization/quark/quark_check MODEL
    python -m vllm.model_executor.layers.quantization.quark.quark_check MODEL

That is why what the engine's checks (load_checks) and vLLM's QuarkConfig judge by lies
here as well, and not beside: what is refused and what is foretold are told by one code.

- For the engine, too: rules.py, whom a config quantizes, which needs no other module;
  checkpoint.py, config.py and weights.py, what the files hold and whether it fits
  together; export.py, what they hold for a layer; problems.py, the kinds of problems;
  layout.py, what config.json counts.
- What is known: architectures.py and stock.py, of vLLM's models and releases;
  dry_run.py asks the installed one; releases.py has the facts; known.py, of a
  checkpoint that opened.py opened.
- What is said: plan.py, what vLLM does with every module; issues, what is wrong with
  that; verdicts.py, which vLLM answers right; report.py writes it down.
- Bounds: hub.py fetches headers instead of weights, limits.py bounds what a stranger's
  files may take.
- More: deep reads the tensors (stored.py); fix writes another checkpoint.

cli.py has the arguments and run.py puts all together. `vllm quark-check` is
vllm/entrypoints/cli/quark_check.py.
"""
