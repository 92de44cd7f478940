"""Tiny random checkpoints of every family that the engine holds exact, as real Hugging Face directories.

Weights are scaled so that greedy outputs vary and near ties are rare; windows are short so that short prompts pass
them.
torch and transformers are imported inside functions: tests of torch-free packages may import this module.
"""

from __future__ import annotations

import json
import pathlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "gpt_oss")
VOCAB_SIZE = 384
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2
MAX_MODEL_LEN = 2048

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": MAX_MODEL_LEN,
    "pad_token_id": PAD_ID,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
}
_ALTERNATING = ["sliding_attention", "full_attention"] * 2
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {"sliding_window": 12}),
    "gemma2": (
        "Gemma2Config",
        {
            "sliding_window": 8,
            "layer_types": _ALTERNATING,
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 20.0,
            "final_logit_softcapping": 30.0,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "sliding_window": 8,
            "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
            "query_pre_attn_scalar": 16,
        },
    ),
    "gpt_oss": (
        "GptOssConfig",
        {
            "sliding_window": 16,
            "layer_types": _ALTERNATING,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 32.0,
                "original_max_position_embeddings": MAX_MODEL_LEN // 32,
            },
        },
    ),
}
_TEXT = """The baton passes from runner to runner, and the race goes on. A runner who waits for the baton does not stand
still: she starts before it comes, so that both run at the same pace when the hands meet. What matters is not who is the
fastest, but that nothing is lost when the baton changes hands. The first leg is long and heavy; the last is a matter of
steps, one after another, each as short as the one before. Rain came down over the hills and the river rose by the hour.
They counted 1, 2, 3, 4 and then 1024 stones; some were round, others were not. "Where are you going?" asked the child.
"Over the bridge, through the forest, and then home again," answered the old man, and he smiled without turning around.
"""
_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def make_checkpoint(
    family: str, path: pathlib.Path, *, sharded: bool = False, seed: int = 0, **overrides: Any
) -> pathlib.Path:
    """Write a checkpoint of a family to `path`: config, weights, generation config and tokenizer. Returns `path`.

    Args:
        sharded: split the weights over several files with an index.
        overrides: fields of the config, such as dtype="bfloat16" or hidden_size.
    """
    import transformers

    config_class, fields = _CONFIGS[family]
    config = getattr(transformers, config_class)(**{**_SIZES, **fields, **overrides})
    return save_checkpoint(config, path, sharded=sharded, seed=seed)


def save_checkpoint(
    config: PreTrainedConfig, path: pathlib.Path, *, sharded: bool = False, seed: int = 0
) -> pathlib.Path:
    """Write a random checkpoint of any causal language model's config."""
    import torch
    from transformers import AutoModelForCausalLM

    generator = torch.Generator().manual_seed(seed)
    dtype = config.dtype or torch.float32
    # Norms and sinks keep their own initialisation and are varied from there, so that one is seeded too.
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            _randomise(name, parameter, generator)
    model.to(dtype).save_pretrained(path, max_shard_size="100KB" if sharded else "5GB")
    write_tokenizer(path)
    return path


# Of weights by a part of their name; experts multiply three of them, which multiplies their rounding too.
_GAINS = {"lm_head.weight": 0.4, "embed": 0.3, "experts": 1.0}


def _randomise(name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
    """Give a parameter values that keep activations near one, with attention and layers strong enough to matter."""
    import torch

    noise = torch.randn(parameter.shape, generator=generator)
    if parameter.dim() == 1:
        parameter.add_(noise * 0.2)
        return
    # Linear weights are [out, in]; experts' are [expert, in, out].
    fan_in = parameter.shape[-1] if parameter.dim() == 2 else parameter.shape[-2]
    # Embeddings are small beside what layers add: tied to the output, they would make every token predict itself.
    gain = next((gain for part, gain in _GAINS.items() if part in name), 1.6)
    parameter.copy_(noise * gain * fan_in**-0.5)


def write_tokenizer(path: pathlib.Path) -> None:
    """Write a byte-level BPE tokenizer of VOCAB_SIZE tokens that puts BOS first: tokenizer.json and its config."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = {"<pad>": PAD_ID, "<bos>": BOS_ID, "<eos>": EOS_ID}
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=sorted(specials, key=lambda token: specials[token]),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    assert all(tokenizer.token_to_id(token) == token_id for token, token_id in specials.items())
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS_ID)]
    )
    tokenizer.save(str(path / "tokenizer.json"))
    fields = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "add_bos_token": True,
        "model_max_length": MAX_MODEL_LEN,
        "chat_template": _CHAT_TEMPLATE,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(fields, indent=2), encoding="utf-8")
