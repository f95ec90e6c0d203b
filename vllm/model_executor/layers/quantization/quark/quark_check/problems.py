# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What can be wrong or odd with a Quark INT8 checkpoint: one registry for the engine,
`vllm quark-check` and docs/design/checks.md.

An error is what would make an answer wrong: the engine refuses it. A warning is what
cannot change an answer: the engine logs it once. Needs Python alone.
"""

from dataclasses import dataclass
from typing import Literal

from .checkpoint import CheckpointError, TensorInfo, misfit

Severity = Literal["error", "warning"]
# What vLLM's releases make of it: garbage, an error of their own, the same as without
# it, or what nobody looked into.
Outcome = Literal["garbage", "refused", "right", "not known"]
EXPORT_AGAIN = "export the checkpoint again"


@dataclass(frozen=True)
class Kind:
    """A kind of problem; `id` is stable and in kebab-case, `stock` what releases make
    of it, `why` what would come of it, `remedy` what to do."""

    id: str
    severity: Severity
    stock: Outcome
    summary: str
    why: str
    remedy: str


_KINDS = (
    # --- what the config says -----------------------------------------------------
    Kind(
        "config-unreadable",
        "error",
        "refused",
        "a quantization_config that vLLM cannot read",
        "Nothing is known of how the weights are quantized.",
        "export the model with amd-quark 0.13, or copy the quantization_config of such "
        "an export",
    ),
    Kind(
        "config-lost",
        "error",
        "garbage",
        "INT8 weights with scales, and no quantization_config",
        "The whole numbers would be read as if they were the weights: garbage.",
        "copy config.json from the export",
    ),
    Kind(
        "architecture-missing",
        "error",
        "refused",
        "an architecture that this vLLM does not have",
        "Transformers' code stands in for it, and lacks what it needs here.",
        "use a vLLM that has it",
    ),
    Kind(
        "architecture-of-transformers",
        "warning",
        "not known",
        "an architecture that this vLLM does not have, computed by Transformers' code",
        "Whether that reads this export right is not known.",
        "use a vLLM that has it",
    ),
    Kind(
        "rotation-not-applied",
        "error",
        "garbage",
        "activations are to be rotated while the model runs",
        "No vLLM rotates them, so weights and activations would not fit together.",
        f"{EXPORT_AGAIN} without online rotation",
    ),
    Kind(
        "fake-quantized",
        "error",
        "not known",
        "weights stored as floats beside the scales that they were rounded with",
        "Such an export is for looking at errors of rounding. vLLM has no way to read "
        "it as INT8.",
        f"{EXPORT_AGAIN} with weight_format real_quantized",
    ),
    Kind(
        "scheme-without-kernel",
        "error",
        "refused",
        "a scheme for which vLLM has no kernel",
        "INT8 kernels take symmetric weights, and activations per token and dynamic, "
        "or per tensor and static.",
        f"{EXPORT_AGAIN} with such a scheme",
    ),
    Kind(
        "experts-differ",
        "error",
        "not known",
        "experts of one layer are treated or stored differently",
        "vLLM fuses a layer's experts, so they have one scheme.",
        f"{EXPORT_AGAIN} with one scheme for all experts of a layer",
    ),
    Kind(
        "shards-differ",
        "error",
        "refused",
        "parts of a layer that vLLM fuses are treated or stored differently",
        "A fused layer has one scheme.",
        f"{EXPORT_AGAIN} with one scheme for all parts of a fused layer, or none",
    ),
    # --- what is stored, beside what the config says ------------------------------
    Kind(
        "int8-excluded",
        "error",
        "garbage",
        "stored as INT8, yet exclude names it",
        "The whole numbers would be read as if they were the weights: garbage.",
        "delete the entry from exclude in config.json, or export again",
    ),
    Kind(
        "int8-unasked",
        "error",
        "not known",
        "stored as INT8, and the config asks for something else",
        "Config and weights are not of one export.",
        f"copy config.json from the export, or {EXPORT_AGAIN}",
    ),
    Kind(
        "head-quantized",
        "error",
        "refused",
        "the output layer or the embedding is stored as INT8",
        "vLLM keeps these in the model's dtype, and has no place for their scales.",
        f"{EXPORT_AGAIN} with them in exclude",
    ),
    Kind(
        "weight-missing",
        "error",
        "garbage",
        "a weight of the model that no tensor fills",
        "It would stay memory that nothing wrote.",
        f"{EXPORT_AGAIN}, or download the shard that has it",
    ),
    Kind(
        "scale-missing",
        "error",
        "garbage",
        "an INT8 weight without its scale",
        "The scale would stay memory that nothing wrote, or 1.",
        f"{EXPORT_AGAIN}, or download the shard that has it",
    ),
    Kind(
        "foreign-names",
        "error",
        "garbage",
        "scales under names that another exporter gives them",
        "vLLM reads the names that amd-quark writes for vLLM, and leaves others out.",
        f"{EXPORT_AGAIN} with amd-quark's export for Hugging Face (export_safetensors)",
    ),
    Kind(
        "experts-miscounted",
        "error",
        "garbage",
        "fewer experts than the model has",
        "An expert that is not there would stay memory that nothing wrote.",
        "download what is missing, or correct the number of experts in config.json",
    ),
    Kind(
        "weight-misshapen",
        "error",
        "refused",
        "a weight of another shape than its layer's",
        "No layer takes it.",
        f"correct config.json so that it fits the weights, or {EXPORT_AGAIN}",
    ),
    Kind(
        "scale-misshapen",
        "error",
        "refused",
        "scales that do not fit their weight",
        "A layer takes one scale a channel or one for all, as its config says.",
        f"{EXPORT_AGAIN}, or correct qscheme in config.json",
    ),
    Kind(
        "scale-of-other-dtype",
        "error",
        "not known",
        "scales or zero points of a dtype that Quark does not write",
        "They would be cast without a word.",
        EXPORT_AGAIN,
    ),
    Kind(
        "tensor-of-other-kind",
        "error",
        "garbage",
        "a tensor of another kind than the parameter that takes it",
        "Floats would be cut to whole numbers, or whole numbers read as floats.",
        "correct exclude in config.json, so that it names exactly the modules that "
        "were not quantized, or export again",
    ),
    Kind(
        "tensor-without-place",
        "error",
        "refused",
        "a tensor that the model's loader cannot take",
        "Loading ends there.",
        f"{EXPORT_AGAIN}, or correct config.json",
    ),
    Kind(
        "tensor-left-out",
        "error",
        "garbage",
        "a tensor of an INT8 layer that the model has no place for",
        "The layer would be computed without it.",
        f"{EXPORT_AGAIN} without it, or correct config.json so that the model has it",
    ),
    # --- the numbers --------------------------------------------------------------
    Kind(
        "non-finite",
        "error",
        "garbage",
        "numbers that are NaN or infinite",
        "Every answer that they take part in is NaN or infinite, too.",
        "download or copy the file again",
    ),
    Kind(
        "scale-not-positive",
        "error",
        "garbage",
        "scales that are not finite, or not above zero where weights are not zero",
        "The weights of that channel would be lost or turned.",
        f"{EXPORT_AGAIN}: a layer that saw no data has no scale",
    ),
    Kind(
        "zero-point-not-zero",
        "error",
        "garbage",
        "zero points that INT8 kernels ignore",
        "Kernels would compute with other numbers than the checkpoint means.",
        f"{EXPORT_AGAIN} with symmetric quantization",
    ),
    # --- odd, and of no effect ----------------------------------------------------
    Kind(
        "exclude-names-nothing",
        "warning",
        "right",
        "exclude has entries that name nothing in the checkpoint",
        "There is no such module, so it changes nothing.",
        "nothing to do; check the entry if you meant a module of this model",
    ),
    Kind(
        "float-not-excluded",
        "warning",
        "garbage",
        "stored as floats without a scale, and exclude does not name it",
        "Read as floats, as it is stored. Releases of vLLM read it as INT8: garbage.",
        "nothing to do here; for other vLLMs add the names to exclude in config.json "
        "(--fix does)",
    ),
    Kind(
        "tensor-not-taken",
        "warning",
        "right",
        "tensors that the model neither takes nor needs",
        "Every parameter of the model was filled without them: layers for multi-token "
        "prediction, a tower that is not used.",
        "nothing to do",
    ),
    Kind(
        "zero-channels",
        "warning",
        "right",
        "channels of zeros with a scale of zero",
        "Their weights are zero, so their scale does not matter.",
        "nothing to do",
    ),
)
KINDS = {kind.id: kind for kind in _KINDS}


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong or odd: of which kind, with which tensor, module, file or
    setting, and what was expected and found there.

    remedy: what to do, where the kind's own remedy does not fit; where: more of what
    `name` is, such as a tensor's shape and file.
    """

    id: str
    name: str
    expected: str
    found: str
    remedy: str = ""
    where: str = ""

    @property
    def kind(self) -> Kind:
        return KINDS[self.id]

    @property
    def error(self) -> CheckpointError:
        """The one error that says it."""
        what = f"{self.name} ({self.where})" if self.where else self.name
        remedy = self.remedy or self.kind.remedy
        return misfit(what, self.expected, self.found, remedy)


def of_tensor(
    id: str, tensor: TensorInfo, expected: str, found: str, remedy: str = ""
) -> Problem:
    """A problem of a tensor of the checkpoint."""
    return Problem(id, tensor.name, expected, found, remedy, str(tensor))
