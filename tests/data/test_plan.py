"""data.plan: looked at by threads or not, the plan is the same."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from gkdcli.data import plan
from gkdcli.data.annotations import Listing, Source
from gkdcli.data.parts import PartWriter, part_path
from gkdcli.settings import DataSettings

DATA = DataSettings()


def _set(root: Path) -> Listing:
    """Twelve videos; every third has no part, and one file is not there."""
    sources = []
    for number in range(12):
        path = root / f"{number}.mp4"
        path.write_bytes(b"x" * number)
        source = Source(path, "ab"[number % 2], str(number), {1: "train"})
        sources.append(source)
        if number % 3:
            about = {"source_size": number, "source_mtime_ns": path.stat().st_mtime_ns, "scaling": "not"}
            settings = '{"jpeg_quality": 1}'
            part = part_path(root / "mine" / "rgb", source.class_name, source.name)
            with PartWriter(part, "jpeg", about | {"source_digest": "d", "settings": settings}) as writer:
                writer.append(b"one")
    (root / "7.mp4").unlink()
    return Listing(["a", "b"], sources)


def test_a_file_system_that_makes_one_wait_is_asked_by_many_threads_for_the_same_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listing = _set(tmp_path)
    monkeypatch.setattr(plan, "_TOGETHER", 2)
    monkeypatch.setattr(plan, "check_settings", lambda *_: None)
    pools: list[int] = []
    made = plan.ThreadPoolExecutor
    monkeypatch.setattr(plan, "ThreadPoolExecutor", lambda size: pools.append(size) or made(size))
    found = []
    for waits in (itertools.repeat(0), itertools.count(step=2)):
        monkeypatch.setattr(plan, "_waits", waits.__next__)
        found.append(plan.plan_parts(listing, tmp_path / "mine", ("rgb",), DATA, {}))
    assert pools == [16]
    assert found[0] == found[1]
    assert [job.source.name for job in found[0].jobs] == ["0", "3", "6", "9"]
    assert found[0].skipped == 7
    assert list(found[0].rejected) == [str(tmp_path / "7.mp4")]
