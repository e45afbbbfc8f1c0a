"""Lines of split lists and what may stand in them; every refusal names file and line."""

from __future__ import annotations

import codecs
import re
from pathlib import Path
from typing import NamedTuple

from gkdcli.data.names import check_text, short, video_stem
from gkdcli.errors import GkdError

LAST_COLUMN = re.compile(r"(.*[^ \t])[ \t]+([^ \t]+)")
NUMBER = re.compile(r"[0-9]{1,9}")


class Line(NamedTuple):
    """A line that is not blank."""

    file: Path
    number: int
    text: str

    @property
    def where(self) -> str:
        """File and line, as errors name them."""
        return f"{self.file} line {self.number}"

    def error(self, what: str, hint: str) -> GkdError:
        """An error about this line."""
        return GkdError(what, f"{self.where}, {short(self.text)}", hint)


def once(first: Line, line: Line) -> None:
    """Refuses a video that an earlier line names already.

    Raises:
        GkdError: with both lines.
    """
    if first is line:
        return
    same = first.file == line.file
    raise GkdError(
        "a video is listed twice" if same else "a video is in two lists of one split",
        f"{line.where}, {short(line.text)}; first at {f'line {first.number}' if same else first.where}",
        "keep one of the two",
    )


def read_lines(path: Path) -> list[Line]:
    """The lines that are not blank; LF or CRLF, with or without a byte order mark.

    Raises:
        GkdError: it cannot be read, is not UTF-8, holds control characters, or nothing at all.
    """
    try:
        data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
        text = data.decode()
    except OSError as error:
        what = "a list cannot be read"
        raise GkdError(what, f"{path}: {error.strerror}", "check the file and its permissions") from None
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        hint = "save the list as UTF-8"
        raise GkdError("a list is not UTF-8 text", f"{path} line {number}: {error.reason}", hint) from None
    lines = [
        Line(path, position, stripped)
        for position, raw in enumerate(text.split("\n"), start=1)
        if (stripped := raw.removesuffix("\r").strip(" \t"))
    ]
    if not lines:
        raise GkdError("a list is empty", str(path), "unpack the lists again")
    for line in lines:
        check_text(line.text.replace("\t", " "), line.where)
    return lines


def cut_last(line: Line, text: str, form: str) -> tuple[str, str]:
    """Cuts off the last column; what is before it may hold blanks.

    Raises:
        GkdError: there is one column only.
    """
    cut = LAST_COLUMN.fullmatch(text)
    if not cut:
        raise line.error("a column is missing", f"a line is `{form}`")
    return cut[1], cut[2]


def class_and_video(line: Line, text: str) -> tuple[str, str]:
    """Takes `<class>/<video>` apart.

    Raises:
        GkdError: it is another kind of path, or one that leads elsewhere.
    """
    parts = text.split("/")
    if text.startswith("/") or "\\" in text or ".." in parts:
        raise line.error(
            "a path leads out of the folder of videos", "a line names `<class>/<video>`, with `/`"
        )
    if len(parts) != 2:
        raise line.error("a path is not `<class>/<video>`", "name the folder of the class and the file in it")
    check_class(line.where, parts[0])
    return parts[0], bare_name(line, parts[1])


def check_class(where: str, name: str) -> None:
    """Refuses names that no class folder can have.

    Raises:
        GkdError: a path, or text that is none.
    """
    check_text(name, where)
    if "/" in name or "\\" in name or name in ("", ".", ".."):
        raise GkdError(f"`{short(name)}` cannot be the name of a class", where, "it is the name of a folder")


def bare_name(line: Line, name: str) -> str:
    """The name of a file: no path, and not two columns.

    Raises:
        GkdError: it is one of these, or text that is none.
    """
    check_text(name, line.where)
    if "/" in name or "\\" in name or name in ("", ".", ".."):
        raise line.error(f"`{short(name)}` is not the name of a file", "these lists name files, not paths")
    cut = LAST_COLUMN.fullmatch(name)
    if cut and video_stem(name) is None and video_stem(cut[1]) is not None:
        raise line.error("there are too many columns, or a number of frames in some lines only", "remove it")
    return name


def whole_number(line: Line, token: str, what: str) -> int:
    """A column of digits.

    Raises:
        GkdError: anything else, signs and more than nine digits included.
    """
    if not NUMBER.fullmatch(token):
        raise line.error(f"`{short(token)}` is not a {what}", "use a whole number of at most nine digits")
    return int(token)
