"""What a compiled kernel needs of a GPU, and the table of it."""

from __future__ import annotations

import csv
import dataclasses
import pathlib
import re
import subprocess
import tempfile

import triton
from triton.compiler import ASTSource, CompiledKernel

from engine.kernels.gpu import Gpu
from tests.engine.kernels.compilation.recording import Launch, recorded_launches
from tests.engine.kernels.compilation.variants import TARGETS, Variant

TABLE = pathlib.Path(__file__).with_name("resources.tsv")
# Of an A100, an H100, a B200 and an MI300X; they decide how far a context is split, not what is compiled.
_NUM_PROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304}


@dataclasses.dataclass(frozen=True, order=True)
class Resources:
    """
    Attributes:
        variant, target, kernel: what was compiled.
        registers: of a thread; vector registers on AMD.
        spilled: bytes of a thread's stack; on AMD, registers that were spilled.
        shared: bytes of a program's shared memory.
    """

    variant: str
    target: str
    kernel: str
    registers: int
    spilled: int
    shared: int

    @property
    def key(self) -> tuple[str, str, str]:
        return self.variant, self.target, self.kernel

    def is_worse_than(self, recorded: Resources) -> bool:
        return self.registers > recorded.registers or self.spilled > recorded.spilled or self.shared > recorded.shared


def compile_variant(variant: Variant, target: str) -> list[Resources]:
    """Compile all that a variant launches; each kernel in as many forms as it is launched in."""
    with recorded_launches(TARGETS[target]) as launches:
        variant.launch(Gpu(target, _NUM_PROCESSORS[target]))
    return [_measure(variant.name, target, _compile(launch, target)) for launch in launches]


def _compile(launch: Launch, target: str) -> CompiledKernel:
    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    return triton.compile(source, TARGETS[target], dict(launch.options))


def _measure(variant: str, target: str, compiled: CompiledKernel) -> Resources:
    if "cubin" in compiled.asm:
        found = _cubin_figures(compiled.asm["cubin"])
        registers, spilled = found["REG"], found["STACK"] + found["LOCAL"]
    else:
        pattern = r"\.(vgpr_count|agpr_count|vgpr_spill_count|sgpr_spill_count):\s+(\d+)"
        found = {name: int(number) for name, number in re.findall(pattern, compiled.asm["amdgcn"])}
        registers = found["vgpr_count"]
        spilled = found["vgpr_spill_count"]
    return Resources(variant, target, compiled.metadata.name, registers, spilled, compiled.metadata.shared)


def _cubin_figures(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", printed)}


def read_table() -> tuple[str, dict[tuple[str, str, str], Resources]]:
    """The version of Triton that the table is of, and its rows."""
    version, *lines = TABLE.read_text().splitlines()
    found = []
    for row in csv.DictReader(lines, delimiter="\t"):
        figures = (int(row[name]) for name in ("registers", "spilled", "shared"))
        found.append(Resources(row["variant"], row["target"], row["kernel"], *figures))
    return version.removeprefix("# Triton "), {each.key: each for each in found}


def write_table(rows: list[Resources]) -> None:
    names = [field.name for field in dataclasses.fields(Resources)]
    lines = [f"# Triton {triton.__version__}", "\t".join(names)]
    lines += ["\t".join(map(str, dataclasses.astuple(row))) for row in sorted(rows)]
    TABLE.write_text("\n".join(lines) + "\n")
