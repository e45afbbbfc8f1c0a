"""What stderr shows: who may speak, how progress looks, how messages are laid out."""

from __future__ import annotations

import io
import sys
import time

import pytest

from gkdcli.console import Console, counted, message
from gkdcli.errors import GkdError
from gkdcli.launch import Launch


def test_messages_have_one_line_each_for_what_where_and_hint() -> None:
    assert message("error", "it broke", "file.toml, line 3", "mend it") == (
        "error: it broke\nwhere: file.toml, line 3\nhint: mend it"
    )
    assert message("warning", "it creaks") == "warning: it creaks"
    assert message("error", "one\ntwo", "\x1b[31mred.mp4") == "error: one two\nwhere:  [31mred.mp4"


def test_one_is_not_many() -> None:
    assert [counted(n, "video") for n in (0, 1, 2)] == ["0 videos", "1 video", "2 videos"]
    assert [counted(n, "class is", "classes are") for n in (1, 2)] == ["1 class is", "2 classes are"]


@pytest.mark.parametrize(
    ("console", "shown"),
    [
        (Console(), ["note", "warning: careful"]),
        (Console(quiet=True), ["warning: careful"]),
        (Console(verbose=True), ["note", "detail", "warning: careful"]),
    ],
)
def test_quiet_and_verbose(console: Console, shown: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    console.note("note")
    console.detail("detail")
    console.warn("careful")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == shown
    assert console.warnings == ["careful"]


def test_only_rank_0_speaks(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gkdcli.console.launched", lambda: Launch(1, 2, 2))
    console = Console(verbose=True, progress_style="plain")
    console.note("x")
    console.detail("x")
    console.warn("x")
    with console.progress("x", 1) as tick:
        tick(1)
    assert capsys.readouterr() == ("", "")


def test_plain_progress_is_a_line_every_ten_seconds_and_one_at_the_end(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with Console(progress_style="plain").progress("train", 100) as tick:
        for done in range(1, 101):
            now[0] += 0.25
            tick(done, "epoch 1")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "train: 40/100, 15 s left (epoch 1)",
        "train: 80/100, 5 s left (epoch 1)",
        "train: 100/100 in 25 s (epoch 1)",
    ]


@pytest.mark.parametrize("console", [Console(progress_style="off"), Console(quiet=True)])
def test_progress_can_be_off(console: Console, capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress("train", 2) as tick:
        tick(2)
    assert capsys.readouterr() == ("", "")


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("term", "bar"), [("xterm-256color", True), ("dumb", False)])
def test_auto_draws_a_bar_on_a_terminal_only(term: str, bar: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = _Terminal()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setenv("TERM", term)
    with Console().progress("train", 2) as tick:
        tick(1, "half way")
        tick(2)
    assert ("\x1b[" in stderr.getvalue()) is bar
    assert ("train: 2/2" in stderr.getvalue()) is not bar


def test_a_bar_has_names_and_values_below_it_and_a_plain_line_has_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def rows() -> list[tuple[str, str]]:
        return [("data wait", "1.5 %"), ("cvae_kl.Mixed_5c", "0.0023")]

    with Console(progress_style="plain").progress("train", 1) as tick:
        tick(1, "epoch 1", rows)
    assert capsys.readouterr().err == "train: 1/1 in 0 s (epoch 1)\n"
    stderr = _Terminal()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setenv("TERM", "xterm-256color")
    with Console().progress("train", 2) as tick:
        tick(1, "epoch 1", rows)
    last = stderr.getvalue().rpartition("train")[2]
    assert "data wait          1.5 %" in last
    assert "cvae_kl.Mixed_5c  0.0023" in last


def test_a_bar_keeps_markup_in_names_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A video called `[red].mp4` is a name, not a colour."""
    stderr = _Terminal()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setenv("TERM", "xterm-256color")
    with Console(progress_style="bar").progress("prepare [bold]x", 2) as tick:
        tick(1, "[red].mp4")
    assert "[bold]x" in stderr.getvalue()
    assert "[red].mp4" in stderr.getvalue()


def test_an_error_inside_the_bar_gets_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", _Terminal())
    with pytest.raises(GkdError, match="x"), Console(progress_style="bar").progress("t", 2):
        raise GkdError("x")
