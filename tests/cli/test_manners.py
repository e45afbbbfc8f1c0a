"""How gkd behaves towards shells, terminals and impatient people."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gkdcli.data.store import Store
from gkdcli.launch import Launch

GKD = [sys.executable, "-m", "gkdcli"]
CONFIG = ("distill", "demo", "--show-config")


@pytest.mark.parametrize("words", [CONFIG, (*CONFIG, "--json"), ("--help",), ("distill", "dem", "--json")])
def test_a_reader_that_has_gone_is_no_reason_to_complain(words: tuple[str, ...]) -> None:
    """`gkd ... | head -1`; here the reader leaves before the first byte, so that no buffer hides it."""
    reading, writing = os.pipe()
    os.close(reading)
    with subprocess.Popen([*GKD, *words], stdout=writing, stderr=subprocess.PIPE, text=True) as process:
        os.close(writing)
        _, err = process.communicate(timeout=60)
    assert "Traceback" not in err
    assert "Exception" not in err
    if "dem" not in words:
        assert err == ""
    assert process.returncode == 1


def test_head_gets_its_line() -> None:
    line = f"{' '.join(GKD)} distill demo --show-config | head -1"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["name", "=", '"demo"', "#", "preset", "demo"]
    assert done.stderr == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full is Linux's")
@pytest.mark.parametrize("words", [CONFIG, (*CONFIG, "--json")])
def test_a_result_that_cannot_be_written_is_a_failure(words: tuple[str, ...]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*GKD, *words], stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=60
        )
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "error: the system refuses: No space left on device",
        "where: standard output",
        "hint: check the path, its permissions and the free space",
    ]


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="looks into /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_anything_has_begun(number: signal.Signals, tmp_path: Path) -> None:
    """A real one, sent while torch is being imported."""
    with subprocess.Popen(
        [*GKD, "pretrain-attention", "demo", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    ) as process:
        maps = Path(f"/proc/{process.pid}/maps")
        while "libtorch" not in maps.read_text():
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "error: interrupted\nhint: run the same command again\n"
    document = json.loads(out)
    assert (document["ok"], document["command"]) == (False, "pretrain-attention")
    assert document["error"] == {
        "what": "interrupted",
        "where": "",
        "hint": "run the same command again",
        "code": 130,
    }


def test_ctrl_c_in_the_middle(gkd: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The parser would swallow it and leave --json without a document."""
    monkeypatch.setattr(Store, "open", _raises(KeyboardInterrupt()))
    outcome = gkd("evaluate", "demo", "--json")
    assert (outcome.code, outcome.json["error"]["code"]) == (130, 130)


