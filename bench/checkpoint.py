"""The reference checkpoint: `baton bench checkpoint DIR` writes a random Llama that every server can load.

Nothing is downloaded: the weights are those of a seed, and the tokenizer is trained on words that the seed makes. The
same seed, sizes and library versions give the same bytes.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import click

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM

BOS, EOS = "<s>", "</s>"
BOS_ID, EOS_ID = 0, 1
NUM_SPECIALS = 2
NUM_BYTES = 256
MIN_VOCAB_SIZE = 1024
"""Fewer entries would leave little beside single bytes."""

_ONSETS = ("b", "br", "d", "f", "g", "gr", "h", "k", "l", "m", "n", "p", "pl", "r", "s", "st", "t", "tr", "v", "w")
_NUCLEI = ("a", "e", "i", "o", "u", "ai", "ea", "ou")
_CODAS = ("", "", "l", "m", "n", "r", "s", "t")
_SENTENCE_WORDS = 12
_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@dataclasses.dataclass(frozen=True, slots=True)
class Sizes:
    """The shape of the checkpoint; the defaults are the reference, 46 million parameters.

    Raises:
        ValueError: names the field and its limit.
    """

    hidden_size: int = 512
    num_layers: int = 12
    num_heads: int = 8
    num_kv_heads: int = 4
    intermediate_size: int = 1536
    vocab_size: int = 8192
    max_model_len: int = 8192
    dtype: Literal["bfloat16", "float32"] = "bfloat16"

    def __post_init__(self) -> None:
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(f"hidden_size {self.hidden_size}: not {self.num_heads} heads of an even width")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads}: not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.vocab_size < MIN_VOCAB_SIZE:
            raise ValueError(f"vocab_size {self.vocab_size}: must be at least {MIN_VOCAB_SIZE}")


def make_checkpoint(
    path: pathlib.Path, sizes: Sizes = Sizes(), *, seed: int = 0, device: torch.device | None = None
) -> int:
    """Writes config, weights, generation config and tokenizer to the directory `path`, which is made if absent.

    Args:
        device: where the weights are drawn, as of `make_model`.

    Returns:
        The number of parameters.
    """
    path.mkdir(parents=True, exist_ok=True)
    model = make_model(sizes, seed, device)
    model.save_pretrained(path)
    make_tokenizer(sizes.vocab_size, seed).save(str(path / "tokenizer.json"))
    _write_json(
        path / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "add_bos_token": True,
            "clean_up_tokenization_spaces": False,
            "model_max_length": sizes.max_model_len,
            "chat_template": _CHAT_TEMPLATE,
        },
    )
    _write_json(path / "generation_config.json", {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID})
    return int(model.num_parameters())


def make_model(sizes: Sizes, seed: int, device: torch.device | None = None) -> LlamaForCausalLM:
    """A Llama with the weights of `seed` whose greedy tokens are neither special nor part of a character.

    So no answer ends early, and each token has text of its own. Rows of zeros in the output layer do it: their logit is
    0, which is never the greatest of thousands.

    Args:
        device: where the weights are drawn, which differ from one kind to another; None for the CPU. Large models are
            drawn in seconds by a GPU, in float32.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        num_key_value_heads=sizes.num_kv_heads,
        max_position_embeddings=sizes.max_model_len,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        tie_word_embeddings=False,
    )
    device = device or torch.device("cpu")
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight[: NUM_SPECIALS + NUM_BYTES] = 0.0
    model.to(dtype=getattr(torch, sizes.dtype))
    return model


def make_tokenizer(vocab_size: int, seed: int) -> Tokenizer:
    """Trains a byte-level BPE tokenizer of exactly `vocab_size` entries: specials, bytes, then merges of ASCII."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences(vocab_size, seed), trainer)
    assert tokenizer.get_vocab_size() == vocab_size
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, BOS_ID)]
    )
    return tokenizer


def sentences(num_words: int, seed: int) -> Iterator[str]:
    """Sentences that have each of `num_words` made-up words at least once, and the first words most often (Zipf)."""
    rng = random.Random(seed)
    words: dict[str, None] = {}
    while len(words) < num_words:
        words["".join(_syllable(rng) for _ in range(rng.randint(1, 4)))] = None
    texts = [word for rank, word in enumerate(words, start=1) for _ in range(1 + num_words // (4 * rank))]
    rng.shuffle(texts)
    for start in range(0, len(texts), _SENTENCE_WORDS):
        yield " ".join(texts[start : start + _SENTENCE_WORDS]).capitalize() + ". "


def _syllable(rng: random.Random) -> str:
    return rng.choice(_ONSETS) + rng.choice(_NUCLEI) + rng.choice(_CODAS)


def _write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


_REFERENCE = Sizes()


@click.command()
@click.argument("directory", metavar="DIR", type=click.Path(file_okay=False, path_type=pathlib.Path))
@click.option("--hidden-size", default=_REFERENCE.hidden_size, show_default=True, help="Width of the model.")
@click.option("--num-layers", default=_REFERENCE.num_layers, show_default=True, help="Decoder layers.")
@click.option("--num-heads", default=_REFERENCE.num_heads, show_default=True, help="Attention heads.")
@click.option("--num-kv-heads", default=_REFERENCE.num_kv_heads, show_default=True, help="Heads of keys and values.")
@click.option("--intermediate-size", default=_REFERENCE.intermediate_size, show_default=True, help="Width of the MLP.")
@click.option("--vocab-size", default=_REFERENCE.vocab_size, show_default=True, help="Entries of the tokenizer.")
@click.option("--max-model-len", default=_REFERENCE.max_model_len, show_default=True, help="Most tokens of a sequence.")
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float32"]),
    default=_REFERENCE.dtype,
    show_default=True,
    help="Of the weights.",
)
@click.option("--seed", default=0, show_default=True, help="The same seed gives the same bytes.")
def command(directory: pathlib.Path, seed: int, **sizes: Any) -> None:
    """Write a random Llama to DIR that Baton and other servers load.

    By default it is the reference of docs/performance.md.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        num_parameters = make_checkpoint(directory, Sizes(**sizes), seed=seed)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    click.echo(f"{directory}: {num_parameters / 1e6:.1f} million parameters")
