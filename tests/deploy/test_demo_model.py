"""The demo model that is stored in the repository does what its README says."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from deploy.demo import prompts

pytest.importorskip("torch")
pytest.importorskip("transformers")

from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaForCausalLM

from deploy.demo import corpus, evaluate

MODEL = Path(evaluate.__file__).parent / "model"


@pytest.fixture(scope="module")
def loaded() -> tuple[LlamaForCausalLM, Tokenizer]:
    """The stored model in float32, and its tokenizer."""
    return evaluate.load(MODEL)


def test_the_directory_is_complete_and_small() -> None:
    sizes = {path.name: path.stat().st_size for path in MODEL.iterdir()}
    assert set(sizes) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(sizes.values()) <= 8_000_000
    config = json.loads((MODEL / "config.json").read_text(encoding="utf-8"))
    assert config["dtype"] == "bfloat16"
    assert config["num_key_value_heads"] < config["num_attention_heads"]


def test_the_chat_template_writes_the_turns_of_the_prompts() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    messages = [
        {"role": "user", "content": "remember red=417; sun=902"},
        {"role": "assistant", "content": "ok"},
        {"role": "user", "content": "sun?"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<s>User: remember red=417; sun=902\nBot: ok\nUser: sun?\nBot:"
    assert tokenizer("sun?").input_ids[0] == tokenizer.bos_token_id
    assert tokenizer.eos_token == "</s>"


def test_digits_and_keys_are_single_tokens(loaded: tuple[LlamaForCausalLM, Tokenizer]) -> None:
    tokenizer = loaded[1]
    tokens = tokenizer.encode(" red=417; sun", add_special_tokens=False).tokens
    assert tokens == ["Ġred", "=", "4", "1", "7", ";", "Ġsun"]
    assert tokenizer.decode(tokenizer.encode("naïve ☃ 12").ids) == "naïve ☃ 12"


@pytest.mark.parametrize(("pairs", "cases", "least"), [(8, 20, 19), (32, 20, 18), (64, 12, 10)])
def test_it_recalls_one_of_many_values(
    loaded: tuple[LlamaForCausalLM, Tokenizer], pairs: int, cases: int, least: int
) -> None:
    asked = [prompts.recall_prompt(pairs, seed) for seed in range(cases)]
    right = [evaluate.is_right(*loaded, prompt, f" {answer}") for prompt, answer in asked]
    assert sum(right) >= least


def test_it_generates_the_answers_of_a_conversation_and_stops(
    loaded: tuple[LlamaForCausalLM, Tokenizer],
) -> None:
    prompt, expected = prompts.recall_prompt(32)
    answer, ended = evaluate.complete(*loaded, prompt, limit=8)
    assert ended
    assert prompts.clean(answer) == expected
    second, expected = prompts.follow_up(prompt, answer)
    assert second.startswith(prompt)
    answer, ended = evaluate.complete(*loaded, second, limit=8)
    assert ended
    assert prompts.clean(answer) == expected


def test_it_adds_and_subtracts(loaded: tuple[LlamaForCausalLM, Tokenizer]) -> None:
    answer, ended = evaluate.complete(*loaded, prompts.ARITHMETIC, limit=8)
    assert ended
    assert prompts.clean(answer) == prompts.ARITHMETIC_ANSWER
    rng = random.Random(7)
    problems = [corpus.problem(rng) for _ in range(60)]
    right = [
        evaluate.is_right(*loaded, prompts.user_turn(f"what is {problem}?"), f" {result}")
        for problem, result in problems
    ]
    assert sum(right) >= 54


@pytest.mark.parametrize("prompt", [prompts.STORY, prompts.STORY_REQUEST])
def test_a_story_ends_by_itself(loaded: tuple[LlamaForCausalLM, Tokenizer], prompt: str) -> None:
    text, ended = evaluate.complete(*loaded, prompt)
    assert ended
    assert 60 <= len(text.split()) <= 200
    assert text.rstrip().endswith(("The end.", "happily ever after."))
