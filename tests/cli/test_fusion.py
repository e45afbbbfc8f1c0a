"""`gkd evaluate --fusion`: finds both networks by itself, scores three ways, refuses what is unlike."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import pytest

from tests.conftest import Outcome

Gkd = Callable[..., Outcome]


@pytest.fixture
def root(tiny_streams: Path, tmp_path: Path) -> Path:
    """A copy to change things in."""
    shutil.copytree(tiny_streams, tmp_path / "root", symlinks=False)
    for saved in (tmp_path / "root" / "runs").rglob("predictions.h5"):  # of tests before this one
        saved.unlink()
    return tmp_path / "root"


def _run(root: Path, kind: str) -> Path:
    (folder,) = (root / "runs" / "demo-tiny" / kind).iterdir()
    return folder


def test_fusion_needs_no_flag(gkd: Gkd, root: Path) -> None:
    outcome = gkd("evaluate", "demo-tiny", "--root", root, "--fusion", "--json").must()
    result = outcome.json["result"]
    rgb, flow = _run(root, "distill-rgb"), _run(root, "distill-flow")
    assert outcome.json["run"] == str(rgb)
    assert f"{rgb} (newest that fits; `--rgb-run PATH`" in outcome.err
    assert f"{flow} (newest that fits; `--flow-run PATH`" in outcome.err
    assert [row["stream"] for row in result["streams"]] == ["rgb", "flow", "fused"]
    assert result["top1"] == result["fused"]["top1"] == result["streams"][2]["top1"]
    for modality in ("rgb", "flow"):
        words = ("evaluate", "demo-tiny", "--root", root, "--modality", modality, "--json")
        alone = gkd(*words).must().json["result"]
        assert {key: result[modality][key] for key in ("top1", "top5", "protocol")} == {
            key: alone[key] for key in ("top1", "top5", "protocol")
        }
    protocol = result["protocol"]
    assert (protocol["modality"], protocol["fusion_weights"]) == ("rgb+flow", [1.0, 1.0])
    assert (protocol["flow_method"], protocol["videos"], protocol["split"]) == ("farneback", 24, 1)
    assert (rgb / "fusion-confusion.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((rgb / "fusion.json").read_text())["top1"] == result["top1"]


def test_a_weight_of_zero_leaves_one_stream(gkd: Gkd, root: Path) -> None:
    for weights, modality in (("1,0", "rgb"), ("0,2", "flow")):
        words = ("evaluate", "demo-tiny", "--root", root, "--fusion", "--fusion-weights", weights, "--json")
        result = gkd(*words).must().json["result"]
        assert result["confusion"] == result[modality]["confusion"]


def test_all_networks_side_by_side(gkd: Gkd, root: Path) -> None:
    words = ("evaluate", "demo-tiny", "--root", root, "--fusion", "--model", "all", "--json")
    outcome = gkd(*words).must()
    assert "no plain student to compare with" in outcome.err
    rows = outcome.json["result"]["runs"]
    assert [row["model"] for row in rows] == ["teacher", "distilled student"]
    assert rows[1]["top1"] == outcome.json["result"]["top1"]
    assert {"rgb_top1", "flow_top1"} <= rows[1].keys()
    assert rows[1]["parameters"] == outcome.json["result"]["parameters"]


def test_saved_predictions_are_fused_again(gkd: Gkd, root: Path) -> None:
    words = ("evaluate", "demo-tiny", "--root", root, "--fusion", "--json")
    assert gkd(*words, "--rescore").code == 1
    first = gkd(*words).must().json["result"]
    again = gkd(*words, "--rescore").must()
    assert "evaluate 2" not in again.err  # no network ran
    assert again.json["result"]["confusion"] == first["confusion"]


def test_the_flow_network_is_exported(gkd: Gkd, root: Path) -> None:
    words = ("export", "demo-tiny", "--root", root, "--modality", "flow", "--format", "onnx", "--json")
    result = gkd(*words).must().json["result"]
    assert Path(result["onnx"]["file"]).is_file()
    card = json.loads((Path(result["folder"]) / "card.json").read_text())
    assert card["input"]["shape"] == ["batch", 2, 16, 32, 32]
    assert "farneback" in card["preprocessing"]["steps"][0]
    assert card["preprocessing"]["mean"] == [0.5, 0.5]


def _edit(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_missing_stream_is_named(gkd: Gkd, root: Path) -> None:
    words = ("evaluate", "demo-tiny", "--root", root, "--fusion")
    shutil.rmtree(root / "runs" / "demo-tiny" / "distill-flow")
    outcome = gkd(*words)
    assert outcome.code == 1
    assert "no complete student for demo-tiny, flow, split 1" in outcome.err
    assert "--flow-run PATH" in outcome.err
    assert "distill demo-tiny --modality flow" in outcome.err
    (root / "stores" / "demo-tiny" / "flow.h5").unlink()
    shutil.rmtree(root / "stores" / "demo-tiny" / "flow")
    assert "there is no flow store for demo-tiny" in gkd(*words).err


def test_unlike_splits_are_refused(gkd: Gkd, root: Path) -> None:
    """A run of another split is never chosen, and refused when named."""
    flow = _run(root, "distill-flow")
    _edit(flow / "run.json", split=2)
    words = ("evaluate", "demo-tiny", "--root", root, "--fusion")
    outcome = gkd(*words)
    assert outcome.code == 1
    assert "of split 2" in outcome.err
    named = gkd(*words, "--flow-run", flow)
    assert named.code == 1
    assert "this run is of split 2, not 1" in named.err
    assert gkd("evaluate", "demo-tiny", "--root", root, "--modality", "flow", "--split", 2).code == 1


def test_unlike_classes_recipes_and_videos_are_refused(gkd: Gkd, root: Path) -> None:
    words = ("evaluate", "demo-tiny", "--root", root, "--fusion")
    flow = _run(root, "distill-flow")
    record = json.loads((flow / "run.json").read_text())
    _edit(flow / "run.json", classes=record["classes"][::-1])
    assert "of other classes than the store" in gkd(*words).err
    _edit(flow / "run.json", classes=record["classes"], recipe="official")
    assert "the two networks are of other recipes" in gkd(*words, "--flow-run", flow).err
    _edit(flow / "run.json", recipe="corrected")
    with h5py.File(root / "stores" / "demo-tiny" / "flow.h5", "r+") as index:
        index["/splits/1/test"][0] = index["/splits/1/train"][0]
    outcome = gkd(*words)
    assert outcome.code == 1
    assert "the two streams are of other videos: 24 and 24, 2 are only in one or differ" in outcome.err
    assert "evaluate 2" not in outcome.err  # before any network ran


def test_the_plan_names_both_networks(gkd: Gkd, root: Path) -> None:
    plan = (
        gkd("evaluate", "demo-tiny", "--root", root, "--fusion", "--dry-run", "--json").must().json["result"]
    )
    assert [row["stream"] for row in plan["runs"]] == ["rgb", "flow"]
    assert plan["videos"] == 24


def test_flow_of_another_kind_is_refused(gkd: Gkd, root: Path) -> None:
    """The store was made again with another method; the network never saw such flow."""
    shutil.rmtree(root / "stores" / "demo-tiny" / "flow")
    (root / "stores" / "demo-tiny" / "flow.h5").unlink()
    gkd("prepare", "demo-tiny", "--root", root, "--modality", "flow", "--flow", "dis").must()
    for command in ("evaluate", "distill"):
        words = (command, "demo-tiny", "--root", root, "--modality", "flow")
        assert "data.flow dis -> farneback" in gkd(*words).err  # the preset still says farneback
        outcome = gkd(*words, "--set", "data.flow=dis")
        assert outcome.code == 1
        assert "trained on flow of another kind: data.flow farneback, the store has dis" in outcome.err


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (("--fusion", "--run", "x"), "--run does not go with --fusion"),
        (("--fusion", "--modality", "flow"), "--modality flow does not go with --fusion"),
        (("--rgb-run", "x"), "--rgb-run does not go without --fusion"),
        (("--flow-run", "x"), "--flow-run does not go without --fusion"),
        (("--fusion-weights", "1,1"), "--fusion-weights does not go without --fusion"),
        (("--fusion", "--fusion-weights", "1"), "`1` is no pair of numbers"),
        (("--fusion", "--fusion-weights", "0,0"), "eval.fusion_weights are both 0"),
        (("--fusion", "--fusion-weights", "1,-1"), "eval.fusion_weights"),
        (("--fusion", "--fusion-weights", "one,two"), "`one,two` is no pair of numbers"),
        (("--modality", "both"), "'both' is not one of"),
    ],
)
def test_flags_that_do_not_fit_are_usage_errors(
    gkd: Gkd, tiny_streams: Path, flags: tuple[str, ...], what: str
) -> None:
    outcome = gkd("evaluate", "demo-tiny", "--root", tiny_streams, *flags)
    assert outcome.code == 2
    assert what in outcome.err
