"""The wheel that users get, built from a copy of the tree and installed where nothing else of this repository is."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.parser import Parser
from importlib.util import find_spec
from pathlib import Path

import pytest

import relex_verl

PACKAGE = Path(relex_verl.__file__).parent
ROOT = PACKAGE.parent
NO_REGISTRY = ("No matching distribution", "Could not find a version", "No module named pip")
SHIPPED = (".css", ".js", ".md", ".py", ".typed")  # ends of the names of all files below relex_verl/ that are shipped
ALONE = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # without this checkout

pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="not a checkout of the repository")


def run(*command: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A command that knows nothing of this checkout."""
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env=ALONE, cwd=cwd, timeout=120
    )


def output(*command: object, cwd: Path | None = None) -> str:
    done = run(*command, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a build reads, and no leftovers of another; with the documents that a package may have."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("relex_verl", "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tree / "relex_verl" / "docs").mkdir(exist_ok=True)
    (tree / "relex_verl" / "docs" / "page.md").write_text("# A page\n")
    (tree / "relex_verl" / "CHANGELOG.md").touch()
    return tree


@pytest.fixture(scope="module")
def isolation() -> list[str]:
    """pip's option for a build without the registry, where this Python has what a build needs."""
    return ["--no-build-isolation"] if find_spec("setuptools") else []


@pytest.fixture(scope="module")
def wheel(tree: Path, isolation: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    done = run(sys.executable, "-m", "pip", "wheel", "--no-deps", *isolation, "--wheel-dir", out, tree)
    if done.returncode and any(words in done.stderr for words in NO_REGISTRY):
        pytest.skip(f"pip cannot build a wheel here: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of commands of a fresh environment with the wheel in it; it borrows this one's other packages."""
    folder = tmp_path_factory.mktemp("environment")
    output(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    output(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    site = output(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    # After the installation: pip would find this environment's relex-verl. Python asks the fresh one's own folder first.
    Path(site, "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "bin"


def shipped(tree: Path) -> set[str]:
    return {str(path.relative_to(tree)) for path in (tree / "relex_verl").rglob("*") if path.is_file()}


def test_the_wheel_holds_the_package_whole_and_nothing_else(tree: Path, wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == shipped(tree)
    assert {"relex_verl/py.typed", "relex_verl/docs/page.md", "relex_verl/CHANGELOG.md"} <= names
    assert {Path(name).suffix for name in names} == set(SHIPPED)


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = Parser().parsestr(archive.read(name).decode())
    assert metadata["Name"] == "relex-verl"
    assert metadata["Version"] == relex_verl.__version__
    assert {line.split(",")[0] for line in metadata.get_all("Project-URL")} == {
        "Homepage", "Documentation", "Changelog", "Issues",
    }  # fmt: skip
    versions = [line.split(" :: ")[-1] for line in metadata.get_all("Classifier") if ":: Python :: 3." in line]
    assert versions == ["3.10", "3.11", "3.12"]
    assert metadata.get_payload().startswith("# relex-verl")


def test_the_source_distribution_holds_the_same_and_the_readme(
    tree: Path, isolation: list[str], tmp_path: Path
) -> None:
    if not isolation:
        pytest.skip("a source distribution is built with the setuptools of this environment, which has none")
    code = f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})"
    output(sys.executable, "-c", code, cwd=tree)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    assert shipped(tree) | {"README.md", "LICENSE", "pyproject.toml"} <= names


def test_it_is_the_installed_one_that_runs(installed: Path) -> None:
    where = output(installed / "python", "-c", "import relex_verl; print(relex_verl.__file__)", cwd=installed)
    assert Path(where.strip()).is_relative_to(installed.parent)


def test_the_version_is_told_at_once(installed: Path) -> None:
    done = run(installed / "python", "-X", "importtime", installed / "relex-verl", "--version", cwd=installed)
    assert done.stdout == f"relex-verl {relex_verl.__version__}\n"
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "relex_verl.__main__" in loaded
    assert not loaded & {"torch", "numpy", "typer", "rich"}


def test_the_commands_are_there(installed: Path) -> None:
    printed = output(installed / "relex-verl", "--help", cwd=installed)
    for word in ("Usage: relex-verl", "--version", "ingest", "extrapolate", "checkout", "baseline"):
        assert word in printed
    assert output(installed / "python", "-m", "relex_verl", "--version") == f"relex-verl {relex_verl.__version__}\n"


def test_the_entry_points_are_there(installed: Path) -> None:
    code = """if True:
        import importlib.metadata as metadata, json
        points = metadata.distribution("relex-verl").entry_points
        points["relex-verl"].load()
        print(json.dumps({point.name: [point.group, point.value] for point in points}))
    """
    points = json.loads(output(installed / "python", "-c", code, cwd=installed))
    assert points == {
        "relex": ["verl.plugins", "relex_verl.verl_plugin"],
        "relex-verl": ["console_scripts", "relex_verl.__main__:main"],
    }
