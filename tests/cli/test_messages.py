"""Exit code, stdout and stderr of everything a user may type wrong: nothing else is shown, no traceback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gkdcli.resolve import preset_names

PRESETS = ", ".join(preset_names())
KNOWN = f"Known: {PRESETS}; a path such as `./mine.toml` works too"
LISTS = "`gkd distill demo --show-config` lists all"

# command line, what, where, hint; the whole of stderr
OURS = [
    ("distill", "no preset is named", "argument PRESET of `gkd distill`",
     f"one of {PRESETS}, or a path to a .toml"),
    ("prepare --retry", "no preset is named", "argument PRESET of `gkd prepare`",
     f"one of {PRESETS}, or a path to a .toml"),
    ("pretrain-attention thumos-14", "no preset is called `thumos-14`",
     "argument PRESET of `gkd pretrain-attention`", f"did you mean `thumos14`? {KNOWN}"),
    ("evaluate --preset ufc101", "no preset is called `ufc101`", "argument PRESET of `gkd evaluate`",
     f"did you mean `ucf101`? {KNOWN}"),
    ("export ./none.toml", "there is no preset file `./none.toml`", "argument PRESET of `gkd export`", KNOWN),
    ("distill demo --preset demo-tiny", "two presets are named, `demo` and `demo-tiny`",
     "argument PRESET of `gkd distill`, and --preset", "name one of them"),
    ("distill ucf101 --set optim.epoch=3", "`optim.epoch` is not a setting", "--set optim.epoch=3",
     "nearest is `optim.epochs`, now 200 from preset ucf101; `gkd distill ucf101 --show-config` lists all"),
    ("distill demo --set optim.epochs", "`optim.epochs` sets nothing", "--set optim.epochs",
     "write `--set section.key=value`"),
    ("distill demo --lr 0", "`optim.learning_rate` is 0.0, but it should be greater than 0", "--lr 0.0",
     "optim.learning_rate: learning rate of backbone, attention and head; default 0.001"),
    ("distill demo --epochs 0", "`optim.epochs` is 0, but it should be greater than or equal to 1",
     "--epochs 0", "optim.epochs: passes over the training videos (epochs); default 200"),
    ("distill demo --seed -1", "`train.seed` is -1, but it should be greater than or equal to 0", "--seed -1",
     "train.seed: seed of weights, order, crops, noise and dropout; default 2020"),
    ("distill demo --workers 999", "`train.workers` is 999, but it should be less than or equal to 256",
     "--workers 999",
     "train.workers: processes that load clips; 0: the training process itself (processes); default 0"),
    ("distill demo --set clips.length=60", "`clips.length` is 60, but it should be a multiple of 8",
     "--set clips.length=60", "clips.length: consecutive frames of a clip (frames); default 64"),
    ("distill thumos14 --set clips.length=200",
     "clips.length is 200 frames; the detector needs a multiple of 128", "--set clips.length=200", "use 256"),
    ("distill thumos14 --batch-size 2",
     "optim.batch_size is 2; recipe official sums over the batch in detection and needs 1",
     "--batch-size 2", "optim.accumulation makes larger steps"),
    ("distill demo --config none.toml", "there is no config file `none.toml`", "--config none.toml",
     "`gkd distill demo --show-config` prints a page to start from"),
    ("distill demo --config bad.toml",
     "this page is not valid TOML: Invalid value (at line 2, column 10)", "bad.toml", ""),
    ("distill ./bad.toml",
     "this page is not valid TOML: Invalid value (at line 2, column 10)", "bad.toml", ""),
    ("distill ./typo.toml", "`optim.epoch` is not a setting",
     "typo.toml, line 4, key `export.flow.optim.epoch`", f"nearest is `optim.epochs`; {LISTS}"),
    ("distill demo --config typo.toml", "`optim.epoch` is not a setting",
     "typo.toml, line 4, key `export.flow.optim.epoch`", f"nearest is `optim.epochs`; {LISTS}"),
    ("distill demo --config .", "there is no config file `.`", "--config .",
     "`gkd distill demo --show-config` prints a page to start from"),
    ("evaluate demo --run nowhere", "there is no rgb store for demo", "looked for stores/demo/rgb.h5", None),
]  # fmt: skip

# command line, what stderr's first line says in the parser's words, where, hint
PARSER = [
    ("distil demo", "'distil'", "`gkd`", "did you mean `distill`? `gkd --help` lists all flags"),
    ("frobnicate", "'frobnicate'", "`gkd`", "`gkd --help` lists all flags"),
    ("--frob", "--frob", "`gkd`", "`gkd --help` lists all flags"),
    ("distill demo --epoch 3", "--epoch", "`gkd distill`",
     "did you mean `--epochs`? `gkd distill --help` lists all flags"),
    ("evaluate demo --ouput x", "--ouput", "`gkd evaluate`",
     "did you mean `--output`? `gkd evaluate --help` lists all flags"),
    ("distill demo -x", "-x", "`gkd distill`", "`gkd distill --help` lists all flags"),
    ("distill demo --modality rbg", "'rbg' is not one of 'rgb', 'flow'", "`gkd distill`",
     "`gkd distill --help` lists all flags"),
    ("export demo --format onxx", "'onxx' is not one of", "`gkd export`",
     "`gkd export --help` lists all flags"),
    ("distill demo --max-steps 0", "--max-steps", "`gkd distill`", "`gkd distill --help` lists all flags"),
    ("distill demo --lr fast", "--lr", "`gkd distill`", "`gkd distill --help` lists all flags"),
    ("distill demo --split x", "--split", "`gkd distill`", "`gkd distill --help` lists all flags"),
    ("distill demo --root bad.toml", "--root", "`gkd distill`", "`gkd distill --help` lists all flags"),
    ("distill demo --set", "--set", "`gkd distill`", "`gkd distill --help` lists all flags"),
    ("distill demo extra", "extra", "`gkd distill`", "`gkd distill --help` lists all flags"),
    ("prepare demo a b", "b", "`gkd prepare`", "`gkd prepare --help` lists all flags"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.toml").write_text("[optim]\nepochs = = 3\n")
    Path("typo.toml").write_text("[optim]\nepochs = 3\n[export.flow.optim]\nepoch = 3\n")


@pytest.mark.parametrize(("line", "what", "where", "hint"), OURS, ids=[row[0] for row in OURS])
def test_messages_of_ours(
    line: str, what: str, where: str, hint: str | None, gkd: Callable[..., Any]
) -> None:
    outcome = gkd(*line.split())
    code = 1 if "store" in what else 2
    shown = outcome.err.splitlines()
    assert (outcome.code, outcome.out) == (code, "")
    assert shown[:2] == [f"error: {what}", f"where: {where}"]
    if hint is not None:
        assert shown[2:] == ([f"hint: {hint}"] if hint else [])
    _as_json(gkd(*line.split(), "--json"), shown, code)


@pytest.mark.parametrize(("line", "says", "where", "hint"), PARSER, ids=[row[0] for row in PARSER])
def test_messages_of_the_parser(line: str, says: str, where: str, hint: str, gkd: Callable[..., Any]) -> None:
    """Its wording changes with its version; that it names the culprit, and our two lines, do not."""
    outcome = gkd(*line.split())
    shown = outcome.err.splitlines()
    assert (outcome.code, outcome.out) == (2, "")
    assert len(shown) == 3
    assert says in shown[0]
    assert shown[0].startswith("error: ")
    assert shown[1:] == [f"where: command line of {where}", f"hint: {hint}"]
    first, *rest = line.split()
    if first.startswith("-"):
        _as_json(gkd("--json", first), shown, 2)
    else:
        _as_json(gkd(first, "--json", *rest), shown, 2)
        _as_json(gkd("--json", first, *rest), shown, 2)


def _as_json(outcome: Any, shown: list[str], code: int) -> None:
    """The same again in one document; stderr says it too, for the log."""
    document = outcome.json
    assert outcome.code == code
    assert outcome.err.splitlines() == shown
    assert list(document) == ["schema", "ok", "command", "version", "run", "error"]
    assert (document["schema"], document["ok"], document["version"], document["run"]) == (
        1,
        False,
        "0.1.0",
        None,
    )
    error = document["error"]
    assert list(error) == ["what", "where", "hint", "code"]
    assert error["code"] == code
    told = [f"error: {error['what']}", f"where: {error['where']}", f"hint: {error['hint']}"]
    assert [part for part in told if not part.endswith(": ")] == shown


def test_an_unknown_variable_stops_every_command(
    gkd: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GKD_OPTIM__EPOCH", "3")
    for command in ("prepare", "pretrain-attention", "distill", "evaluate", "export"):
        outcome = gkd(command, "demo", "--show-config")
        assert (outcome.code, outcome.out) == (2, "")
        assert outcome.err == (
            "error: `GKD_OPTIM__EPOCH` stands for no setting\n"
            "where: environment variable GKD_OPTIM__EPOCH=3\n"
            "hint: nearest is `GKD_OPTIM__EPOCHS`; unset it, or write GKD_SECTION__KEY\n"
        )


@pytest.mark.parametrize(
    ("line", "command"),
    [
        ("--json", ""),
        ("--json nothing", ""),
        ("distill dem --json", "distill"),
        ("--json export dem", "export"),
        ("evaluate --json dem", "evaluate"),
        ("prepare --preset dem --json", "prepare"),
    ],
)
def test_a_failure_document_names_its_command(line: str, command: str, gkd: Callable[..., Any]) -> None:
    outcome = gkd(*line.split())
    assert outcome.code == 2
    assert outcome.json["command"] == command


def test_what_stands_behind_two_dashes_is_no_flag(gkd: Callable[..., Any]) -> None:
    outcome = gkd("distill", "dem", "--", "--json")
    assert (outcome.code, outcome.out) == (2, "")


@pytest.mark.parametrize("command", ["pretrain-attention", "distill", "evaluate", "export"])
def test_without_a_store_every_command_says_how_to_make_one(command: str, gkd: Callable[..., Any]) -> None:
    outcome = gkd(command, "demo")
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.splitlines()[:2] == [
        "error: there is no rgb store for demo",
        "where: looked for stores/demo/rgb.h5",
    ]
    assert "gkd prepare demo" in outcome.err
