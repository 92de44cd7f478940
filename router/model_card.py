"""What a checkpoint's JSON files say of the model, read without transformers.

`config.json` must be there; `generation_config.json` and `tokenizer_config.json` may be.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SamplingDefaults:
    """Sampling values for requests that leave them unset."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """The served model.

    Attributes:
        adds_bos: the tokenizer's config asks for BOS before a text; None where it does not say.
    """

    name: str
    architecture: str
    vocab_size: int
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    adds_bos: bool | None = None
    sampling: SamplingDefaults = SamplingDefaults()


def read_model_card(path: str, name: str) -> ModelCard:
    """The card of the checkpoint folder `path`; ValueError where it has no usable config.json."""
    folder = pathlib.Path(path)
    config = _read_json(folder / "config.json")
    if not config:
        raise ValueError(f"{folder} has no config.json: not a checkpoint folder")
    # Multimodal checkpoints keep the language model's values one level down.
    text = {**config, **config.get("text_config", {})}
    if not isinstance(text.get("vocab_size"), int):
        raise ValueError(f"{folder / 'config.json'} names no vocab_size")
    generation = _read_json(folder / "generation_config.json")
    return ModelCard(
        name=name,
        architecture=(config.get("architectures") or [config.get("model_type", "unknown")])[0],
        vocab_size=text["vocab_size"],
        eos_token_ids=_ids(_first(generation.get("eos_token_id"), text.get("eos_token_id"))),
        bos_token_id=_first(generation.get("bos_token_id"), text.get("bos_token_id")),
        adds_bos=_read_json(folder / "tokenizer_config.json").get("add_bos_token"),
        sampling=_sampling_defaults(generation),
    )


def _sampling_defaults(generation: dict[str, Any]) -> SamplingDefaults:
    names = [field.name for field in dataclasses.fields(SamplingDefaults)]
    return SamplingDefaults(**{name: generation[name] for name in names if generation.get(name) is not None})


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file; empty where the file is missing."""
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} holds no JSON object")
    return loaded


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)
