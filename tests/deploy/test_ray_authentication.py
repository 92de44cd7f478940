"""What is done about Ray's token where the user has not said it."""

from __future__ import annotations

import pathlib

import pytest

from deploy.environment import set_ray_authentication


@pytest.fixture(autouse=True)
def home(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    monkeypatch.setattr(pathlib.Path, "home", lambda: tmp_path)
    return tmp_path


def test_a_local_ray_gets_a_token_of_its_own() -> None:
    first: dict[str, str] = {}
    second: dict[str, str] = {}
    set_ray_authentication(first, joining=False)
    set_ray_authentication(second, joining=False)
    assert first.keys() == {"RAY_AUTH_TOKEN"}
    assert len(first["RAY_AUTH_TOKEN"]) == 64
    assert first != second


@pytest.mark.parametrize("variable", ["RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"])
def test_a_cluster_is_offered_the_token_of_the_environment(variable: str) -> None:
    environ = {variable: "x"}
    set_ray_authentication(environ, joining=True)
    assert environ == {variable: "x", "RAY_AUTH_MODE": "token"}


def test_a_cluster_is_offered_the_token_in_the_home(home: pathlib.Path) -> None:
    environ: dict[str, str] = {}
    set_ray_authentication(environ, joining=True)
    assert environ == {}
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("x")
    set_ray_authentication(environ, joining=True)
    assert environ == {"RAY_AUTH_MODE": "token"}


@pytest.mark.parametrize("joining", [False, True])
def test_what_the_user_says_stays(joining: bool) -> None:
    environ = {"RAY_AUTH_MODE": "disabled"}
    set_ray_authentication(environ, joining=joining)
    assert environ == {"RAY_AUTH_MODE": "disabled"}
