"""One prefill and one decode process on one device, end to end, beside `transformers` on the same weights and requests.

Clients speak OpenAI's API to `baton serve`. The peers are called in this process, once that server has ended:
`generate_batch`, which batches continuously, with all requests, and `generate` with one after another.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import uvloop

from bench.gpu.stand import Found, Stand
from bench.load.targets import ServedModel, open_target
from bench.report import TableText
from bench.scenarios import InterferenceScenario, Sample, Scenario, ThroughputScenario
from bench.servers import Server, ServerSpec, baton_preset

BATCH_AIM, GENERATE_AIM, ITL_AIM = 5.0, 40.0, 2.0
_MAX_BATCH_TOKENS = 2048


def server(stand: Stand) -> ServerSpec:
    """The server that is measured."""
    scale = stand.scale
    flags = {
        "--device": stand.device.type,
        "--dtype": scale.small.dtype,
        "--block-size": stand.block_size,
        "--kv-cache-bytes": scale.kv_cache_bytes,
        "--max-batch-seqs": scale.load.concurrency,
        "--max-batch-tokens": _MAX_BATCH_TOKENS,
    }
    return baton_preset("Baton", tuple(str(word) for flag in flags.items() for word in flag))


def measure(stand: Stand) -> Found:
    scale = stand.scale
    throughput, interference = ThroughputScenario((scale.load,)), InterferenceScenario(scale.mix)
    with Server(server(stand), stand.small_model(), stand.folder / "serve.log", ready_timeout_s=240) as running:
        running.wait_ready()
        (ours,) = uvloop.run(_sample(running.url, throughput)).values.values()
        streams = uvloop.run(_sample(running.url, interference)).values
    batch, generated = peers(stand)
    by = "transformers"
    rows = [
        ("Baton", f"{ours:.0f}", "", ""),
        (f"{by}, generate_batch", f"{batch:.0f}", f"{ours / batch:.2f}", f"{BATCH_AIM:g}"),
        (f"{by}, generate", f"{generated:.0f}", f"{ours / generated:.2f}", f"{GENERATE_AIM:g}"),
    ]
    scaled = [(metric, streams[metric.name] * metric.scale) for metric in interference.metrics]
    tables = [
        TableText(throughput.help, ("by", "output tok/s", "Baton over it", "aim"), rows),
        TableText(
            f"{interference.help} (aim: ITL p99 at most {ITL_AIM:g} times that alone)",
            ("", "Baton"),
            [(metric.label, f"{value:.2f}") for metric, value in scaled],
        ),
    ]
    rates = {"baton": ours, "generate_batch": batch, "generate": generated}
    return Found(tables, {"output_tokens_per_s": rates, "interference": dict(streams)})


async def _sample(url: str, scenario: Scenario) -> Sample:
    target = open_target(url)
    try:
        # The target learns the model's name.
        await target.served_model()
        return await scenario.run(target)
    finally:
        await target.close()


def peers(stand: Stand) -> tuple[float, float]:
    """Output tokens per second of `generate_batch`, and of `generate` for the first of the requests."""
    from transformers import AutoModelForCausalLM

    scale = stand.scale
    model = AutoModelForCausalLM.from_pretrained(stand.small_model(), dtype=getattr(torch, scale.small.dtype))
    model = model.to(stand.device).eval()
    load = scale.load
    requests, _ = load.requests(ServedModel("small", scale.small.vocab_size, scale.small.max_model_len))
    prompts = [[token for token in request.prompt if isinstance(token, int)] for request in requests]
    return generate_batch(model, prompts, load.output_tokens.high, scale.batch_limits), generate(
        model, prompts[: scale.num_generated], load.output_tokens.high
    )


def generate_batch(model: Any, prompts: Sequence[list[int]], max_tokens: int, limits: dict[str, int]) -> float:
    """Tokens per second from the first request to the last token; graphs are captured before that.

    Raises:
        RuntimeError: an answer is missing or short.
    """
    from transformers import ContinuousBatchingConfig, GenerationConfig

    # No token ends an answer.
    config = GenerationConfig(max_new_tokens=max_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    answers = model.generate_batch(
        list(prompts),
        generation_config=config,
        continuous_batching_config=ContinuousBatchingConfig(allow_block_sharing=False, **limits),
    ).values()
    lengths = [len(answer.generated_tokens) for answer in answers]
    if lengths != [max_tokens] * len(prompts):
        raise RuntimeError(f"generate_batch answered {len(lengths)} of {len(prompts)} requests, or not to the end")
    taken_s: float = max(each.lifespan[1] for each in answers) - min(each.created_time for each in answers)
    return sum(lengths) / taken_s


def generate(model: Any, prompts: Sequence[list[int]], max_tokens: int) -> float:
    """Tokens per second of one prompt after another, the first of which is answered once before."""
    from transformers import GenerationConfig

    config = GenerationConfig(max_new_tokens=max_tokens, min_new_tokens=max_tokens, do_sample=False, pad_token_id=0)

    def answer(prompt: list[int]) -> None:
        ids = torch.tensor([prompt], device=model.device)
        # The token ids come to the host, which waits for them.
        model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config).tolist()

    return len(prompts) * max_tokens / _seconds(answer, prompts)


def _seconds(answer: Callable[[list[int]], None], prompts: Sequence[list[int]]) -> float:
    answer(prompts[0])
    started_s = time.perf_counter()
    for prompt in prompts:
        answer(prompt)
    return time.perf_counter() - started_s
