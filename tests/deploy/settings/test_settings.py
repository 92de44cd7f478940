"""How a file, the environment and flags become one configuration."""

from __future__ import annotations

import pathlib
import re

import pytest

from baton.config import ServeConfig
from deploy import settings
from deploy.errors import StartError
from deploy.settings import schema


def written(folder: pathlib.Path, text: str) -> str:
    path = folder / "baton.yaml"
    path.write_text(text)
    return str(path)


def load(file: str | None = None, flags: dict[str, object] | None = None, **environ: str) -> ServeConfig:
    return settings.load(file, {"--model": "m", **(flags or {})}, environ)


class TestFlags:
    def test_alone(self) -> None:
        config = load(flags={"--decode-workers": 3, "--runtime": "process"})
        assert (config.model.path, config.cluster.decode_workers, config.cluster.runtime) == ("m", 3, "process")
        assert config.router.grpc_port == 50051

    def test_override_the_environment_and_the_file(self, tmp_path: pathlib.Path) -> None:
        file = written(tmp_path, "{prefill_workers: 2, decode_workers: 2, http_port: 2}")
        config = load(file, {"--decode-workers": 5}, BATON_DECODE_WORKERS="4", BATON_HTTP_PORT="4")
        assert (config.cluster.prefill_workers, config.router.http_port, config.cluster.decode_workers) == (2, 4, 5)

    def test_every_flag_sets_a_value_that_exists(self) -> None:
        assert set(schema.FLAGS.values()) <= set(schema.values())


class TestFile:
    def test_sections_reach_what_no_flag_does(self, tmp_path: pathlib.Path) -> None:
        file = written(tmp_path, "transfer: {lease_s: 3}\nlog: {level: debug}\nready_file: r.json\ncluster:\n")
        config = load(file)
        assert (config.transfer.lease_s, config.log.level, config.ready_file) == (3.0, "debug", "r.json")

    def test_sections_may_have_sections(self, tmp_path: pathlib.Path) -> None:
        config = load(written(tmp_path, "cluster: {prefill_placement: {strategy: pack, labels: {zone: a}}}"))
        assert config.cluster.prefill_placement.strategy == "pack"
        assert config.cluster.prefill_placement.labels == {"zone": "a"}

    def test_the_names_of_flags_do_at_the_top(self, tmp_path: pathlib.Path) -> None:
        file = written(tmp_path, "model: /from/file\nhttp_port: 0\nprefill_workers: 2\ntransports: [grpc]\n")
        config = settings.load(file, {}, {})
        assert (config.model.path, config.router.http_port, config.cluster.prefill_workers) == ("/from/file", 0, 2)
        assert config.transfer.transports == ("grpc",)

    @pytest.mark.parametrize("flag", sorted(schema.FLAGS))
    def test_every_flag_has_such_a_name(self, flag: str) -> None:
        assert schema.aliases()[flag.removeprefix("--").replace("-", "_")] == schema.FLAGS[flag]

    def test_anchors_are_merged(self, tmp_path: pathlib.Path) -> None:
        config = load(written(tmp_path, "decode: &d {watermark: 0.1}\ncluster: {decode_workers: 2}\n"))
        assert (config.decode.watermark, config.cluster.decode_workers) == (0.1, 2)

    def test_the_environment_may_name_it(self, tmp_path: pathlib.Path) -> None:
        assert load(BATON_CONFIG=written(tmp_path, "decode_workers: 7")).cluster.decode_workers == 7


