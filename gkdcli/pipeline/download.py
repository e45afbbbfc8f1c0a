"""Weights from the network, and only where a flag names their address."""

from __future__ import annotations

import hashlib
import re
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from gkdcli.console import Console
from gkdcli.errors import GkdError, usage_error
from gkdcli.files import atomic_path, digest, disk_is_full
from gkdcli.runs import Place
from gkdcli.settings import NAME

_CHUNK = 1 << 20
_TIMEOUT = 60  # seconds without a byte


def weights_source(given: str, place: Place) -> tuple[str | None, Path]:
    """Where weights are that a flag names: their address if they are elsewhere, and their file here.

    Args:
        given: a path, or `https://...`.
        place: downloads lie in its `models/<dataset>/`.

    Raises:
        GkdError: an address that is not https or does not end in a file's name (exit code 2).
    """
    if "://" not in given:
        return None, Path(given)
    address = urlsplit(given)
    name = unquote(address.path.rpartition("/")[2])
    if address.scheme != "https" or not address.netloc:
        raise usage_error(
            f"`{given}` is no address that weights are taken from", "--backbone", "https://... or a file"
        )
    if not re.fullmatch(NAME, name):
        raise usage_error(
            f"`{given}` does not end in the name of a file",
            "--backbone",
            "download it by hand and name the file",
        )
    return given, place.models / name


def fetch(url: str, path: Path, console: Console) -> None:
    """Downloads a file, whole or not at all; one that lies there already and is what its name says stays.

    Names such as `r3d_18-b3b3357e.pth` carry the first digits of the content's SHA-256; they are checked.

    Args:
        url: any that urllib opens; see `weights_source` for what users may name.
        path: where to; its folder is made.
        console: is told.

    Raises:
        GkdError: no connection, no such file there, cut short, not what its name says, or no disk.
    """
    named = re.search(r"-([0-9a-f]{8,64})\.\w+$", path.name)
    wanted = named[1] if named else ""
    if path.is_file() and digest(path).startswith(wanted):
        console.note(f"{path} is there already; delete it to download it again")
        return
    console.note(f"downloading {url} to {path}")
    try:
        with atomic_path(path) as temporary:
            found = _transfer(url, temporary, path, console)
            if not found.startswith(wanted):
                raise GkdError(
                    f"the download is not what its name says: SHA-256 {found[: len(wanted)]}, not {wanted}",
                    url,
                    "try again; if it stays so, someone has changed the file",
                )
    except urllib.error.HTTPError as error:
        error.close()  # it is the answer too, with its connection
        raise GkdError(
            f"the server refuses the file: {error.code} {error.reason}", url, "check the address"
        ) from None
    except (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", None) or error or type(error).__name__
        raise GkdError(
            f"the download failed: {reason}", url, "try again, or download it by hand and name the file"
        ) from None
    except OSError as error:
        what = "the disk is full" if disk_is_full(error) else f"cannot write: {error.strerror}"
        raise GkdError(f"{what}; the download was dropped", str(path), "make room there") from None


class _StaySecure(urllib.request.HTTPRedirectHandler):
    """A redirect from https leads to https or nowhere."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if req.type == "https" and urlsplit(newurl).scheme != "https":
            raise urllib.error.URLError(f"redirected to {newurl}, which is not https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _transfer(url: str, temporary: Path, path: Path, console: Console) -> str:
    """Writes what `url` holds; returns its SHA-256."""
    opener = urllib.request.build_opener(_StaySecure)
    sha, size = hashlib.sha256(), 0
    with opener.open(url, timeout=_TIMEOUT) as answer, open(temporary, "wb") as file:
        length = int(answer.headers.get("Content-Length") or 0)
        with console.progress(f"download {path.name} (MB)", max(length // 1_000_000, 1)) as tick:
            while chunk := answer.read(_CHUNK):
                file.write(chunk)
                sha.update(chunk)
                size += len(chunk)
                if length:
                    tick(size // 1_000_000)
    if size < length:
        raise urllib.error.URLError(f"only {size} of {length} bytes came")
    return sha.hexdigest()
