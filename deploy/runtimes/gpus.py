"""Which GPU of this machine each worker process takes, as Ray sees to it for its own."""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Mapping

from baton.config import WorkerConfig, with_part_of_gpu

VISIBLE = "CUDA_VISIBLE_DEVICES"
# Has nvidia0 and so on, in a container for the GPUs that it was given alone.
DEVICES = pathlib.Path("/dev")


class GpuDealer:
    """Deals out the GPUs that this process may use, one to each rank of a worker, in turn. A replacement keeps its
    worker's."""

    def __init__(self, environ: Mapping[str, str], devices: pathlib.Path = DEVICES, *, num_ranks: int = 1) -> None:
        """`num_ranks`: processes that will each take a GPU, all together."""
        self._gpus = visible_gpus(environ, devices)
        self._most_on_one = -(-num_ranks // max(1, len(self._gpus)))
        self._turns = itertools.cycle(self._gpus)
        self._dealt: dict[str, str] = {}

    def environment(self, config: WorkerConfig) -> dict[str, str]:
        """What to add to a worker's environment; empty where it is for the CPU, or there are no two GPUs."""
        if config.model.device == "cpu" or len(self._gpus) < 2:
            return {}
        if config.name not in self._dealt:
            # A rank that finds none for itself says so.
            count = min(config.tensor_parallel_size, len(self._gpus))
            self._dealt[config.name] = ",".join(itertools.islice(self._turns, count))
        return {VISIBLE: self._dealt[config.name]}

    def limit_memory(self, config: WorkerConfig) -> WorkerConfig:
        """The config with the worker's part of a GPU that it shares with others."""
        return with_part_of_gpu(config, 1 / self._most_on_one)


def visible_gpus(environ: Mapping[str, str], devices: pathlib.Path = DEVICES) -> list[str]:
    """The names of the GPUs that CUDA would give to this process: numbers, or what CUDA_VISIBLE_DEVICES lists."""
    listed = environ.get(VISIBLE)
    if listed is None:
        # CUDA counts from 0, whichever of the machine's a container was given.
        return [str(number) for number, _ in enumerate(devices.glob("nvidia[0-9]*"))]
    names = [name.strip() for name in listed.split(",")]
    # CUDA itself stops at the first that is no GPU.
    return list(itertools.takewhile(lambda name: name not in ("", "-1", "NoDevFiles", "void", "none"), names))
