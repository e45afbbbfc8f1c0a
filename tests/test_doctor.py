"""`gkd --doctor`: is everything here, and what is missing?"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from gkdcli import doctor

ROWS = [
    "gkd", "python", "cores", "torch", "torchvision", "av", "opencv-contrib-python-headless", "h5py", "numpy",
    "safetensors", "lightning-fabric", "pydantic", "typer", "rich", "matplotlib", "onnx", "onnxscript",
    "onnxruntime", "ray", "tensorboard", "torchvision beside torch", "CUDA", "driver", "decoder", "HDF5",
    "disk",
]  # fmt: skip


def test_here_everything_is_well(gkd: Callable[..., Any]) -> None:
    outcome = gkd("--doctor", "--json").must()
    assert outcome.err == ""
    document = outcome.json
    assert (document["ok"], document["command"]) == (True, "doctor")
    assert document["result"]["healthy"] is True
    rows = {row["check"]: row for row in document["result"]["checks"]}
    assert list(rows) == ROWS
    for name, row in rows.items():
        assert row["state"] == "ok" or name in ("CUDA", "driver"), row
        assert row["found"]
    assert "24 frames written and read back" in rows["decoder"]["found"]
    assert "free under" in rows["disk"]["found"]


def test_the_table_has_a_line_for_each_check(gkd: Callable[..., Any]) -> None:
    lines = gkd("--doctor").must().out.splitlines()
    assert lines[0].split() == ["healthy", "yes"]
    assert [
        next(name for name in sorted(ROWS, key=len, reverse=True) if line.startswith(name))
        for line in lines[4:]
    ] == ROWS


@pytest.mark.parametrize("json", [False, True])
def test_what_fails_is_named_and_ends_with_1(
    gkd: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, json: bool
) -> None:
    def broken() -> str:
        raise AssertionError  # a check may fail without a word

    monkeypatch.setattr(doctor, "PACKAGES", (*doctor.PACKAGES, "no-such-package"))
    monkeypatch.setattr(doctor, "_hdf5", broken)
    outcome = gkd("--doctor", *(["--json"] if json else []))
    assert outcome.code == 1
    assert outcome.err.splitlines() == [
        "error: this installation lacks: no-such-package, HDF5",
        "where: `gkd --doctor`",
        "hint: reinstall with `pip install .`",
    ]
    if json:
        document = outcome.json
        assert document["ok"] is False
        assert document["error"]["code"] == 1
        failed = [row["check"] for row in document["result"]["checks"] if row["state"] == "FAILED"]
        assert failed == ["no-such-package", "HDF5"]
    else:
        assert [line.split()[0] for line in outcome.out.splitlines() if "FAILED" in line] == [
            "no-such-package",
            "HDF5",
        ]


def test_an_absent_extra_is_no_illness(gkd: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "OPTIONAL", ("no-such-package",))
    rows = gkd("--doctor", "--json").must().json["result"]["checks"]
    assert [row["state"] for row in rows if row["check"] == "no-such-package"] == ["absent"]


def test_the_doctor_comes_also_where_packages_do_not_import() -> None:
    """It is called for exactly such installations; a broken package fails its row, not the command."""
    code = (
        "import sys; sys.modules['av'] = sys.modules['h5py'] = None\n"
        "from gkdcli.cli import run; sys.exit(run(['--doctor', '--json']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: this installation lacks: decoder, HDF5\n")
