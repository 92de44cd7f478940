"""What a node must have in common with the one where `baton serve` runs."""

from __future__ import annotations

import pathlib

from deploy.installation import describe_problem, installed_versions


def test_a_node_with_the_same_versions_and_the_checkpoint_will_do(tmp_path: pathlib.Path) -> None:
    assert describe_problem(installed_versions(), str(tmp_path)) == ""


def test_every_difference_is_named(tmp_path: pathlib.Path) -> None:
    versions = {**installed_versions(), "Baton": "9.9", "Python": "2.7"}
    here = installed_versions()
    assert describe_problem(versions, str(tmp_path)) == (
        f"Baton is {here['Baton']} here and 9.9 where baton serve runs; "
        f"Python is {here['Python']} here and 2.7 where baton serve runs"
    )


def test_a_build_for_another_device_is_the_same_version(tmp_path: pathlib.Path) -> None:
    assert "+" not in installed_versions()["torch"]


def test_a_checkpoint_that_is_not_there_is_named(tmp_path: pathlib.Path) -> None:
    problem = describe_problem(installed_versions(), str(tmp_path / "absent"))
    assert problem == f"--model {tmp_path}/absent: no such directory; every node needs the checkpoint at this path"
