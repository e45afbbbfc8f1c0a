"""data.parts and data.store: parts are whole or absent, the index finds them wherever the store is moved."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gkdcli.data import parts, spool
from gkdcli.data.annotations import Listing, Source, Subset
from gkdcli.data.parts import PartWriter, escape, part_path, read_about, read_attributes, unescape
from gkdcli.data.store import Store, build_index, mark_unfinished, written_settings
from gkdcli.errors import GkdError

NAMES = [("a", "x"), ("a", "100%"), (".b -c", "y/z"), ("-d", "日本 ü.h5")]
SETTINGS = {"fps": 0.0, "short_side": 0}


def _jpegs(name: str, count: int = 9) -> list[bytes]:
    """Stand-ins of differing lengths: the store does not look into them."""
    rng = np.random.default_rng(sum(name.encode()))
    return [rng.integers(0, 256, rng.integers(1, 400), np.uint8).tobytes() for _ in range(count)]


def _write(path: Path, frames: list[Any], storage: parts.Storage = "jpeg", digest: str = "d") -> None:
    attributes = {"fps": 25.0, "width": 64, "height": 48, "source_digest": digest, "settings": '{"fps": 0.0}'}
    with PartWriter(path, storage, attributes) as part:
        for frame in frames:
            part.append(frame)


def _listing() -> Listing:
    subsets: list[Subset] = ["train", "test", "train", "test"]
    sources = [
        Source(Path("v") / name, class_name, name, {1: subset}, group=f"g{subset}")
        for (class_name, name), subset in zip(NAMES, subsets, strict=True)
    ]
    return Listing(sorted({class_name for class_name, _ in NAMES}), sources)


def _build(folder: Path) -> Store:
    for class_name, name in NAMES:
        _write(part_path(folder / "rgb", class_name, name), _jpegs(name), digest=f"digest of {name}")
    return Store.open(build_index(folder, folder.name, "rgb", _listing(), SETTINGS))


@settings(derandomize=True, database=None)
@given(st.text(min_size=1, max_size=20))
def test_escaped_names_are_safe_and_come_back(name: str) -> None:
    text = escape(name)
    assert unescape(text) == name
    assert "/" not in text
    assert "\0" not in text
    assert text[0] not in ".-"
    assert text.isprintable()


def test_escaping_is_what_existing_stores_have() -> None:
    """A change here would lose parts that were written before."""
    known = {
        "v_Jump_g01": "v_Jump_g01",
        "50% off.": "50%25 off.",
        ".hidden": "%2Ehidden",
        "-x-": "%2Dx-",
        "a/b": "a%2Fb",
        "日本": "日本",
        "e\u0301": "e%CC%81",
        os.fsdecode(b"\xff"): "%FF",
        "a(b)[c]!#&+;=": "a(b)[c]!#&+;=",
    }
    assert {name: escape(name) for name in known} == known
    for bad in ("", "x" * 221):
        with pytest.raises(ValueError, match="the name is"):
            escape(bad)


def test_reading_gives_what_was_written_for_every_window(tmp_path: Path) -> None:
    store = _build(tmp_path / "mine")
    assert store.classes == ["-d", ".b -c", "a"]
    assert [(row.label, row.class_name, row.name) for row in store.videos] == [
        (0, "-d", "日本 ü.h5"),
        (1, ".b -c", "y/z"),
        (2, "a", "100%"),
        (2, "a", "x"),
    ]
    for place, row in enumerate(store.videos):
        jpegs = _jpegs(row.name)
        for start in range(row.frames):
            for count in range(1, row.frames - start + 1):
                read = store.frames(place, start, count)
                assert [frame.tobytes() for frame in read] == jpegs[start : start + count]


def test_the_table_says_everything(tmp_path: Path) -> None:
    store = _build(tmp_path / "mine")
    assert (store.dataset, store.modality, store.settings) == ("mine", "rgb", SETTINGS)
    row = store.videos[3]
    assert (row.frames, row.fps, row.width, row.height) == (9, 25.0, 64, 48)
    assert (row.group, row.digest) == ("gtrain", "digest of x")
    assert (store.split(1, "train"), store.split(1, "test")) == ([1, 3], [0, 2])
    with pytest.raises(GkdError, match="no split 2"):
        store.split(2, "train")


def test_a_moved_store_works_and_the_index_is_one_tree(tmp_path: Path) -> None:
    _build(tmp_path / "mine").close()
    (tmp_path / "mine").rename(tmp_path / "yours")
    store = Store.open(tmp_path / "yours" / "rgb.h5")
    assert store.frames(0, 0, 1)[0].tobytes() == _jpegs(NAMES[3][1])[0]
    store.close()
    with h5py.File(tmp_path / "yours" / "rgb.h5") as file:
        assert file["/videos/a/x/offsets"].shape == (10,)
        assert file["/videos/a/x"].attrs["frame_count"] == 9


@pytest.mark.parametrize("count", [1, 15, 16, 17, 40])
def test_raw_frames_come_back_as_an_array(tmp_path: Path, count: int) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (count, 6, 8, 3), np.uint8)
    listing = Listing(["a"], [Source(Path("x"), "a", "x", {1: "train"})])
    _write(part_path(tmp_path / "rgb", "a", "x"), list(frames), "raw")
    store = Store.open(build_index(tmp_path, "mine", "rgb", listing, SETTINGS))
    assert np.array_equal(np.asarray(store.frames(0, 0, count)), frames)
    assert np.array_equal(np.asarray(store.frames(0, count // 2, 1)), frames[count // 2 : count // 2 + 1])


def test_jpegs_of_a_part_are_one_contiguous_piece(tmp_path: Path) -> None:
    """So that 64 consecutive frames are one read."""
    _write(tmp_path / "x.h5", _jpegs("x"))
    with h5py.File(tmp_path / "x.h5") as file:
        assert file["frames"].chunks is None
        assert file["frames"].id.get_offset() is not None


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_store_travels_to_other_processes_without_its_files(tmp_path: Path) -> None:
    store = _build(tmp_path / "mine")
    expected = store.frames(3, 2, 3)[1].tobytes()
    twin: Store = pickle.loads(pickle.dumps(store))
    assert twin.frames(3, 2, 3)[1].tobytes() == expected
    assert twin.fingerprint == store.fingerprint
    open_here = _descriptors(store)
    assert open_here
    assert not _descriptors(pickle.loads(pickle.dumps(store))), "what is sent opens files where it arrives"
    child = os.fork()
    if (
        child == 0
    ):  # the forked reader must open its own files, not share the parent's and their place in them
        same = store.frames(3, 2, 3)[1].tobytes() == expected and store.frames(0, 0, 1)
        own = _descriptors(store)
        store.close()
        os._exit(0 if same and len(own) == 2 and not own & open_here else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert _descriptors(store) == open_here
    assert store.frames(3, 2, 3)[1].tobytes() == expected


def _descriptors(store: Store) -> set[int]:
    """Of the parts that this object holds open."""
    return {part._descriptor for part in store._parts.values()}


def test_open_files_are_bounded(tmp_path: Path) -> None:
    names = [f"v{number:03}" for number in range(80)]
    for name in names:
        _write(part_path(tmp_path / "rgb", "a", name), _jpegs(name, 2))
    listing = Listing(["a"], [Source(Path(name), "a", name, {1: "train"}) for name in names])
    store = Store.open(build_index(tmp_path, "mine", "rgb", listing, SETTINGS))
    before = len(os.listdir("/proc/self/fd"))
    for place in [*range(80), *range(80)]:
        assert store.frames(place, 1, 1)[0].tobytes() == _jpegs(names[place], 2)[1]
    assert len(os.listdir("/proc/self/fd")) - before <= 32
    store.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_failed_part_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with PartWriter(tmp_path / "a" / "x.h5", "jpeg", {}) as part:
            part.append(b"one")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list(tmp_path.rglob("*.*")) == []


def test_long_videos_wait_on_disk_not_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "_HELD_BYTES", 1000)
    jpegs = _jpegs("x", 50)
    with PartWriter(tmp_path / "x.h5", "jpeg", {}, "flow") as part:
        for jpeg in jpegs:
            part.append((jpeg, jpeg[::-1]))
        for stream in part._streams.values():
            assert sum(map(len, stream._held)) <= 1000
    with h5py.File(tmp_path / "x.h5") as file:
        assert file["flow_x"][:].tobytes() == b"".join(jpegs)
        assert file["flow_y"][:].tobytes() == b"".join(jpeg[::-1] for jpeg in jpegs)
    assert os.listdir(tmp_path) == ["x.h5"]


@pytest.mark.parametrize(
    "change",
    [
        lambda listing, settings: (Listing(listing.classes, listing.sources[1:]), settings),
        lambda listing, settings: (listing, settings | {"fps": 10.0}),
        lambda listing, settings: (Listing(["-d", ".b -c", "Z", "a"], listing.sources), settings),
    ],
)
def test_the_fingerprint_changes_with_videos_labels_and_settings(
    tmp_path: Path, change: Callable[[Listing, dict[str, Any]], tuple[Listing, dict[str, Any]]]
) -> None:
    first = _build(tmp_path)
    again = Store.open(build_index(tmp_path, tmp_path.name, "rgb", _listing(), SETTINGS))
    other = Store.open(build_index(tmp_path, tmp_path.name, "rgb", *change(_listing(), SETTINGS)))
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_an_index_without_videos_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GkdError, match="every video was rejected"):
        build_index(tmp_path, "mine", "rgb", _listing(), SETTINGS)


def _open_error(index: Path) -> GkdError:
    with pytest.raises(GkdError) as caught:
        Store.open(index)
    assert caught.value.hint
    assert str(index) in caught.value.where
    return caught.value


def test_a_missing_store_names_the_command_that_makes_it(tmp_path: Path) -> None:
    error = _open_error(tmp_path / "thumos14" / "flow.h5")
    assert error.what == "there is no flow store for thumos14"
    assert "gkd prepare thumos14 VIDEOS/ --modality flow" in error.hint


def test_an_unfinished_store_says_how_far_it_is(tmp_path: Path) -> None:
    _build(tmp_path)
    mark_unfinished(tmp_path, "mine", "rgb", SETTINGS, 7)
    assert _open_error(tmp_path / "rgb.h5").what == "the rgb store is unfinished: 4 of 7 videos are in it"
    assert written_settings(tmp_path, "rgb") == SETTINGS
    (tmp_path / "rgb.h5").unlink()
    error = _open_error(tmp_path / "rgb.h5")
    assert error.what == "the rgb store is unfinished: 4 videos are in it"
    assert "last written" in error.where
    assert written_settings(tmp_path, "rgb") == {"fps": 0.0}


@pytest.mark.parametrize("damage", ["cut", "text", "no table", "other version"])
def test_a_damaged_index_is_refused(tmp_path: Path, damage: str) -> None:
    _build(tmp_path)
    index = tmp_path / "rgb.h5"
    match damage:
        case "cut":
            os.truncate(index, index.stat().st_size // 2)
        case "text":
            index.write_text("no HDF5")
        case "no table":
            with h5py.File(index, "r+") as file:
                del file["tables"]
        case "other version":
            with h5py.File(index, "r+") as file:
                file.attrs["schema"] = 99
    assert ("another version" if damage == "other version" else "damaged") in _open_error(index).what


@pytest.mark.parametrize("damage", ["gone", "cut", "text", "another video", "another length"])
def test_a_damaged_part_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    store = _build(tmp_path)
    part = part_path(tmp_path / "rgb", "a", "x")
    match damage:
        case "gone":
            part.unlink()
        case "cut":
            os.truncate(part, part.stat().st_size // 2)
        case "text":
            part.write_text("no HDF5")
        case "another video":
            _write(part, _jpegs("x"), digest="other")
        case "another length":
            _write(part, _jpegs("x", 8), digest="digest of x")
    with pytest.raises(GkdError) as caught:
        store.frames(3, 0, 1)
    assert str(part) in caught.value.where
    assert "gkd prepare" in caught.value.hint
    assert store.frames(2, 0, 1)  # the others are still read


def test_a_part_of_another_schema_is_not_taken_for_ours(tmp_path: Path) -> None:
    _write(tmp_path / "x.h5", _jpegs("x"))
    assert read_attributes(tmp_path / "x.h5")["frame_count"] == 9
    with h5py.File(tmp_path / "x.h5", "r+") as file:
        file.attrs["schema"] = 99
    with pytest.raises(OSError, match="schema 99"):
        read_attributes(tmp_path / "x.h5")


KEYS = {
    "source": 'a "quoted" 日本.mp4',
    "source_mtime_ns": 1_700_000_000_123_456_789,
    "fps": 29.97002997002997,
    "settings": '{"fps": 0.1}',
}


def _part_about(path: Path, attributes: dict[str, Any]) -> Path:
    with PartWriter(path, "jpeg", {"source_digest": "d", **attributes}) as part:
        part.append(b"one")
    return path


def test_the_second_line_of_a_part_says_what_its_attributes_say(tmp_path: Path) -> None:
    part = _part_about(tmp_path / "x.h5", KEYS)
    found = read_about(part)
    assert found == read_attributes(part)
    assert {key: type(value) for key, value in found.items()} == {
        key: type(value) for key, value in read_attributes(part).items()
    }
    assert found["frame_count"] == 1


def test_parts_without_a_second_line_are_read_through_hdf5(tmp_path: Path) -> None:
    """Those of long names, and of older stores, whose HDF5 file begins where the second line is now."""
    part = _part_about(tmp_path / "x.h5", KEYS | {"source": "é" * 1000})
    assert read_about(part) == read_attributes(part)
    old = tmp_path / "old.h5"
    with h5py.File(old, "w", userblock_size=512) as file:
        file.attrs.update(KEYS, schema=1)
    head = json.dumps({"gkd": 1, "bytes": old.stat().st_size}).encode().ljust(512)
    with open(old, "r+b") as raw:
        raw.write(head)
    assert read_about(old) == KEYS | {"schema": 1}


@pytest.mark.parametrize("damage", ["cut", "longer", "other schema", "second line", "no line", "empty"])
def test_a_part_that_is_not_whole_says_nothing(tmp_path: Path, damage: str) -> None:
    part = _part_about(tmp_path / "x.h5", KEYS)
    content = part.read_bytes()
    match damage:
        case "cut":
            content = content[:-1]
        case "longer":
            content += b"x"
        case "other schema":
            content = content.replace(b'"gkd": 1', b'"gkd": 9')
        case "second line":
            content = content.replace(b'"settings": ', b'"settings"? ')
        case "no line":
            content = bytes(512) + content[512:]
        case "empty":
            content = b""
    part.write_bytes(content)
    with pytest.raises(OSError, match=r"x\.h5"):
        read_about(part)


def test_the_fingerprint_is_what_existing_runs_have_written_down(tmp_path: Path) -> None:
    """A run refuses a store of another fingerprint, so that it must not change with how it is computed."""
    known = "f1668482128693262355a48063e63a411ebd7975827512542e60c684dd98afea"
    assert _build(tmp_path / "mine").fingerprint == known


def test_links_of_the_index_are_those_of_h5py(tmp_path: Path) -> None:
    """Other tools follow them: names in UTF-8, relative to the index."""
    index = _build(tmp_path / "mine").path
    with h5py.File(tmp_path / "plain.h5", "w") as file:
        for class_name, name in NAMES:
            target = f"rgb/{escape(class_name)}/{escape(name)}.h5"
            file[f"/videos/{escape(class_name)}/{escape(name)}"] = h5py.ExternalLink(target, "/")
    assert _links(index) == _links(tmp_path / "plain.h5")


def _links(index: Path) -> dict[str, tuple[Any, ...]]:
    found = {}
    with h5py.File(index) as file:
        for class_name, members in file["videos"].items():
            for name in members:
                link, low = members.get(name, getlink=True), members.id.links
                encoded = low.get_info(name.encode()).cset
                found[f"{class_name}/{name}"] = (link.filename, link.path, encoded)
    return found
