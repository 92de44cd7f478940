from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest

from router.model_card import SamplingDefaults, read_model_card


def write(folder: pathlib.Path, **files: dict[str, Any]) -> str:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return str(folder)


def test_eos_ids_are_a_list_or_one(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path, config={"vocab_size": 10, "eos_token_id": 3})
    assert read_model_card(path, "m").eos_token_ids == (3,)
    write(tmp_path, generation_config={"eos_token_id": [4, 5]})
    assert read_model_card(path, "m").eos_token_ids == (4, 5)


def test_a_model_without_generation_config_has_the_api_s_defaults(tmp_path: pathlib.Path) -> None:
    card = read_model_card(write(tmp_path, config={"vocab_size": 10, "model_type": "llama"}), "m")
    assert card.sampling == SamplingDefaults()
    assert card.eos_token_ids == ()
    assert card.bos_token_id is None
    assert card.architecture == "llama"


def test_sampling_defaults_come_from_generation_config(tmp_path: pathlib.Path) -> None:
    generation = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": None, "do_sample": True, "max_length": 20}
    path = write(tmp_path, config={"vocab_size": 10}, generation_config=generation)
    assert read_model_card(path, "m").sampling == SamplingDefaults(temperature=0.6, top_p=0.95, top_k=20)


def test_multimodal_checkpoints_keep_the_text_model_s_values_one_level_down(tmp_path: pathlib.Path) -> None:
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "eos_token_id": 1, "text_config": {"vocab_size": 99}}
    card = read_model_card(write(tmp_path, config=config), "m")
    assert (card.vocab_size, card.eos_token_ids, card.architecture) == (99, (1,), "Gemma3ForConditionalGeneration")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no config.json"),
        ({"config": {"model_type": "llama"}}, "names no vocab_size"),
    ],
)
def test_a_folder_that_is_no_checkpoint(tmp_path: pathlib.Path, files: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_model_card(write(tmp_path, **files), "m")


def test_a_broken_file_is_named(tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        read_model_card(str(tmp_path), "m")