def test_a_bug_of_ours_keeps_its_trace_in_a_file(
    gkd: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(Store, "open", _raises(ZeroDivisionError("the moon")))
    for words in (("evaluate", "demo"), ("evaluate", "demo", "--json")):
        outcome = gkd(*words)
        (path,) = tmp_path.iterdir()
        assert outcome.code == 70
        assert outcome.err.splitlines() == [
            "error: this is a bug in gkd: ZeroDivisionError: the moon",
            f"where: trace kept in {path}",
            "hint: please report it with that file",
        ]
        trace = path.read_text()
        assert trace.startswith(f"gkd {' '.join(words)}\nTraceback")
        assert trace.endswith("ZeroDivisionError: the moon\n")
        path.unlink()
    assert outcome.json["error"]["code"] == 70


def test_a_bug_where_nothing_can_be_written_is_still_reported(
    gkd: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    monkeypatch.setattr(Store, "open", _raises(ZeroDivisionError("the moon")))
    outcome = gkd("evaluate", "demo")
    assert outcome.code == 70
    assert "could not be kept" in outcome.err


@pytest.mark.parametrize(
    ("error", "what", "where"),
    [
        (
            PermissionError(13, "Permission denied", "/x/report.json"),
            "the system refuses: Permission denied",
            "/x/report.json",
        ),
        (IsADirectoryError(21, "Is a directory", "/x"), "the system refuses: Is a directory", "/x"),
        (
            ModuleNotFoundError("No module named 'cv2'", name="cv2"),
            "this installation is incomplete: No module named 'cv2'",
            "package cv2",
        ),
    ],
)
def test_what_the_system_refuses_is_no_bug(
    gkd: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, error: Exception, what: str, where: str
) -> None:
    monkeypatch.setattr(Store, "open", _raises(error))
    outcome = gkd("evaluate", "demo")
    assert outcome.code == 1
    assert outcome.err.splitlines()[:2] == [f"error: {what}", f"where: {where}"]


def test_a_missing_module_of_our_own_is_a_bug(
    gkd: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(Store, "open", _raises(ImportError("cannot import name 'x'", name="gkdcli.data")))
    assert gkd("evaluate", "demo").code == 70


def _raises(error: BaseException) -> Callable[..., Any]:
    def call(*given: Any) -> Any:
        raise error

    return call


def _on_a_terminal(words: tuple[str, ...], env: dict[str, str]) -> str:
    """Both streams of a command whose terminal is a real one."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [*GKD, *words], stdout=theirs, stderr=theirs, stdin=theirs, env=os.environ | env
    ) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                chunk = os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
            if not chunk:
                break
            shown += chunk
        process.wait(timeout=60)
    os.close(ours)
    return shown.decode()


COLOUR = re.compile(r"\x1b\[[0-9;]*(3[0-7]|4[0-7]|9[0-7])[0-9;]*m")
TERMINAL = {"TERM": "xterm-256color", "COLUMNS": "100"}


def test_colour_is_for_terminals_that_want_it() -> None:
    assert COLOUR.search(_on_a_terminal(("distill", "--help"), TERMINAL))
    assert not COLOUR.search(_on_a_terminal(("distill", "--help"), TERMINAL | {"NO_COLOR": "1"}))
    assert "\x1b" not in _on_a_terminal(CONFIG, TERMINAL)
    assert "\x1b" not in _on_a_terminal(("distill", "dem"), TERMINAL)


def test_a_pipe_gets_no_escape_codes(gkd_process: Callable[..., Any]) -> None:
    for words in (("--help",), ("distill", "--help"), CONFIG, ("distill", "dem")):
        outcome = gkd_process(*words, env=TERMINAL)
        assert "\x1b" not in outcome.out + outcome.err


def test_other_ranks_of_a_run_over_several_processes_are_silent(
    gkd: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise --json would be as many documents as there are processes."""
    monkeypatch.setattr("gkdcli.launch.launched", lambda: Launch(1, 2, 2))
    monkeypatch.setattr("gkdcli.console.launched", lambda: Launch(1, 2, 2))
    for words in (CONFIG, (*CONFIG, "--json")):
        outcome = gkd(*words)
        assert (outcome.code, outcome.out, outcome.err) == (0, "", "")


def test_a_mistake_that_all_ranks_see_is_left_to_the_first(
    gkd: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun ends the others once it has failed; only one that is left alone says it itself."""

    class Ended(BaseException):
        pass

    def end(seconds: float) -> None:
        assert handlers == dict.fromkeys((signal.SIGINT, signal.SIGTERM), signal.SIG_DFL)
        if ended:
            raise Ended

    handlers: dict[int, Any] = {}
    monkeypatch.setattr("gkdcli.launch.launched", lambda: Launch(1, 2, 2))
    monkeypatch.setattr("gkdcli.launch.signal.signal", handlers.__setitem__)
    monkeypatch.setattr("gkdcli.launch.time.sleep", end)
    ended = True
    with pytest.raises(Ended):
        gkd("distill", "dem", "--json")
    ended = False
    outcome = gkd("distill", "dem", "--json")
    assert outcome.code == outcome.json["error"]["code"] == 2
    assert "error: no preset is called `dem`" in outcome.err


@pytest.mark.parametrize("name", ["ümlaut.toml", os.fsdecode(b"\xff.toml")])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_odd_names_and_locales_are_shown_as_well_as_they_can_be(
    name: str, encoding: str, gkd_process: Callable[..., Any], tmp_path: Path
) -> None:
    Path(os.fsencode(tmp_path / name).decode("utf-8", "surrogateescape")).touch()
    env = {"PYTHONIOENCODING": encoding}
    for words, code in (
        (("distill", f"./{name}", "--show-config"), 2),
        (("distill", f"./no-{name}"), 2),
        (("distill", "demo", "--config", f"./{name}", "--show-config"), 0),
    ):
        plain = gkd_process(*words, cwd=tmp_path, env=env)
        assert plain.code == code, plain.err
        document = gkd_process(*words, "--json", cwd=tmp_path, env=env)
        assert document.code == code
        assert document.json["ok"] is (code == 0)


def test_the_module_is_the_command(gkd_process: Callable[..., Any], tmp_path: Path) -> None:
    """torchrun starts `-m gkdcli`."""
    script = Path(sys.executable).with_name("gkd")
    for words in (("--help",), ("distill", "dem"), CONFIG):
        outcome = gkd_process(*words, cwd=tmp_path)
        done = subprocess.run(
            [script, *words], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60
        )
        assert (done.returncode, done.stdout, done.stderr) == (outcome.code, outcome.out, outcome.err)
