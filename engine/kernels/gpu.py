"""Which GPU a tensor lies on, as far as launching kernels is concerned."""

from __future__ import annotations

import dataclasses
import functools

import torch


@dataclasses.dataclass(frozen=True, slots=True)
class Gpu:
    """
    Attributes:
        architecture: "sm_90" for compute capability 9.0, "gfx942" and the like for AMD, "interpreter" for host memory.
        num_processors: streaming multiprocessors, or compute units.
    """

    architecture: str
    num_processors: int

    @property
    def has_descriptors(self) -> bool:
        """Whether tiles can be copied by the tensor memory accelerator, or by what the interpreter has in its place."""
        if self.architecture.startswith("sm_"):
            return int(self.architecture.removeprefix("sm_")) >= 90
        return self.architecture == "interpreter"


@functools.cache
def gpu_of(device: torch.device) -> Gpu:
    """The GPU that `device` names; the interpreter's for host memory."""
    if device.type == "cpu":
        return Gpu("interpreter", 4)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        architecture = properties.gcnArchName.partition(":")[0]
    else:
        architecture = f"sm_{properties.major}{properties.minor}"
    return Gpu(architecture, properties.multi_processor_count)
