"""pipeline.download: whole or not at all, what its name says it is, and only from where a flag names."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from gkdcli.console import Console
from gkdcli.errors import ExitCode, GkdError
from gkdcli.pipeline.download import fetch, weights_source
from gkdcli.runs import Place
from tests.training.jobs import page

CONTENT = bytes(range(256)) * 8192  # 2 MB
DIGITS = hashlib.sha256(CONTENT).hexdigest()[:8]


class _Handler(BaseHTTPRequestHandler):
    """Serves CONTENT under any name; `cut` breaks off, `gone` is not there, `away` leads elsewhere."""

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        if "gone" in self.path:
            self.send_error(404)
            return
        if "away" in self.path:
            self.send_response(302)
            self.send_header("Location", "/new-place.pth")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT[: 1000 if "cut" in self.path else None])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as serving:
        serving.asked = []
        thread = threading.Thread(target=serving.serve_forever, args=(0.01,))
        thread.start()
        yield serving
        serving.shutdown()
        thread.join()


def url(server: ThreadingHTTPServer, name: str) -> str:
    return f"http://127.0.0.1:{server.server_port}/models/{name}"


@pytest.mark.parametrize("name", [f"s3d-{DIGITS}.pth", "plain.pth", "away.pth"])
def test_a_file_comes_whole_and_is_announced(name, server, tmp_path, capsys):
    path = tmp_path / "models" / "mine" / name
    fetch(url(server, name), path, Console(progress_style="plain"))
    assert path.read_bytes() == CONTENT
    assert [entry.name for entry in path.parent.iterdir()] == [name]
    err = capsys.readouterr().err
    assert f"downloading {url(server, name)} to {path}" in err
    assert f"download {name} (MB): 2/2" in err


def test_it_is_not_fetched_twice(server, tmp_path, capsys):
    path = tmp_path / f"s3d-{DIGITS}.pth"
    for _ in range(2):
        fetch(url(server, path.name), path, Console())
    assert len(server.asked) == 1
    assert "is there already" in capsys.readouterr().err


def test_what_lies_there_under_its_name_but_is_something_else_is_replaced(server, tmp_path):
    path = tmp_path / f"s3d-{DIGITS}.pth"
    path.write_bytes(b"half a file")
    fetch(url(server, path.name), path, Console(quiet=True))
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("s3d-00000000.pth", f"the download is not what its name says: SHA-256 {DIGITS}, not 00000000"),
        ("gone.pth", "the server refuses the file: 404 Not Found"),
        ("cut.pth", f"the download failed: only 1000 of {len(CONTENT)} bytes came"),
    ],
)
def test_a_failure_leaves_nothing_behind(name, what, server, tmp_path):
    with pytest.raises(GkdError) as caught:
        fetch(url(server, name), tmp_path / name, Console(quiet=True))
    assert caught.value.what == what
    assert caught.value.where == url(server, name)
    assert list(tmp_path.iterdir()) == []


def test_no_server_is_an_error_with_the_address(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as free:
        address = url(free, "w.pth")
    with pytest.raises(GkdError, match=r"the download failed: .*refused") as caught:
        fetch(address, tmp_path / "w.pth", Console(quiet=True))
    assert caught.value.where == address


def test_only_https_addresses_and_files_are_sources(tmp_path):
    place = Place(tmp_path, page())
    assert weights_source("w.pt", place) == (None, Path("w.pt"))
    address = "https://download.pytorch.org/models/s3d-d76dad2f.pth?x=1"
    assert weights_source(address, place) == (address, tmp_path / "models/drawn/s3d-d76dad2f.pth")
    for bad in ("http://a/w.pth", "ftp://a/w.pth", "file:///etc/passwd", "https:///w.pth"):
        with pytest.raises(GkdError, match="no address that weights are taken from") as caught:
            weights_source(bad, place)
        assert caught.value.code == ExitCode.USAGE
    for bad in ("https://a/", "https://a/..", "https://a/..%2f..%2fb", "https://a/.hidden"):
        with pytest.raises(GkdError, match=r"does not end in the name of a file"):
            weights_source(bad, place)
