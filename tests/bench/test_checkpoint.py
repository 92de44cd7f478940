"""The reference checkpoint is the same wherever it is made, and servers can load it."""

from __future__ import annotations

import pathlib

import pytest
import torch
from click.testing import CliRunner
from tokenizers import Tokenizer

from baton.config import ModelConfig
from bench.checkpoint import EOS_ID, NUM_BYTES, NUM_SPECIALS, Sizes, command, make_checkpoint
from engine.model_loader import load_model

SMALL = Sizes(
    hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=96, vocab_size=1024, max_model_len=512
)
FLAGS = "--hidden-size 64 --num-layers 2 --num-heads 4 --num-kv-heads 2 --intermediate-size 96 --vocab-size 1024"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("checkpoint") / "new"
    make_checkpoint(path, SMALL)
    return path


def files(path: pathlib.Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_the_same_seed_gives_the_same_bytes(checkpoint: pathlib.Path, tmp_path: pathlib.Path) -> None:
    # Neither what was drawn before nor what is drawn meanwhile counts.
    torch.rand(3)
    make_checkpoint(tmp_path / "again", SMALL)
    assert files(tmp_path / "again") == files(checkpoint)
    assert set(files(checkpoint)) == {
        *("config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json"),
    }


def test_another_seed_gives_other_weights_and_words(checkpoint: pathlib.Path, tmp_path: pathlib.Path) -> None:
    make_checkpoint(tmp_path / "other", SMALL, seed=1)
    differing = {name for name, content in files(tmp_path / "other").items() if content != files(checkpoint)[name]}
    assert differing == {"model.safetensors", "tokenizer.json"}


def test_the_engine_loads_it(checkpoint: pathlib.Path) -> None:
    model = load_model(ModelConfig(path=str(checkpoint), dtype="bfloat16"))
    assert (model.vocab_size, model.max_model_len, model.dtype) == (1024, 512, torch.bfloat16)
    assert model.generation_config.eos_token_id == EOS_ID
    assert len(model.layers) == 2


def test_every_id_is_a_token_and_all_but_single_bytes_are_ascii(checkpoint: pathlib.Path) -> None:
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 1024
    texts = [tokenizer.decode([token_id]) for token_id in range(NUM_SPECIALS + NUM_BYTES, 1024)]
    assert all(text and text.isascii() for text in texts)


def test_greedy_tokens_are_whole_text(checkpoint: pathlib.Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.arange(256)[None]).logits[0]
    assert int(logits.argmax(dim=-1).min()) >= NUM_SPECIALS + NUM_BYTES


def test_the_reference_has_46_million_parameters() -> None:
    sizes = Sizes()
    head_dim = sizes.hidden_size // sizes.num_heads
    attention = 2 * sizes.hidden_size * (sizes.hidden_size + sizes.num_kv_heads * head_dim)
    mlp = 3 * sizes.hidden_size * sizes.intermediate_size
    norms = sizes.hidden_size
    total = sizes.num_layers * (attention + mlp + 2 * norms) + norms + 2 * sizes.vocab_size * sizes.hidden_size
    assert total == 46_150_144


def test_the_command_writes_one(checkpoint: pathlib.Path, tmp_path: pathlib.Path) -> None:
    arguments = [str(tmp_path / "made"), *FLAGS.split(), "--max-model-len", "512"]
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert result.output == f"{tmp_path}/made: 0.2 million parameters\n"
    assert files(tmp_path / "made") == files(checkpoint)


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ("--num-heads 7", "hidden_size 512: not 7 heads of an even width"),
        ("--num-kv-heads 3", "num_heads 8: not a multiple of num_kv_heads 3"),
        ("--vocab-size 300", "vocab_size 300: must be at least 1024"),
    ],
)
def test_sizes_that_do_not_fit_are_named(flags: str, problem: str, tmp_path: pathlib.Path) -> None:
    result = CliRunner().invoke(command, [str(tmp_path / "none"), *flags.split()])
    assert result.exit_code == 2
    assert problem in result.output
    assert not (tmp_path / "none").exists()
