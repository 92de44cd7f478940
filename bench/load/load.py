"""A load: which requests are sent, when, and how many at once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from bench.load import arrivals, traces, workloads
from bench.load.requests import LoadRequest
from bench.load.targets import Api, ServedModel
from bench.load.traces import Replay
from bench.load.workloads import Lengths, Vocabulary

# Warm-up prompts are drawn from a seed of their own, so that the measured ones are in no cache.
_WARM_UP_SEED = 1 << 32


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is sent, and when. `options.py` has what each field means, and a flag for it.

    `num_requests` None is 100, or all rows of a trace. Without `rate` a trace keeps its times, and everything else is a
    closed loop of `concurrency`.
    """

    workload: str = "random"
    trace: str | None = None
    input_tokens: Lengths
    output_tokens: Lengths
    num_requests: int | None = None
    num_groups: int = 8
    prefix_tokens: int = 256
    num_turns: int = 4
    think_s: float = 0.0
    replay: Replay = dataclasses.field(default_factory=Replay)
    rate: float | None = None
    burstiness: float = 1.0
    concurrency: int | None = None
    num_warm_up: int = 2
    api: Api = "completions"
    vocab_size: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.workload in traces.READERS and self.trace is None:
            raise ValueError(f"--trace: must name the file for --workload {self.workload}")
        if self.workload not in traces.READERS and self.rate is None and self.concurrency is None:
            raise ValueError("--rate, --concurrency: at least one must be given")

    def requests(self, model: ServedModel) -> tuple[Iterator[LoadRequest], int]:
        """The requests in the order of their times, and how many answers they make.

        Raises:
            ValueError: an option cannot be.
        """
        vocabulary = Vocabulary.of_model(model, self.vocab_size)
        if self.workload in traces.READERS:
            replay = dataclasses.replace(self.replay, max_rows=self.num_requests, max_model_len=model.max_model_len)
            assert self.trace is not None
            rows = replay.select(traces.READERS[self.workload](self.trace))
            if not rows:
                raise ValueError(f"--trace {self.trace}: has no rows in the part that was asked for")
            requests, num_answers = traces.trace_requests(rows, replay, vocabulary, self.seed), len(rows)
        else:
            num_requests = 100 if self.num_requests is None else self.num_requests
            requests = self._synthetic(vocabulary, num_requests)
            num_answers = num_requests * (self.num_turns if self.workload == "multi-turn" else 1)
        if self.rate is not None:
            requests = arrivals.schedule(requests, arrivals.gamma_arrivals(self.rate, self.burstiness, self.seed))
        return (workloads.as_chats(requests) if self.api == "chat" else requests), num_answers

    def warm_up_requests(self, model: ServedModel) -> Iterator[LoadRequest]:
        """A few single requests of the lengths of the synthetic ones, whatever the workload."""
        requests = workloads.random_requests(
            Vocabulary.of_model(model, self.vocab_size),
            self.input_tokens,
            self.output_tokens,
            self.num_warm_up,
            self.seed + _WARM_UP_SEED,
        )
        return workloads.as_chats(requests) if self.api == "chat" else requests

    def _synthetic(self, vocabulary: Vocabulary, num_requests: int) -> Iterator[LoadRequest]:
        arguments = (vocabulary, self.input_tokens, self.output_tokens, num_requests, self.seed)
        if self.workload == "shared-prefix":
            return workloads.shared_prefix_requests(
                *arguments, num_groups=self.num_groups, prefix_tokens=self.prefix_tokens
            )
        if self.workload == "multi-turn":
            return workloads.multi_turn_requests(*arguments, num_turns=self.num_turns, think_s=self.think_s)
        return workloads.random_requests(*arguments)

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values: lengths as they are typed, infinity as "inf"."""
        fields = dataclasses.asdict(self) | {
            "input_tokens": str(self.input_tokens),
            "output_tokens": str(self.output_tokens),
        }
        return {name: str(value) if value == math.inf else value for name, value in fields.items()}
