"""What is installed is whole: the wheel works away from the checkout, beside the packages that are here."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def _call(*command: str | Path, cwd: Path) -> str:
    """stdout of a command that has to work."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP"))}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    _call(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts of a fresh environment with the wheel in it, which borrows all other packages from here."""
    folder = tmp_path_factory.mktemp("installed")
    _call(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    scripts = folder / "venv" / "bin"
    pip = (sys.executable, "-m", "pip", "--python", scripts / "python")
    _call(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=folder)
    (packages,) = (folder / "venv").glob("lib/python*/site-packages")
    # a path in a .pth is only a path: the editable installation of the checkout, a .pth too, stays behind
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return scripts


def test_the_wheel_holds_the_package_and_the_presets_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "gkdcli").rglob("*.py")}
    presets = {f"gkdcli/presets/{path.name}" for path in (ROOT / "presets").glob("*.toml")}
    assert {name for name in names if ".dist-info/" not in name} == modules | presets
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_it_works_from_another_folder(installed: Path, tmp_path: Path) -> None:
    where = _call(installed / "python", "-c", "import gkdcli; print(gkdcli.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(installed.parent)
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert _call(installed / "gkd", "--version", cwd=tmp_path) == f"gkd {version}\n"
    page = tomllib.loads(
        _call(installed / "gkd", "distill", "--preset", "hmdb51", "--show-config", cwd=tmp_path)
    )
    assert (page["name"], page["clips"]["short_side"], page["optim"]["epochs"]) == ("hmdb51", 240, 200)
    assert _call(installed / "python", "-m", "gkdcli", "--version", cwd=tmp_path) == f"gkd {version}\n"


def test_it_finds_all_its_modules(installed: Path, tmp_path: Path) -> None:
    """A module that is forgotten in the wheel shows only when it is imported."""
    code = (
        "import importlib, pkgutil, gkdcli\n"
        "for found in pkgutil.walk_packages(gkdcli.__path__, 'gkdcli.'):\n"
        "    found.name.endswith('__main__') or importlib.import_module(found.name)\n"
    )
    _call(installed / "python", "-c", code, cwd=tmp_path)
