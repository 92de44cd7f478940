"""`make kernels`: compile kernels and compare what they need with the table; results stay in Triton's cache.

Exits with 1 if a kernel needs more than the table says, or is missing there.
"""

from __future__ import annotations

import argparse
import sys

import triton

from tests.engine.kernels.compilation.resources import Resources, compile_variant, read_table, write_table
from tests.engine.kernels.compilation.variants import TARGETS, variants


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="one of them; all if none is given")
    parser.add_argument("--write", action="store_true", help="replace the rows of what was compiled")
    parser.add_argument("variant", nargs="*", help="names of variants; all if none is given")
    arguments = parser.parse_args()
    wanted = [each for each in variants() if not arguments.variant or each.name in arguments.variant]
    compiled: dict[tuple[str, str, str], Resources] = {}
    for target in arguments.target or TARGETS:
        for variant in wanted:
            compiled |= {found.key: found for found in compile_variant(variant, target)}
    version, recorded = read_table()
    if arguments.write:
        write_table(list((recorded | compiled).values()))
        return 0
    if version != triton.__version__:
        print(f"the table is of Triton {version}, this is {triton.__version__}", file=sys.stderr)
    worse = [row for key, row in compiled.items() if key not in recorded or row.is_worse_than(recorded[key])]
    for row in worse:
        print(f"{row}; recorded: {recorded.get(row.key)}", file=sys.stderr)
    print(f"{len(compiled)} kernels compiled, {len(worse)} need more than recorded")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
