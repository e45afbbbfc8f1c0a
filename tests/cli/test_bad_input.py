"""Every kind of bad video, through `gkd prepare`: named with its reason, the good ones are taken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gkdcli.data.store import Store
from tests.conftest import Outcome, run_gkd
from tests.videos import draw, write_sound, write_video

GOOD = {
    "odd-sized.mp4": 12,  # 65x49 px
    "rotated.mp4": 12,
    "variable rate.mkv": 12,
    "two.frames.mp4": 2,
    "-leading dash.mp4": 12,
    "a [b] (c) {d} 'e' \"f\" !#&+;=@%.mp4": 12,
    "日本 ünïcode é.mp4": 12,
    "line\nbreak.mp4": 12,
    "plain.avi": 12,
    ".hidden.mp4": None,  # not looked at
    "notes.txt": None,
}
BAD = {
    "zero bytes.mp4": "an empty file",
    "no video.mp4": "not a video",
    "cut short.avi": "truncated: ",
    "cut off.mp4": "not a video",
    "sound only.mp4": "no video stream",
    "one frame.mp4": "one frame only, so there is no motion",
    "twice.avi": "has the same name and class as",
    "twice.mp4": "has the same name and class as",
    "nowhere.mp4": "a link that leads nowhere",
    "folder": "a folder within the folder of a class",
    "x" * 230 + ".mp4": "the name is too long",
}


def _draw_all(folder: Path) -> None:
    frames = draw(12)
    for place, (name, count) in enumerate(GOOD.items()):
        path = folder / name
        if name == "odd-sized.mp4":
            write_video(path, draw(12, 65, 49))
        elif name == "rotated.mp4":
            write_video(path, frames, rotation=90)
        elif name == "variable rate.mkv":
            write_video(path, frames, durations=[1, 3, 1, 5, 1, 1, 2, 1, 9, 1, 1, 1])
        elif name == "notes.txt":
            path.write_text("no video, and not meant to be")
        else:
            write_video(folder / f"draft{path.suffix}", draw(count or 12, seed=place), codec="mpeg4").replace(
                path
            )
    (folder / "zero bytes.mp4").touch()
    (folder / "no video.mp4").write_text("plain text " * 1000)
    (folder / "cut short.avi").write_bytes(
        _half(write_video(folder / "cut short.avi", draw(100), codec="mpeg4"))
    )
    (folder / "cut off.mp4").write_bytes(_half(write_video(folder / "cut off.mp4", draw(100))))
    write_sound(folder / "sound only.mp4")
    write_video(folder / "one frame.mp4", draw(1))
    write_video(folder / "twice.avi", frames, codec="mpeg4")
    write_video(folder / "twice.mp4", frames)
    (folder / "nowhere.mp4").symlink_to(folder / "absent")
    write_video(folder / "folder" / "deep.mp4", frames)
    write_video(folder / "draft.mp4", frames).replace(folder / ("x" * 230 + ".mp4"))


def _half(path: Path) -> bytes:
    content = path.read_bytes()
    return content[: len(content) // 2]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    root = tmp_path_factory.mktemp("bad-input")
    _draw_all(root / "videos" / "jump")
    write_video(root / "videos" / "walk" / "plain.avi", draw(20, seed=50))  # the same name in two classes
    write_video(root / "videos" / "walk" / "other.mp4", draw(30, seed=51))
    (root / "videos" / "empty class").mkdir()
    write_video(root / "videos" / "classless.mp4", draw(3))
    words = ("prepare", "folder", "videos", "--name", "mine", "--modality", "both", "--flow", "farneback")
    return root, run_gkd(*words, "--set", "data.short_side=0", "--json", cwd=root)


def test_the_command_says_that_there_are_rejects(prepared: tuple[Path, Outcome]) -> None:
    root, outcome = prepared
    assert outcome.code == 3
    result = outcome.json["result"]
    good = sum(count is not None for count in GOOD.values())
    assert (result["prepared"], result["rejected"]) == (good + 2, len(BAD) + 2)
    assert "warning: " in outcome.err
    assert "rejected.tsv" in outcome.err
    assert "Traceback" not in outcome.err
    for modality in ("rgb", "flow"):
        store = Store.open(root / "stores" / "mine" / f"{modality}.h5")
        assert store.classes == ["jump", "walk"]


@pytest.mark.parametrize("name", [name for name, count in GOOD.items() if count is not None])
def test_what_only_looks_odd_is_taken(prepared: tuple[Path, Outcome], name: str) -> None:
    root, _ = prepared
    for modality in ("rgb", "flow"):
        store = Store.open(root / "stores" / "mine" / f"{modality}.h5")
        (row,) = [row for row in store.videos if (row.class_name, row.name) == ("jump", Path(name).stem)]
        assert row.frames == GOOD[name]
        size = {"odd-sized.mp4": (65, 49), "rotated.mp4": (48, 64)}.get(name, (64, 48))
        assert (row.width, row.height) == size
        frames: Any = store.frames(store.videos.index(row), 0, row.frames)
        assert len(frames) == row.frames * (1 if modality == "rgb" else 2)


@pytest.mark.parametrize("name", BAD)
def test_what_is_bad_is_named_with_its_reason(prepared: tuple[Path, Outcome], name: str) -> None:
    root, _ = prepared
    for modality in ("rgb", "flow"):
        lines = (root / "stores" / "mine" / f"{modality}.rejected.tsv").read_text().splitlines()[1:]
        reasons = dict(line.split("\t")[:2] for line in lines)
        assert BAD[name] in reasons[f"videos/jump/{name}"]
        assert "a class folder without videos" in reasons["videos/empty class"]
        assert "its class is unknown" in reasons["videos/classless.mp4"]


def test_videos_shorter_than_a_clip_are_trained_on(
    prepared: tuple[Path, Outcome], gkd: Callable[..., Outcome], tmp_path: Path
) -> None:
    """Two frames, and clips of sixteen: the last one is repeated."""
    (tmp_path / "stores").symlink_to(prepared[0] / "stores")
    small = ("clips.length=16", "clips.crop=32", "model.width=0.0625", "data.holdout=0", "clips.mean=[0.5]")
    sets = [word for text in (*small, "clips.std=[0.25]", "train.threads=1") for word in ("--set", text)]
    for modality in ("rgb", "flow"):
        for command in ("pretrain-attention", "evaluate"):
            extra = ("--max-steps", 2, "--batch-size", 4) if command != "evaluate" else ("--model", "teacher")
            words = (command, "mine", "--root", tmp_path, "--modality", modality, *sets, *extra)
            if command == "evaluate":
                (run,) = (tmp_path / "runs" / "mine" / f"pretrain-attention-{modality}").iterdir()
                words += ("--run", run)
            outcome = gkd(*words, "--json").must()
    assert outcome.json["result"]["protocol"]["flow_method"] == "farneback"


def test_a_list_of_missing_videos_rejects_those(gkd: Callable[..., Outcome], tmp_path: Path) -> None:
    write_video(tmp_path / "videos" / "a.mp4", draw(4))
    write_video(tmp_path / "videos" / "b.mp4", draw(4))
    (tmp_path / "list.csv").write_bytes(
        b"\xef\xbb\xbfvideo,class,subset\r\n\r\na.mp4,jump,train\r\nb.mp4,jump,test\r\ngone.mp4,walk,test\r\n"
    )
    words = ("prepare", "folder", tmp_path / "videos", "--name", "own", "--root", tmp_path)
    outcome = gkd(*words, "--annotations", tmp_path / "list.csv", "--json")
    assert outcome.code == 3
    assert outcome.json["result"]["rejected"] == 1
    assert "gone.mp4\tthere is no such file" in (tmp_path / "stores/own/rgb.rejected.tsv").read_text()


@pytest.mark.parametrize("target", ["../outside.mp4", "/etc/passwd", "a/../../outside.mp4"])
def test_a_list_cannot_lead_out_of_its_folder(
    gkd: Callable[..., Outcome], tmp_path: Path, target: str
) -> None:
    write_video(tmp_path / "outside.mp4", draw(4))
    write_video(tmp_path / "videos" / "a.mp4", draw(4))
    for name, text in (
        ("list.csv", f"video,class\na.mp4,jump\n{target},jump\n"),
        ("list.json", json.dumps([{"video": target, "class": "jump"}])),
        ("lists/trainlist01.txt", f"jump/{target} 1\n"),
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    (tmp_path / "lists" / "classInd.txt").write_text("1 jump\n")
    (tmp_path / "lists" / "testlist01.txt").write_text("jump/a.mp4\n")
    for name in ("list.csv", "list.json", "lists"):
        words = ("prepare", "folder", tmp_path / "videos", "--name", "own", "--root", tmp_path)
        outcome = gkd(*words, "--annotations", tmp_path / name)
        assert outcome.code == 1
        assert "leads out of" in outcome.err or "is not `<class>/<video>`" in outcome.err
        assert "Traceback" not in outcome.err
        assert not (tmp_path / "stores" / "own" / "rgb").exists()


def test_a_store_of_other_settings_is_refused(gkd: Callable[..., Outcome], tmp_path: Path) -> None:
    for place in range(2):
        write_video(tmp_path / "videos" / "jump" / f"{place}.mp4", draw(4, seed=place))
    words = ("prepare", "folder", tmp_path / "videos", "--name", "own", "--root", tmp_path)
    gkd(*words, "--modality", "flow", "--flow", "dis").must()
    outcome = gkd(*words, "--modality", "flow", "--flow", "farneback")
    assert outcome.code == 1
    assert "data.flow dis -> farneback" in outcome.err
    gkd(*words, "--flow", "farneback").must()  # frames do not depend on it
