"""Damaged lists of every kind: refused with a place, or read so that every row is there.

What a list means is said a second time below, in regular expressions and plain loops that share nothing
with the package; both must come to the same end for every damage.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gkdcli.data.annotations import Listing, read_list
from gkdcli.data.lists import read_split_lists
from gkdcli.errors import GkdError
from tests.split_lists import KINDS, TWO_STREAM, touch

Texts = dict[str, bytes]
Key = tuple[str, str]  # class, name
Rows = dict[Key, dict[int, str]]
Meaning = tuple[list[str], Rows]

ON_DISK = {
    ("Zumba", "v_Zumba_g01_c01"),
    ("Zumba", "v_Zumba_g02_c01"),
    ("Archery", "v_ArcHery_g01_c01"),
    ("Archery", "v_Archery_g02_c01"),
    ("wave", "a b"),
    ("wave", "a"),
    ("wave", "a(1)!#&+;=[x]_wave_u"),
    ("brush", "b"),
    ("brush_hair", "a_brush_hair"),
    ("brush hair", "é'\""),
}
CSV = (
    "video,class,subset\nwave/a.avi,wave,train\nwave/a b.avi,wave,test\nbrush/b.avi,brush,train\n"
    "no.avi,x,test\n"
)
JSON = json.dumps(
    [
        {"video": "wave/a.avi", "class": "wave"},
        {"video": "wave/a b.avi", "class": "wave"},
        {"video": "no.avi", "class": "é"},
    ],
    indent=0,
    ensure_ascii=False,
)
BASES: dict[str, Texts] = {
    **{kind: {name: text.encode() for name, text in lists.items()} for kind, lists in KINDS.items()},
    "two-stream with classes": {
        name: text.encode() for name, text in {**TWO_STREAM, "classInd.txt": "1 Zumba\n2 Archery\n"}.items()
    },
    "csv": {"list.csv": CSV.encode()},
    "json": {"list.json": JSON.encode()},
}

# ---- damage

NASTY = [
    *(
        b"..",
        b"../",
        b"/",
        b"\\",
        b"\\..\\",
        b"C:\\",
        b"\0",
        b"\t",
        b" ",
        b"\r",
        b"\n",
        b"\r\n",
        b"\x1b[2J",
        b"\x7f",
    ),
    *(
        b"\xef\xbb\xbf",
        b"\xe9",
        b"\xff",
        b"\xed\xa0\x80",
        b"\xc2\x85",
        b"\xc2\xa0",
        b"\xe2\x80\xa8",
        "ü 漢".encode(),
    ),
    *(
        b"-1",
        b"-",
        b"0",
        b"00",
        b"1_0",
        b"1.5",
        b"1e3",
        b"nan",
        b"9" * 30,
        b"9" * 5000,
        "\u0661".encode(),
        b".avi",
    ),
    *(
        b'"',
        b",",
        b"[",
        b"]",
        b"{",
        b"}",
        b"[" * 5000,
        b'"class": "x", ',
        b"\\ud800",
        b"\\u0000",
        b"null",
        b"#",
    ),
]


VALUES = [
    *(
        b"-1",
        b"-0",
        b"+1",
        b"0",
        b"1",
        b"2",
        b"3",
        b"7",
        b"00",
        b"01",
        b"1_0",
        b"1.5",
        b"1e3",
        b"nan",
        b"0x1",
        b"x",
    ),
    *(
        b"9" * 9,
        b"9" * 10,
        b"9" * 5000,
        b"-" + b"9" * 30,
        "\u0661".encode(),
        "\u00b2".encode(),
        b"1 1",
        b"1\t1",
        b"",
    ),
]


def _columns(line: bytes) -> list[bytes]:
    return line.split(b" ")


def _damage(texts: Texts, op: str, which: int, a: int, b: int) -> None:
    """Changes one file, or which files there are."""
    if not texts:
        return
    name = sorted(texts)[which % len(texts)]
    data = texts[name]
    lines = data.splitlines(keepends=True) or [b""]
    i, j = a % len(lines), b % len(lines)
    at = a % (len(data) + 1)
    if op == "flip":
        data = data[:at] + bytes(x ^ (1 << b % 8) for x in data[at : at + 1]) + data[at + 1 :]
    elif op == "insert":
        data = data[:at] + NASTY[b % len(NASTY)] + data[at:]
    elif op == "column":  # replaced, cut or added
        columns = _columns(lines[i].rstrip(b"\n"))
        columns[b % len(columns)] = NASTY[(a * 7 + b) % len(NASTY)]
        lines[i] = b" ".join(columns) + b"\n"
        data = b"".join(lines)
    elif op == "value":  # one number, of whatever meaning
        numbers = list(re.finditer(rb"(?<![^ \n])[0-9]+(?![^ \r\n])", data)) or list(re.finditer(rb"$", data))
        found = numbers[a % len(numbers)]
        data = data[: found.start()] + VALUES[b % len(VALUES)] + data[found.end() :]
    elif op == "class":  # no list names videos of a class
        name_of_class = (b"Zumba", b"Archery", b"ArcHery", b"wave", b"brush", b"brush hair")[a % 6]
        for other in texts:
            if other != "classInd.txt":
                rest = [x for x in texts[other].splitlines(keepends=True) if name_of_class not in x]
                texts[other] = b"".join(rest) or texts[other]
        return
    elif op == "renumber":  # one label in all of the lists
        old, new = str(a % 3).encode(), str(b % 6).encode()
        for other in texts:
            texts[other] = re.sub(rb" %b(\s*)$" % old, rb" %b\1" % new, texts[other], flags=re.MULTILINE)
        return
    elif op == "key":  # a JSON object that has one twice, or another one
        keys = list(re.finditer(rb'"[a-z]+": ', data)) or list(re.finditer(rb"$", data))
        at = keys[a % len(keys)].start()
        data = (
            data[:at] + (b'"class": "x", ', b'"video": "wave/a.avi", ', b'"kind": "x", ')[b % 3] + data[at:]
        )
    elif op == "nest":
        data = (b"[", b'{"video": ', b"[" * 100_000)[b % 3] + data + (b"]", b"}", b"]" * 100_000)[b % 3]
    elif op == "cut":
        columns = _columns(lines[i].rstrip(b"\n"))
        del columns[b % len(columns)]
        lines[i] = b" ".join(columns) + b"\n"
        data = b"".join(lines)
    elif op == "repeat column":
        columns = _columns(lines[i].rstrip(b"\n"))
        lines[i] = b" ".join([*columns, columns[b % len(columns)]]) + b"\n"
        data = b"".join(lines)
    elif op == "relabel":
        data = data[:at] + re.sub(rb"[0-9]+", str(b % 5).encode(), data[at:], count=1)
    elif op == "delete":
        data = b"".join(lines[:i] + lines[i + 1 :])
    elif op == "double":
        data = b"".join([*lines[: i + 1], *lines[i:]])
    elif op == "swap":
        lines[i], lines[j] = lines[j], lines[i]
        data = b"".join(lines)
    elif op == "crlf":
        data = b"".join(x.replace(b"\n", b"\r\n") if (a >> k % 8) & 1 else x for k, x in enumerate(lines))
    elif op == "bom":
        data = b"\xef\xbb\xbf" + data
    elif op == "truncate":
        data = data[:at]
    elif op == "encode":
        text = data.decode("utf-8", "replace")
        data = text.encode(("utf-16", "latin-1", "cp1252", "utf-32", "utf-7")[b % 5], "replace")
    elif op == "blank":
        data = b"".join([*lines[:i], (b"\n", b" \t\r\n", b"\r\n")[b % 3], *lines[i:]])
    elif op == "move":  # a line into another of the files
        other = sorted(texts)[b % len(texts)]
        texts[name] = b"".join(lines[:i] + lines[i + 1 :])
        texts[other] += lines[i]
        return
    elif op == "copy":
        data = texts[sorted(texts)[b % len(texts)]]
    elif op == "remove" and len(texts) > 1:
        del texts[name]
        return
    texts[name] = data


OPS = [
    *(
        "flip",
        "flip",
        "insert",
        "insert",
        "column",
        "cut",
        "repeat column",
        "relabel",
        "delete",
        "double",
        "swap",
    ),
    *("crlf", "bom", "truncate", "encode", "blank", "move", "copy", "remove"),
]
ROW_OPS = [*["value"] * 5, "class", "renumber"]
JSON_OPS = ["key", "key", "nest"]
_INT = st.integers(0, 10**6)


def damages_of(kind: str) -> st.SearchStrategy[list[tuple[str, int, int, int]]]:
    own = {"csv": [], "json": JSON_OPS}.get(kind, ROW_OPS)
    return st.lists(st.tuples(st.sampled_from([*own, *OPS]), _INT, _INT, _INT), max_size=4)


# ---- the meaning, said again

EXT = r"\.(?:avi|mp4|mkv|webm)"
VIDEO = re.compile(rf"(\.*[^.][^/]*){EXT}", re.IGNORECASE)
BAD = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029\ufeff]")
INTEGER = r"([0-9]{1,9})"
GAP = r"[ \t]+"
FILE = r"([^/\\\t]+)"
PATH = rf"{FILE}/{FILE}"
UCF_NAME = re.compile(r"v_(.+)_g[0-9]+_c[0-9]+")


# neither refused nor listed for certain: CSV with quotes, whose rules are not said again
UNSAID: Meaning = ([], {})


class Refused(Exception):
    """The oracle finds the lists wrong."""


def need(good: object) -> None:
    if not good:
        raise Refused


def text_lines(data: bytes) -> list[str]:
    try:
        text = data.removeprefix(b"\xef\xbb\xbf").decode()
    except UnicodeDecodeError:
        raise Refused from None
    lines = [re.sub(r"\A[ \t]+|[ \t]+\Z", "", re.sub(r"\r\Z", "", line)) for line in text.split("\n")]
    lines = [line for line in lines if line]
    need(lines and not any(BAD.search(line) for line in lines))
    return lines


def stem(file: str) -> str:
    video = VIDEO.fullmatch(file)
    return video[1] if video else file


def good_name(name: str) -> None:
    need(name not in (".", "..") and not re.search(r"[/\\\t]", name))


def good_file(name: str) -> None:
    good_name(name)
    two = re.fullmatch(r"(.*[^ ]) +[^ ]+", name)
    need(not two or VIDEO.fullmatch(name) or not VIDEO.fullmatch(two[1]))


def index_classes(data: bytes) -> list[str]:
    matches = [re.fullmatch(rf"{INTEGER}{GAP}([^\t]+)", line) for line in text_lines(data)]
    need(all(matches))
    pairs = sorted((int(m[1]), m[2]) for m in matches if m)
    need([number for number, _ in pairs] == list(range(1, len(pairs) + 1)))
    need(len({name for _, name in pairs}) == len(pairs))
    for _, name in pairs:
        good_name(name)
    return [name for _, name in pairs]


def put(rows: Rows, key: Key, split: int, subset: str, seen: set[tuple[int, Key]]) -> None:
    need((split, key) not in seen)
    seen.add((split, key))
    splits = rows.setdefault(key, {})
    if subset:
        splits[split] = subset


def ucf101(texts: Texts) -> Meaning:
    need("classInd.txt" in texts)
    classes = index_classes(texts["classInd.txt"])
    rows: Rows = {}
    seen: set[tuple[int, Key]] = set()
    splits = {int(name[-5]) for name in texts if name != "classInd.txt"}
    need(splits)
    for split in splits:
        for subset in ("train", "test"):
            need(f"{subset}list0{split}.txt" in texts)
            for line in text_lines(texts[f"{subset}list0{split}.txt"]):
                labelled = re.fullmatch(rf"{PATH}{GAP}{INTEGER}", line)
                bare = re.fullmatch(rf"{PATH}{EXT}|{FILE}/([^/\\\t ]+)", line, re.IGNORECASE)
                ends_as_video = VIDEO.fullmatch(line.rsplit("/", 1)[-1])
                if (
                    subset == "test"
                    and bare
                    and (ends_as_video or not re.search(r"[ ]", line.split("/")[-1]))
                ):
                    labelled = None
                    class_name, file = line.split("/")
                else:
                    need(labelled)
                    assert labelled
                    class_name, file = labelled[1], labelled[2].rstrip(" ")
                good_file(file)
                need(class_name in classes)
                need(not labelled or int(labelled[3]) == classes.index(class_name) + 1)
                put(rows, (class_name, stem(file)), split, subset, seen)
    need({name for name, _ in rows} == set(classes))
    return classes, rows


def hmdb51(texts: Texts) -> Meaning:
    files = {
        (m[1], int(m[2])): name for name in texts if (m := re.fullmatch(r"(.+)_test_split(\d).txt", name))
    }
    classes, splits = ({key[k] for key in files} for k in (0, 1))
    rows: Rows = {}
    seen: set[tuple[int, Key]] = set()
    need(len(files) == len(classes) * len(splits))
    for (class_name, split), name in files.items():
        for line in text_lines(texts[name]):
            match = re.fullmatch(rf"{FILE}(?<! ){GAP}([012])", line)
            need(match)
            assert match
            good_file(match[1])
            put(rows, (class_name, stem(match[1])), split, ("", "train", "test")[int(match[2])], seen)
    for split in splits:
        need({"train", "test"} <= {of.get(split) for of in rows.values()})
    return sorted(classes), rows


def two_stream(texts: Texts) -> Meaning:
    listed: dict[tuple[str, str], dict[str, int]] = {}
    need(set(texts) - {"classInd.txt"})
    for name in set(texts) - {"classInd.txt"}:
        part, modality, _ = name.split("_")
        taken = listed.setdefault((modality, part), {})
        for line in text_lines(texts[name]):
            match = re.fullmatch(rf"([^/\\ \t]+){GAP}{INTEGER}{GAP}{INTEGER}", line)
            need(match)
            assert match
            good_file(match[1])
            need(stem(match[1]) not in taken)
            taken[stem(match[1])] = int(match[3])
    for modality in {key[0] for key in listed}:
        need({key for key in listed if key[0] == modality} == {(modality, "train"), (modality, "val")})
    for part in ("train", "val"):
        lists = [of for key, of in listed.items() if key[1] == part]
        need(all(of == lists[0] for of in lists))
    train, val = (next(of for key, of in listed.items() if key[1] == part) for part in ("train", "val"))
    need(not set(train) & set(val))
    labels = train | val
    by_label: dict[int, set[str]] = {}
    matches = {video: UCF_NAME.fullmatch(video) for video in labels}
    if "classInd.txt" in texts:
        classes = index_classes(texts["classInd.txt"])
        need(set(labels.values()) == set(range(len(classes))))
        for video, match in matches.items():
            need(not match or match[1].casefold() == classes[labels[video]].casefold())
    else:
        known = all(matches.values())
        for video, label in labels.items():
            match = matches[video]
            folders = [name for name, file in ON_DISK if file == video]
            if known and match:
                good_name(match[1])
                by_label.setdefault(label, set()).add(match[1].casefold())
            elif not known and len(folders) == 1:
                by_label.setdefault(label, set()).add(folders[0])
        need(set(by_label) == set(labels.values()) == set(range(len(by_label))))
        need(all(len(names) == 1 for names in by_label.values()))
        classes = [min(by_label[label]) for label in sorted(by_label)]
        need(len(set(classes)) == len(classes))
    rows: Rows = {
        (classes[label], video): {1: "train" if video in train else "test"} for video, label in labels.items()
    }
    return classes, rows


def labelled(texts: Texts) -> Meaning:
    parts = {name.rsplit("_", 1)[1].removesuffix(".txt"): name for name in texts}
    need({"train", "test"} <= set(parts))
    rows: Rows = {}
    seen: set[tuple[int, Key]] = set()
    pairs: set[tuple[int, str]] = set()
    for part, name in parts.items():
        lines = text_lines(texts[name])
        counted = all(re.fullmatch(rf".*[^ \t]{GAP}[0-9]{{1,9}}{GAP}[^ \t]+", line) for line in lines)
        for line in lines:
            match = re.fullmatch(rf"{PATH}(?<! ){GAP}{INTEGER + GAP if counted else ''}{INTEGER}", line)
            need(match)
            assert match
            good_name(match[1])
            good_file(match[2])
            pairs.add((int(match[match.lastindex or 0]), match[1]))
            put(rows, (match[1], stem(match[2])), 1, part if part != "val" else "", seen)
    labels = sorted(label for label, _ in pairs)
    need(labels in (list(range(len(labels))), list(range(1, len(labels) + 1))))
    need(len({name for _, name in pairs}) == len(pairs))
    return [name for _, name in sorted(pairs)], rows


def table(rows: list[dict[str, str]]) -> Meaning:
    """The entries of a CSV or JSON list."""
    need(rows and len({"subset" in row for row in rows}) == 1)
    paths: set[str] = set()
    meaning: Rows = {}
    for row in rows:
        need({"video", "class"} <= set(row) <= {"video", "class", "subset"})
        need(all(row.values()) and not re.search(r"[\t\ud800-\udfff]", "".join(row.values())))
        need(not BAD.search("".join(row.values())) and row.get("subset", "train") in ("train", "test"))
        parts = [part for part in row["video"].split("/") if part not in ("", ".")]
        need(parts and ".." not in parts and not row["video"].startswith("/"))
        path = "/".join(parts)
        need(path not in paths)
        paths.add(path)
        parts[-1] = PurePosixPath(parts[-1]).stem
        name = "/".join(parts[1:] if len(parts) > 1 and parts[0] == row["class"] else parts)
        need((row["class"], name) not in meaning)
        meaning[row["class"], name] = {1: row["subset"]} if "subset" in row else {}
    if "subset" in rows[0]:
        need({of[1] for of in meaning.values()} == {"train", "test"})
    need(paths & {f"{name}/{file}.avi" for name, file in ON_DISK})
    return sorted({name for name, _ in meaning}), meaning


def csv_list(texts: Texts) -> Meaning:
    try:
        text = texts["list.csv"].decode("utf-8-sig")
    except UnicodeDecodeError:
        raise Refused from None
    if '"' in text:
        return UNSAID
    lines = [[cell.strip() for cell in line.split(",")] for line in re.split(r"\r\n|\r|\n", text)]
    lines = [cells for cells in lines if any(cells)]
    need(lines and all(len(cells) == len(lines[0]) == len(set(lines[0])) for cells in lines))
    return table([dict(zip(lines[0], cells, strict=True)) for cells in lines[1:]])


def json_list(texts: Texts) -> Meaning:
    try:
        document = json.loads(texts["list.json"].decode("utf-8-sig"), object_pairs_hook=tuple)
    except (ValueError, RecursionError):
        raise Refused from None
    need(isinstance(document, list))
    rows = []
    for entry in document:
        need(isinstance(entry, tuple) and all(isinstance(value, str) for _, value in entry))
        rows.append({key: value.strip() for key, value in entry})
        need(len(rows[-1]) == len(entry))
    return table(rows)


ORACLES: dict[str, Callable[[Texts], Meaning]] = {
    "ucf101": ucf101,
    "hmdb51": hmdb51,
    "two-stream": two_stream,
    "two-stream with classes": two_stream,
    "labelled": labelled,
    "counted": labelled,
    "csv": csv_list,
    "json": json_list,
}

# ---- the comparison


def check(kind: str, texts: Texts, lists: Path, videos: Path) -> str:
    """Reads the files and compares; returns which end it came to."""
    for path in lists.iterdir():
        path.unlink()
    for name, data in texts.items():
        (lists / name).write_bytes(data)
    table_file = next((lists / name for name in texts if not name.endswith(".txt")), None)
    wanted: Meaning | None
    try:
        wanted = ORACLES[kind](texts)
    except Refused:
        wanted = None
    refusal = None
    try:
        listing = read_list(table_file, videos, 0.5) if table_file else read_split_lists(lists, videos)
    except GkdError as error:
        refusal = error
    if refusal:
        assert all((refusal.what, refusal.where, refusal.hint)), refusal
        assert "\n" not in refusal.what + refusal.where + refusal.hint
        assert len(refusal.what) < 300
        assert str(lists) in refusal.where
        assert wanted is None or wanted is UNSAID, (
            f"refused, but nothing is wrong: {refusal.what} ({refusal.where})"
        )
        return "refused"
    assert wanted is not None, f"accepted, but something is wrong: {listing}"
    if wanted is not UNSAID:
        compare(listing, *wanted, videos, table_file is not None)
    return "read"


def compare(listing: Listing, classes: list[str], rows: Rows, videos: Path, is_table: bool) -> None:
    """Every row is a source or a reject, with its class and splits; what lies on the disk is a source."""
    assert [name.casefold() for name in listing.classes] == [name.casefold() for name in classes]
    assert {source.class_name for source in listing.sources} <= set(listing.classes)
    # a class folder may differ from its class in case
    loose = {(name.casefold(), file): splits for (name, file), splits in rows.items()}
    for source in listing.sources:
        assert source.path.is_file()
        splits = rows.get(
            (source.class_name, source.name), loose.get((source.class_name.casefold(), source.name))
        )
        assert splits is not None
        assert dict(source.splits) == splits or (is_table and not splits)
    assert len(listing.sources) + len(listing.rejects) == len(rows)
    sources = {(source.class_name.casefold(), source.name) for source in listing.sources}
    if is_table:
        missing = [path for path, _ in listing.rejects if os.path.exists(videos / path)]
        assert missing == []
    else:
        rejects = [Path(path).relative_to(videos).parts for path, _ in listing.rejects]
        kept = Counter(sources) + Counter((name.casefold(), stem(file)) for name, file in rejects)
        assert kept == Counter((name.casefold(), file) for name, file in rows)
        assert {(name.casefold(), file) for name, file in rows if (name, file) in ON_DISK} <= sources


def fuzz(kind: str, examples: int, folder: Path) -> Counter[str]:
    videos = touch(folder / "videos", *(f"{name}/{file}.avi" for name, file in ON_DISK))
    (folder / "lists").mkdir()
    ends: Counter[str] = Counter()

    @settings(max_examples=examples, derandomize=True, deadline=None, database=None)
    @given(damages_of(kind))
    def damaged(damages: list[tuple[str, int, int, int]]) -> None:
        texts = dict(BASES[kind])
        for damage in damages:
            _damage(texts, *damage)
        ends[check(kind, texts, folder / "lists", videos)] += 1

    damaged()
    return ends


@pytest.mark.parametrize("kind", BASES)
def test_undamaged_lists_are_read(kind: str, tmp_path: Path) -> None:
    videos = touch(tmp_path / "videos", *(f"{name}/{file}.avi" for name, file in ON_DISK))
    (tmp_path / "lists").mkdir()
    assert check(kind, dict(BASES[kind]), tmp_path / "lists", videos) == "read"


@pytest.mark.parametrize("kind", BASES)
def test_damaged_lists_are_refused_or_read_in_full(kind: str, tmp_path: Path) -> None:
    ends = fuzz(kind, 500, tmp_path)
    assert min(ends["read"], ends["refused"]) >= 40, ends


@pytest.mark.slow
@pytest.mark.parametrize("kind", BASES)
def test_many_damaged_lists(kind: str, tmp_path: Path) -> None:
    ends = fuzz(kind, 1250, tmp_path)
    print(kind, dict(ends))
    assert min(ends["read"], ends["refused"]) >= 120, ends