class TestEnvironment:
    def test_flags_names_and_places(self) -> None:
        config = load(
            BATON_HTTP_PORT="0",
            BATON_DECODE__MAX_BATCH_SEQS="9",
            BATON_CACHE__ENABLE_PREFIX_CACHE="false",
            BATON_TRANSPORTS="shm, grpc",
            BATON_SERVED_MODEL_NAME="7",
            BATON_CLUSTER__PREFILL_PLACEMENT__LABELS="{zone: a}",
            BATON_RAY_ADDRESS="",
        )
        assert (config.router.http_port, config.decode.max_batch_seqs, config.cache.enable_prefix_cache) == (
            0,
            9,
            False,
        )
        assert (config.transfer.transports, config.model.served_name) == (("shm", "grpc"), "7")
        assert config.cluster.prefill_placement.labels == {"zone": "a"}
        assert config.cluster.ray_address is None

    def test_keys_come_without_a_flag(self) -> None:
        assert load(BATON_API_KEYS="one,two").router.api_keys == ("one", "two")

    def test_what_is_no_setting_is_named(self) -> None:
        environ = {"BATON_HTPP_PORT": "1", "BATON_REQUIRE_TOOLS": "1", "BATON_TEST_CLUSTER": "x", "BATON_API_KEY": "k"}
        assert settings.unknown_variables(environ) == ["BATON_HTPP_PORT is no setting; did you mean BATON_HTTP_PORT?"]

    def test_services_of_kubernetes_are_no_settings(self) -> None:
        """For a Service named baton, one named baton-http, and their ports."""
        environ = {
            "BATON_SERVICE_HOST": "10.0.0.1",
            "BATON_SERVICE_PORT_GRPC": "50051",
            "BATON_PORT": "tcp://10.0.0.1:50051",
            "BATON_PORT_50051_TCP_ADDR": "10.0.0.1",
            "BATON_HTTP_PORT": "tcp://10.0.0.1:80",
        }
        assert settings.unknown_variables(environ) == []
        assert load(None, None, **environ).router.http_port == 8000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {path: m, dtypo: x}", ":1: model.dtypo: unknown name; did you mean model.dtype?"),
        ("decode_werkers: 3", ":1: decode_werkers: unknown name; did you mean decode_workers?"),
        ("cluster:\n  grpc_port: 3", ":2: cluster.grpc_port: unknown name; did you mean router.grpc_port?"),
        ("cluster: {zzz: 3}", ":1: cluster.zzz: unknown name$"),
        ("cluster:\n  decode_workers: 0", ":2: cluster.decode_workers 0: must be at least 1$"),
        ("decode_workers: two", ":1: decode_workers two: must be a whole number"),
        ("decode: {watermark: 1}", ":1: decode.watermark 1: must be below 1$"),
        ("transfer: {frame_bytes: 1073741825}", ":1: transfer.frame_bytes 1073741825: must be at most 1073741824$"),
        ("transfer: {lease_s: 0}", ":1: transfer.lease_s 0: must be above 0$"),
        ("device: tpu", ":1: device tpu: must be auto, cpu or cuda$"),
        (
            "transports: [shm, carrier]",
            r":1: transports \['shm', 'carrier'\]: item \[1\]: must be loopback, cuda_ipc, shm, collective or grpc",
        ),
        ("transports: []", "transfer.transports: must name at least one"),
        ("served_model_name: ' x'", ":1: served_model_name  x: must have no blanks at its ends"),
        ("{grpc_port: 5, http_port: 5}", "router.http_port: 5 is grpc_port as well .*grpc_port 5, .*http_port 5"),
        ("transfer: {ring_bytes: 5}", "transfer.ring_bytes: 5 is less than frame_bytes, 4194304 .*ring_bytes 5"),
        ("cluster: [1]", ":1: cluster: must be a section"),
        ("{cluster: {decode_workers: 1},\ndecode_workers: 2}", "decode_workers and cluster.decode_workers .*:1.*same"),
        ("http_port: 1\nhttp_port: 2", ":2: http_port: is in .*:1 already"),
        ("just text", "must hold names and values"),
        ("model: {path: [", "not YAML: expected the node content, but found '<stream end>', line 1, column 16$"),
        ("model: [m\nlog: x", "not YAML: expected ',' or ']', but got ':', line 2, column 4$"),
    ],
)
def test_what_is_wrong_in_a_file_is_named_with_its_line(tmp_path: pathlib.Path, text: str, message: str) -> None:
    with pytest.raises(StartError, match=message):
        load(written(tmp_path, text))


@pytest.mark.parametrize(
    ("flags", "environ", "message"),
    [
        ({"--decode-workers": 0}, {}, "^--decode-workers 0: must be at least 1$"),
        ({}, {"BATON_DECODE_WORKERS": "0"}, "^BATON_DECODE_WORKERS 0: must be at least 1$"),
        ({}, {"BATON_ROUTER__HTTP_PORT": "x"}, "^BATON_ROUTER__HTTP_PORT x: must be a whole number$"),
        ({}, {"BATON_HTTP_PORT": "1", "BATON_ROUTER__HTTP_PORT": "1"}, "are the same setting"),
        ({"--http-port": 70000}, {}, "^--http-port 70000: must be at most 65535$"),
    ],
)
def test_what_is_wrong_elsewhere_is_named(flags: dict[str, object], environ: dict[str, str], message: str) -> None:
    with pytest.raises(StartError, match=message):
        load(None, flags, **environ)


