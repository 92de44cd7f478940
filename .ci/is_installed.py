"""Exits with 0 when this environment holds this checkout of Baton with everything that pyproject.toml asks for."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import pathlib
import sys
import tomllib

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent


def missing_requirements(project: dict[str, object]) -> list[str]:
    """Requirements of the project and of its tests that are absent or too old."""
    try:
        from packaging.requirements import Requirement
    except ModuleNotFoundError:
        return ["packaging"]
    dependencies: list[str] = project["dependencies"]  # type: ignore[assignment]
    extras: dict[str, list[str]] = project["optional-dependencies"]  # type: ignore[assignment]
    missing = []
    for text in [*dependencies, *extras["dev"]]:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(text)
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            missing.append(text)
    return missing


def missing_packages(patterns: list[str]) -> list[str]:
    """Packages of this checkout that would not be imported from it, wherever Python is started."""
    os.chdir("/")
    sys.path[:] = [entry for entry in sys.path if pathlib.Path(entry or ".").resolve() != REPOSITORY / ".ci"]
    missing = []
    for package in (pattern.rstrip("*") for pattern in patterns):
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None or not pathlib.Path(spec.origin).is_relative_to(REPOSITORY):
            missing.append(package)
    return missing


if __name__ == "__main__":
    description = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    lacking = missing_requirements(description["project"])
    lacking += missing_packages(description["tool"]["setuptools"]["packages"]["find"]["include"])
    if lacking:
        print("to be installed: " + ", ".join(lacking))
    sys.exit(1 if lacking else 0)
