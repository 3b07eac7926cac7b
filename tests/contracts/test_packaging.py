"""What is published: the wheel, the sdist, the version ranges. Built here, as `make dist` does."""

from __future__ import annotations

import email
import re
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from pathlib import Path

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    "memsafe": "core/memsafe",
    "llama_index_memsafe": "llama_index_memsafe",
    "langchain_memsafe": "langchain_memsafe",
    "chroma_memsafe": "chroma_memsafe",
    "haystack_memsafe": "haystack_memsafe",
}


def build(target: str, source: Path, folder: Path) -> Path:
    """Build `target` ("wheel" or "sdist") of the checkout at `source` into `folder`; returns the one file made."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(folder)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (made,) = folder.iterdir()
    return made


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdist", ROOT, tmp_path_factory.mktemp("sdist"))


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def metadata(wheel: Path) -> Message:
    (name,) = [name for name in contents(wheel) if name.endswith(".dist-info/METADATA")]
    return email.message_from_bytes(contents(wheel)[name])


def test_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    """Every module of ours is in the wheel, byte for byte, with py.typed; no tests, examples, models or `core`."""
    inside = contents(wheel)
    ours = {
        f"{package}/{path.relative_to(ROOT / folder).as_posix()}": path.read_bytes()
        for package, folder in PACKAGES.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix in {".py", ".typed"}
    }
    assert {name for name in inside if ".dist-info/" not in name} == set(ours)
    assert {name: inside[name] for name in ours} == ours
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(ours)


def test_wheel_carries_its_licence_and_promises_only_what_is_there(wheel: Path) -> None:
    """The licence text travels with the wheel; extras and the oldest Python are those of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    described = metadata(wheel)
    assert any(name.endswith("/licenses/LICENSE") for name in contents(wheel))
    assert described["License-Expression"] == "Apache-2.0"
    assert described["Requires-Python"] == ">=3.10"
    assert set(described.get_all("Provides-Extra", [])) == set(project["optional-dependencies"])
    (everything,) = map(Requirement, project["optional-dependencies"]["all"])
    left_out = {"all", "ray", "chroma", "langchain-qdrant", "onnx", "openvino"}  # large: for clusters, stores, and CPUs
    assert everything.extras == set(project["optional-dependencies"]) - left_out


def test_sdist_builds_the_same_wheel(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    """Whoever builds from the sdist gets the wheel that is published."""
    with tarfile.open(sdist) as archive:
        if sys.version_info >= (3, 12):
            archive.extractall(tmp_path, filter="data")
        else:
            archive.extractall(tmp_path)
    (source,) = tmp_path.iterdir()
    assert not (source / "examples").exists()
    again = build("wheel", source, tmp_path / "dist")
    assert again.name == wheel.name
    assert contents(again) == contents(wheel)


def test_installed_wheel_is_what_is_imported(wheel: Path, tmp_path: Path) -> None:
    """Installed outside the checkout, `memsafe` imports from there and says its version."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-qq",
        "--no-deps",
        "--target",
        str(tmp_path / "site"),
        str(wheel),
    ]
    subprocess.run(command, check=True, capture_output=True)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "import memsafe; print(memsafe.__file__)\n"
        "from importlib.metadata import version; print(version('memsafe'))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    file, version = done.stdout.split()
    assert Path(file) == tmp_path / "site" / "memsafe" / "__init__.py"
    assert version == metadata(wheel)["Version"]


def test_core_is_a_drawer_not_a_package() -> None:
    """`import core.memsafe` must never become possible by accident: it would be a second copy of every module."""
    assert not (ROOT / "core" / "__init__.py").exists()


def pins(file: str) -> list[Requirement]:
    lines = (re.sub(r"\s*#.*", "", line) for line in (ROOT / file).read_text(encoding="utf-8").splitlines())
    return [Requirement(line) for line in lines if line]


@pytest.mark.parametrize("file", ["constraints.txt", "constraints-lowest.txt"])
def test_pins_lie_within_the_declared_ranges(file: str) -> None:
    """What is tested is inside the ranges that the package declares, at both ends."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    declared = list(pyproject["project"]["dependencies"])
    declared += [line for lines in pyproject["project"]["optional-dependencies"].values() for line in lines]
    ranges = {r.name: r.specifier for r in map(Requirement, declared) if r.name != "memsafe"}
    pinned = [pin for pin in pins(file) if pin.name in ranges]
    assert {pin.name for pin in pinned} == set(ranges)
    for pin in pinned:
        (specifier,) = pin.specifier
        assert specifier.operator == "=="
        assert ranges[pin.name].contains(specifier.version), f"{pin} is outside {ranges[pin.name]}"
        if file == "constraints-lowest.txt":
            lowest = next(s.version for s in ranges[pin.name] if s.operator == ">=")
            assert specifier.version.startswith(lowest), (
                f"{pin.name}: {lowest} is declared, {specifier.version} is tested"
            )