def test_everything_wrong_is_said_at_once(tmp_path: pathlib.Path) -> None:
    with pytest.raises(StartError) as caught:
        load(written(tmp_path, "decode_workers: 0"), {"--http-port": -1})
    assert len(str(caught.value).splitlines()) == 2


def test_secrets_are_in_no_message() -> None:
    with pytest.raises(StartError) as caught:
        load(BATON_API_KEYS="secret word")
    assert "secret" not in str(caught.value)
    assert "BATON_API_KEYS: each must have" in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "api_keys: [sesame-1\nsesame-2: x",
        "api_keys: *sesame",
        "api_keys: !sesame x",
        "api_keys: %sesame",
        'api_keys: "sesame\\q"',
        "api_keys: [a]\n  sesame: @",
        "api_keys: sesame\x07",
    ],
)
def test_what_is_not_yaml_is_placed_but_not_quoted(tmp_path: pathlib.Path, text: str) -> None:
    with pytest.raises(StartError, match=r"not YAML: \w") as caught:
        load(written(tmp_path, text))
    assert "sesame" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert re.search(r", line \d+(, column \d+)?$", str(caught.value))


def test_a_missing_file_and_a_missing_model_are_named() -> None:
    with pytest.raises(StartError, match=r"--config /nowhere.yaml: No such file"):
        load("/nowhere.yaml")
    with pytest.raises(StartError, match="--model is required"):
        settings.load(None, {}, {})


class TestPrinting:
    def test_the_effective_configuration_has_origins(self, tmp_path: pathlib.Path) -> None:
        file = written(tmp_path, "model: m\ndecode:\n  watermark: 0.1\nmax_batch_seqs: 128")
        text = settings.read(file, {"--http-port": 9}, {"BATON_LOG_LEVEL": "debug"}).to_yaml()
        assert f"  path: m  # {file}:1 model\n" in text
        assert f"  watermark: 0.1  # {file}:3\n" in text
        assert "  http_port: 9  # --http-port\n" in text
        assert "  level: debug  # BATON_LOG_LEVEL\n" in text
        # What was set to its default is the default.
        assert "  max_batch_seqs: 128\n" in text

    def test_it_can_be_read_again(self, tmp_path: pathlib.Path) -> None:
        flags = {"--served-model-name": "null", "--transports": ["grpc"], "--ray-address": "h:1", "--http-port": 0}
        environ = {"BATON_CLUSTER__DECODE_PLACEMENT__LABELS": "{zone: a}", "BATON_TLS_CERT_FILE": "c: #"}
        environ["BATON_TLS_KEY_FILE"] = "k"
        first = settings.read(None, {"--model": "my model", **flags}, environ)
        second = settings.read(written(tmp_path, first.to_yaml()), {}, {})
        assert second.config == first.config

    def test_secrets_are_not_in_it(self) -> None:
        text = settings.read(None, {"--model": "m"}, {"BATON_API_KEYS": "sesame"}).to_yaml()
        assert "sesame" not in text
        assert "# api_keys: not shown, from BATON_API_KEYS" in text


class TestResolving:
    @pytest.mark.parametrize(("num_cpus", "num_threads"), [(2, 1), (8, 4), (1, 1)])
    def test_workers_share_the_machines_cpus(self, num_cpus: int, num_threads: int) -> None:
        assert settings.resolve(load(), num_cpus).model.num_threads == num_threads

    def test_threads_that_were_given_or_are_elsewhere_are_left_alone(self) -> None:
        assert settings.resolve(load(BATON_NUM_THREADS="3"), 8).model.num_threads == 3
        assert settings.resolve(load(flags={"--ray-address": "head:6379"}), 8).model.num_threads == 0

    def test_the_models_path_becomes_absolute(self) -> None:
        assert settings.resolve(load(), 1).model.path == str(pathlib.Path("m").absolute())


def test_every_setting_says_what_it_is() -> None:
    for value in schema.values().values():
        assert re.fullmatch(r"\S.*[.]", value.description), value.place
