"""Kernels compile for every kind of GPU, and need no more registers, spills and shared memory than recorded.

`make kernels` compiles all of them; here it is a few, and the table is read.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[3]
# One of each kind of target, and of each way that attention takes.
COMPILED = {
    "sm_90": ["attention chunk bfloat16 128 block 64", "rotate bfloat16 128"],
    "gfx942": ["attention decode bfloat16 64 block 16 window sinks"],
    "sm_80": ["choose"],
}
# Bytes of shared memory that a program can have.
SHARED_MEMORY = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}


_COMPILE = """
import json, sys
import triton
from tests.engine.kernels.compilation.resources import compile_variant, read_table
from tests.engine.kernels.compilation.variants import TARGETS, variants
version, recorded = read_table()
every = {each.name: each for each in variants()}
wanted = {(name, target) for name in every for target in TARGETS}
listed = {key[:2] for key in recorded}
compiled = [found for target, names in json.loads(sys.argv[1]).items() for name in names
            for found in compile_variant(every[name], target)]
worse = [str(found) for found in compiled if found.is_worse_than(recorded[found.key])]
print(json.dumps({"missing": sorted(wanted - listed), "unknown": sorted(listed - wanted),
                  "worse": worse if version == triton.__version__ else []}))
"""


def test_compiles_to_what_the_table_has_of_every_variant() -> None:
    """In a process of its own: in this one kernels are interpreted. Compiled code is kept under build/."""
    done = subprocess.run(
        [sys.executable, "-c", _COMPILE, json.dumps(COMPILED)],
        cwd=ROOT,
        env=os.environ | {"TRITON_CACHE_DIR": str(ROOT / "build" / "triton"), "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"missing": [], "unknown": [], "worse": []}


def test_kernels_fit_their_gpus_and_hardly_spill() -> None:
    """A few bytes are the assembler's bargain for a second program on each processor."""
    lines = (ROOT / "tests/engine/kernels/compilation/resources.tsv").read_text().splitlines()[2:]
    for variant, target, _, registers, spilled, shared in (line.split("\t") for line in lines):
        assert int(shared) <= SHARED_MEMORY[target], (variant, target)
        assert int(registers) <= (512 if target == "gfx942" else 255), (variant, target)
        assert int(spilled) <= 16, (variant, target)
