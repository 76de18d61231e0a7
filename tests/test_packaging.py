"""What a user installs: a wheel that holds the data beside the code, and versions that are pinned for `make`."""

from __future__ import annotations

import ast
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from foveate.families.rows import FAMILIES
from foveate.runtime.seams import TESTED

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
INSTALLED_BY_MAKE = ("dev", "draw", "train")
USED_THROUGH_TRANSFORMERS = {"tensorboard"}  # its Trainer writes what tensorboard shows


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("dist")
    (built,) = WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])
    return zipfile.ZipFile(built)


def test_the_wheel_holds_every_file_of_the_package(wheel: zipfile.ZipFile) -> None:
    source = ROOT / "src"
    caches = ("__pycache__", ".ruff_cache", ".mypy_cache")
    files = [path for path in source.rglob("*") if path.is_file() and not set(caches) & set(path.parts)]
    wanted = {path.relative_to(source).as_posix() for path in files}
    assert {"foveate/py.typed", "foveate/scenes/checkpoint/model.safetensors"} <= wanted
    held = set(wheel.namelist())
    assert wanted - held == set()
    assert {name.split("/")[0] for name in held} == {"foveate", f"foveate-{PROJECT['version']}.dist-info"}


def test_the_wheel_carries_the_licences_and_the_command(wheel: zipfile.ZipFile) -> None:
    info = f"foveate-{PROJECT['version']}.dist-info"
    names = {Path(name).name for name in wheel.namelist() if name.startswith(f"{info}/licenses/")}
    assert {"LICENSE", "NOTICE", "OFL.txt", "DEJAVU-LICENSE.txt"} <= names
    assert "foveate = foveate.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()


def test_the_version_is_written_once() -> None:
    import foveate

    assert foveate.__version__ == PROJECT["version"]


def imported() -> set[str]:
    """Names of the packages that some module of the source imports, whenever it does."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "src").rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("extra", sorted(PROJECT["optional-dependencies"].keys() - {"dev"}))
def test_an_extra_has_code_behind_it(extra: str) -> None:
    needed = {Requirement(text).name.replace("-", "_") for text in PROJECT["optional-dependencies"][extra]}
    assert needed - imported() - USED_THROUGH_TRANSFORMERS == set()


def pins(file: str = "constraints.txt") -> dict[str, str]:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(each.name): str(each.specifier).removeprefix("==") for each in requirements}


def direct() -> list[Requirement]:
    extras = [text for extra in INSTALLED_BY_MAKE for text in PROJECT["optional-dependencies"][extra]]
    return [Requirement(text) for text in [*PROJECT["dependencies"], *extras]]


@pytest.mark.parametrize("requirement", direct(), ids=lambda requirement: requirement.name)
def test_a_dependency_is_pinned_inside_its_range(requirement: Requirement) -> None:
    assert pins().get(canonicalize_name(requirement.name), "no pin") in requirement.specifier


def test_what_a_pinned_package_needs_is_pinned_too() -> None:
    pinned = pins()
    for name in pinned.keys() - {"torch"}:  # what torch needs depends on the build
        for text in metadata.requires(name) or ():
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                assert canonicalize_name(needed.name) in pinned, f"{name} needs {needed.name}"


def test_pins_are_exact_and_fit_every_machine() -> None:
    assert all(version and version[0].isdigit() and "+" not in version for version in pins().values())


# ---------------------------------------------------------------------------------------------------------------------
# the lowest versions

AT_THE_FLOOR_ELSEWHERE = {"torch"}  # a second build of it would be as large again


def floors() -> dict[str, str]:
    """The lowest version of each dependency that a user gets."""
    found = {}
    for requirement in map(Requirement, PROJECT["dependencies"]):
        (lowest,) = [one.version for one in requirement.specifier if one.operator == ">="]
        found[canonicalize_name(requirement.name)] = lowest
    return found


@pytest.mark.parametrize("name", sorted(floors().keys() - AT_THE_FLOOR_ELSEWHERE))
def test_the_lowest_environment_holds_the_lowest_versions(name: str) -> None:
    pinned = Version(pins("constraints-lowest.txt")[name])
    assert pinned == Version(floors()[name])


def test_the_rest_of_the_lowest_environment_is_pinned_as_elsewhere() -> None:
    lowest, usual = pins("constraints-lowest.txt"), pins()
    assert lowest["torch"] == usual["torch"]
    assert all(Version(lowest[name]) <= Version(usual[name]) for name in lowest.keys() & usual.keys())
    assert lowest.keys() - usual.keys() == {"attrs"}  # which older versions of hypothesis need


def test_the_harness_is_pinned_on_what_the_tests_run_on() -> None:
    harness, usual = pins("constraints-eval.txt"), pins()
    older = {"protobuf", "python-dateutil"}  # which others of its packages need
    assert {name: harness[name] for name in harness.keys() & usual.keys() - older} == {
        name: usual[name] for name in harness.keys() & usual.keys() - older
    }
    (wanted,) = map(Requirement, PROJECT["optional-dependencies"]["eval"])
    assert harness[wanted.name] in wanted.specifier


@pytest.mark.parametrize("which", ["lowest", "newest"])
def test_what_runs_on_other_versions_is_there(which: str) -> None:
    lines = (ROOT / "tests" / f"{which}.txt").read_text(encoding="utf-8").splitlines()
    assert lines
    for line in lines:
        file, _, function = line.partition("::")
        text = (ROOT / file).read_text(encoding="utf-8")
        assert not function or f"def {function}(" in text, line


def test_the_lowest_transformers_is_that_of_the_families() -> None:
    lowest = min(Version(family.transformers) for family in FAMILIES)
    assert lowest == Version(floors()["transformers"])


def test_no_transformers_can_be_installed_that_nobody_has_tried() -> None:
    (allowed,) = [one.specifier for one in map(Requirement, PROJECT["dependencies"]) if one.name == "transformers"]
    highest = Version(TESTED[1])
    assert allowed == SpecifierSet(f">={TESTED[0]},<{highest.major}.{highest.minor + 1}")
    tried = [Version(pins(f"constraints-{which}.txt")["transformers"]) for which in ("lowest", "newest")]
    assert [f"{one.major}.{one.minor}" for one in tried] == list(TESTED)
    assert tried[0] < Version(pins()["transformers"]) <= tried[1]
