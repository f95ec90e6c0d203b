# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The float checkpoint that weights are compared with."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from .. import stored
from ..checkpoint import TensorInfo, misfit, read_checkpoint
from ..findings import Finding, finding
from ..problems import EXPORT_AGAIN
from ..weights import expert_of
from .measure import ModuleStats

# Relative errors against the float model. Rounding to INT8 gives about 0.01 with a
# scale a channel, and some 0.05 with one a tensor and outliers.
ERROR_WORTH_A_LOOK, ERROR_WRONG = 0.1, 0.5


class Reference:
    """The weights of a float checkpoint, by the names they have expert by expert."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors = read_checkpoint(folder)
        if not self.tensors:
            found = "no *.safetensors"
            remedy = "give the folder of the model that was quantized"
            raise misfit(folder, "a checkpoint in safetensors", found, remedy)

    def find(self, name: str, rows: int, columns: int) -> tuple[TensorInfo, int] | None:
        """(tensor, first row) of a weight [rows, columns]; None where there is none.

        Raises CheckpointError for one of another shape or of no floats.
        """
        shape: tuple[int, ...] = (rows, columns)
        tensor, first = self.tensors.get(f"{name}.weight"), 0
        if tensor is None and (expert := expert_of(name)):
            prefix, index = expert
            parent, last = prefix.rpartition(".")[0], name.rpartition(".")[2]
            tensor = self.tensors.get(f"{parent}.{last}.weight")
            if tensor is not None and len(tensor.shape) == 3:
                shape = (max(tensor.shape[0], index + 1), rows, columns)
                first = index * rows
        if tensor is None:
            return None
        if tensor.shape != shape or tensor.dtype not in stored.FLOATS:
            raise misfit(
                f"{tensor.name} in {tensor.file}",
                f"floats {list(shape)}, as the INT8 checkpoint has it",
                f"{tensor.dtype} {list(tensor.shape)}",
                "give the float model that was quantized",
            )
        return tensor, first


def reference_findings(
    modules: Sequence[ModuleStats], missing: Sequence[str]
) -> Iterator[Finding]:
    """modules: those that were compared; missing: names of those that were not."""
    errors = {module.name: module.error for module in modules}
    known = {name: error for name, error in errors.items() if error is not None}
    lost = [name for name in errors if name not in known]
    names = sorted(known, key=lambda name: -known[name])
    wrong = lost + [name for name in names if known[name] >= ERROR_WRONG]
    if wrong:
        worst = f"up to {known[names[0]]:.3g}" if names else "not a number"
        yield finding(
            "reference-differs",
            "garbage",
            f"weights that are not the reference's: relative error {worst}",
            f"rounding to INT8 gives some 0.01; {ERROR_WRONG:g} and more is another "
            "tensor, another scale, or another model",
            f"{EXPORT_AGAIN} from the reference, or give the model it was made from",
            wrong,
        )
    far = [name for name in names if ERROR_WORTH_A_LOOK <= known[name] < ERROR_WRONG]
    if far:
        yield finding(
            "reference-error",
            "warning",
            f"weights far from the reference's: relative error up to "
            f"{known[far[0]]:.3g}",
            "rounding to INT8 gives some 0.01; outliers with one scale a tensor, or a "
            "scale that cuts weights off, give more",
            f"{EXPORT_AGAIN} with one scale a channel, or exclude these modules",
            far,
        )
    if missing:
        yield finding(
            "reference-missing",
            "warning",
            "weights that the reference does not hold",
            "they were not compared",
            "give the float model that was quantized, whole",
            missing,
        )
