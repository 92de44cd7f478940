"""`python -m bench.mock_workers`: mock workers in a process of their own, so that a router is measured alone.

One line of JSON on stdout says where it is: {"membership": "host:port", "prefill": "host:port", "decode": "host:port"},
the last two those of the first worker of their role. A line on stdin is the time between two steps from then on, in
seconds, and is answered by one on stdout. Ends with stdin.
"""

from __future__ import annotations

import asyncio
import json
import sys

import click
import uvloop

from bench.mock_workers.cluster import MockCluster


def say(choice: int, position: int) -> int:
    """Token ids that stand for text of their own in a byte-level vocabulary of at least 1024."""
    return 300 + (7 * choice + 13 * position) % 700


async def serve(*, num_prefill: int, num_decode: int, total_blocks: int) -> None:
    async with MockCluster(
        num_prefill=num_prefill, num_decode=num_decode, script=say, total_blocks=total_blocks, reports_load=True
    ) as cluster:
        addresses = {
            "membership": cluster.membership.address,
            "prefill": cluster.prefill[0].address,
            "decode": cluster.decode[0].address,
        }
        print(json.dumps(addresses), flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            cluster.pace(float(line))
            print("ok", flush=True)


@click.command()
@click.option("--prefill-workers", default=1, show_default=True, help="Mock prefill workers.")
@click.option("--decode-workers", default=1, show_default=True, help="Mock decode workers.")
@click.option("--total-blocks", default=4096, show_default=True, help="Blocks of each worker's pool.")
def main(prefill_workers: int, decode_workers: int, total_blocks: int) -> None:
    """Serve until stdin ends."""
    uvloop.run(serve(num_prefill=prefill_workers, num_decode=decode_workers, total_blocks=total_blocks))


if __name__ == "__main__":
    main()
