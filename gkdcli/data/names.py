"""Names of videos and classes: which may be kept in a store and shown on a terminal."""

from __future__ import annotations

import os
import re

from gkdcli.errors import GkdError

_VIDEO = re.compile(
    r"\.(3g2|3gp|asf|avi|divx|f4v|flv|gif|m2ts|m2v|m4v|mkv|mov|mp4|mpe|mpeg|mpg|mts|mxf|ogm|ogv|qt|rm|rmvb"
    r"|ts|vob|webm|wmv|y4m)",
    re.IGNORECASE,
)
# control characters, line separators, halves of characters, a byte order mark amid the text
_UNFIT = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff]")


def video_stem(name: str) -> str | None:
    """The name of a video file without its extension; None where the extension is no video's."""
    stem, extension = os.path.splitext(name)
    return stem if _VIDEO.fullmatch(extension) else None


def check_text(text: str, where: str) -> None:
    """Refuses what no name should hold: a store could not keep it, or a terminal would obey it.

    Raises:
        GkdError: control characters, line separators, halves of characters, a stray byte order mark.
    """
    found = _UNFIT.search(text)
    if found:
        what = f"a name holds {found[0]!a}, which is not valid text"
        raise GkdError(what, where, "write the list as plain UTF-8 text")


def short(text: str) -> str:
    """Text that fits into a line of an error."""
    return text if len(text) <= 80 else f"{text[:77]}..."
