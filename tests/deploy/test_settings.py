"""How a file and flags become one configuration."""

from __future__ import annotations

import pathlib

import pytest

from baton.config import ServeConfig
from deploy import settings
from deploy.errors import StartError


def written(folder: pathlib.Path, text: str) -> str:
    path = folder / "baton.yaml"
    path.write_text(text)
    return str(path)


def test_flags_alone() -> None:
    config = settings.load(None, {"--model": "m", "--decode-workers": 3, "--runtime": "process"})
    assert (config.model.path, config.cluster.decode_workers, config.cluster.runtime) == ("m", 3, "process")
    assert config.router.grpc_port == 50051


def test_flags_override_the_file(tmp_path: pathlib.Path) -> None:
    file = written(tmp_path, "model: {path: m, dtype: float32}\ncluster: {decode_workers: 2, prefill_workers: 2}")
    config = settings.load(file, {"--decode-workers": 5})
    assert (config.cluster.decode_workers, config.cluster.prefill_workers) == (5, 2)
    assert config.model.dtype == "float32"


def test_the_file_reaches_what_no_flag_does(tmp_path: pathlib.Path) -> None:
    file = written(tmp_path, "transfer: {lease_s: 3}\nlog: {level: debug}\nready_file: r.json")
    config = settings.load(file, {"--model": "m"})
    assert (config.transfer.lease_s, config.log.level, config.ready_file) == (3.0, "debug", "r.json")


def test_every_flag_sets_a_value_that_exists() -> None:
    for path in settings.FLAGS.values():
        fields = ServeConfig.model_fields
        for section in path[:-1]:
            annotation = fields[section].annotation
            assert annotation is not None
            fields = annotation.model_fields
        assert path[-1] in fields


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        ("model: {path: m, dtypo: x}", {}, "baton.yaml: model.dtypo: Extra inputs"),
        ("model: {path: m}\ncluster: {decode_workers: 0}", {}, "baton.yaml: cluster.decode_workers: .*greater than 0"),
        ("", {"--model": "m", "--decode-workers": 0}, "^--decode-workers 0: .*greater than 0"),
        ("model: [m]", {"--model": "m"}, "baton.yaml: model: must be a section"),
        ("just text", {}, "baton.yaml: must hold sections"),
        ("model: {path: [", {}, "baton.yaml: not YAML"),
        ("{}", {}, "--model is required"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: pathlib.Path, text: str, flags: dict[str, object], message: str) -> None:
    with pytest.raises(StartError, match=message):
        settings.load(written(tmp_path, text), flags)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(StartError, match=r"--config /nowhere.yaml: No such file"):
        settings.load("/nowhere.yaml", {})


@pytest.mark.parametrize(("num_cpus", "num_threads"), [(2, 1), (8, 4), (1, 1)])
def test_workers_share_the_machines_cpus(num_cpus: int, num_threads: int) -> None:
    assert settings.resolve(settings.load(None, {"--model": "m"}), num_cpus).model.num_threads == num_threads


def test_threads_that_were_given_or_are_elsewhere_are_left_alone(tmp_path: pathlib.Path) -> None:
    given = settings.load(written(tmp_path, "model: {path: m, num_threads: 3}"), {})
    assert settings.resolve(given, 8).model.num_threads == 3
    joined = settings.load(None, {"--model": "m", "--ray-address": "head:6379"})
    assert settings.resolve(joined, 8).model.num_threads == 0


def test_the_models_path_becomes_absolute() -> None:
    assert settings.resolve(settings.load(None, {"--model": "m"}), 1).model.path == str(pathlib.Path("m").absolute())
