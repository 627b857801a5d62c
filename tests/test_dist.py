"""The wheel is whole: it installs into an empty environment and its command runs there."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ("src", "pyproject.toml", "README.md", "LICENSE", "NOTICE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make dist` builds, from a copy: setuptools leaves its own files beside the sources."""
    source = tmp_path_factory.mktemp("source")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
        else:
            shutil.copy(ROOT / part, source / part)
    run("pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", source / "dist", source)
    (found,) = (source / "dist").glob("frankenmoe-*.whl")
    return found


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel in it, which finds everything else among the packages of this one."""
    folder = tmp_path_factory.mktemp("environment")
    run("venv", "--without-pip", folder)
    run("pip", "--python", folder / "bin" / "python", "install", "--no-deps", "--no-index", wheel)
    (packages,) = folder.glob("lib/python*/site-packages")
    # a path in a .pth file is searched last, and .pth files in it (an editable frankenmoe) are not read
    (packages / "others.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    return folder


def run(module: str, *arguments: str | Path) -> None:
    done = subprocess.run([sys.executable, "-m", module, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def installed(environment: Path, program: str, *arguments: str, folder: Path) -> str:
    """What a program of the environment prints, run in `folder`, away from this source tree."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [environment / "bin" / program, *arguments]
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_has_every_module_and_its_data(wheel: Path) -> None:
    source = ROOT / "src"
    wanted = {str(file.relative_to(source)) for file in source.rglob("*.py")}
    wanted |= {str(file.relative_to(source)) for file in source.glob("frankenmoe/**/assets/*") if file.is_file()}
    assert any("assets" in name for name in wanted)
    names = set(zipfile.ZipFile(wheel).namelist())
    assert sorted((wanted | {"frankenmoe/py.typed"}) - names) == []
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_wheel_describes_itself(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith("METADATA"))
    metadata = archive.read(name).decode().partition("\n\n")[0]
    for field in ("Author", "License-Expression", "Keywords", "Classifier", "Project-URL", "Requires-Python"):
        assert f"\n{field}: " in metadata


def test_the_installed_command_is_the_wheels(environment: Path, tmp_path: Path) -> None:
    where = installed(environment, "python", "-c", "import frankenmoe; print(frankenmoe.__file__)", folder=tmp_path)
    assert Path(where.strip()).is_relative_to(environment)
    assert "offline" in installed(environment, "frankenmoe", "demo", "--help", folder=tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_installed_demo_runs(environment: Path, tmp_path: Path) -> None:
    assert "Verification" in installed(environment, "frankenmoe", "demo", folder=tmp_path)
    assert (tmp_path / "demo-out" / "run" / "model" / "reports" / "audit.html").is_file()
