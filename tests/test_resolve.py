"""How the sources of settings are merged, and what they may not say."""

from __future__ import annotations

import itertools
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gkdcli.errors import ExitCode, GkdError
from gkdcli.resolve import (
    Resolved,
    load_settings,
    page_to_toml,
    preset_folder,
    preset_names,
    read_page,
    resolve,
    setting_names,
    to_toml,
    toml_value,
)
from gkdcli.settings import MODALITIES, STAGES, Settings

HERE = Path()


def _resolve(preset: str = "demo", stage: str = "distill", modality: str = "rgb", **given: Any) -> Resolved:
    return resolve(preset, stage=stage, modality=modality, **{"root": HERE} | given)


def _value(settings: Settings, name: str) -> Any:
    value: Any = settings
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _refused(**given: Any) -> GkdError:
    with pytest.raises(GkdError) as caught:
        _resolve(**given)
    assert caught.value.code == ExitCode.USAGE
    return caught.value


# ---- the figures of METHOD.md 4: one row per preset, stage and modality ----

RGB, FLOW = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), ([0.5], [0.226])
SCALES = [1.0, 0.875, 0.75, 0.66]
# preset, stage, modality: algorithm, lr, weight decay, CVAE lr, batch, epochs, beta, ramp, length, crop
FIGURES = [
    ("ucf101", "distill", "rgb", "sgd", 1e-3, 5e-4, 1e-4, 6, 200, 0.1, 20, 64, 224),
    ("ucf101", "distill", "flow", "sgd", 1e-2, 5e-4, 1e-4, 12, 200, 0.1, 20, 64, 224),
    ("ucf101", "pretrain", "rgb", "sgd", 1e-3, 5e-4, 1e-3, 6, 200, 0.1, 0, 64, 224),
    ("ucf101", "pretrain", "flow", "sgd", 1e-2, 5e-4, 1e-3, 12, 200, 0.1, 0, 64, 224),
    ("hmdb51", "distill", "rgb", "sgd", 1e-3, 5e-4, 1e-4, 6, 200, 0.1, 20, 64, 224),
    ("hmdb51", "distill", "flow", "sgd", 1e-2, 5e-4, 1e-4, 12, 200, 0.1, 20, 64, 224),
    ("hmdb51", "pretrain", "rgb", "sgd", 1e-3, 5e-4, 1e-3, 6, 200, 0.1, 0, 64, 224),
    ("hmdb51", "pretrain", "flow", "sgd", 1e-2, 5e-4, 1e-3, 12, 200, 0.1, 0, 64, 224),
    ("thumos14", "distill", "rgb", "adam", 1e-6, 1e-3, 1e-4, 1, 50, 10.0, 20, 256, 96),
    ("thumos14", "distill", "flow", "adam", 1e-5, 1e-3, 1e-4, 1, 20, 10.0, 20, 256, 96),
    ("thumos14", "pretrain", "rgb", "adam", 1e-5, 1e-3, 1e-3, 1, 300, 10.0, 0, 256, 96),
    ("thumos14", "pretrain", "flow", "adam", 1e-5, 1e-3, 1e-3, 1, 16, 10.0, 0, 256, 96),
]


@pytest.mark.parametrize("row", FIGURES, ids=lambda row: "-".join(row[:3]))
def test_presets_have_the_published_figures(row: tuple[Any, ...]) -> None:
    preset, stage, modality, *wanted = row
    page = _resolve(preset, stage, modality).settings
    names = (
        "optim.algorithm optim.learning_rate optim.weight_decay optim.generator_lr optim.batch_size"
        " optim.epochs distill.beta distill.ramp_epochs clips.length clips.crop"
    )
    assert [_value(page, name) for name in names.split()] == wanted


@pytest.mark.parametrize("preset", ["ucf101", "hmdb51", "thumos14"])
def test_what_the_published_presets_have_in_common(preset: str) -> None:
    for stage in ("pretrain", "distill"):
        page = _resolve(preset, stage).settings
        assert page.recipe == "official"
        assert page.optim.generator_betas == (0.8, 0.999)
        assert (page.distill.kl_weight, page.distill.generative_weight) == (0.1, 0.01)
        assert page.distill.reconstruction_weight == 0.5
        assert (page.optim.momentum, page.optim.schedule, page.optim.warmup_epochs) == (0.9, "constant", 0)
        assert (page.train.schedule, page.train.init, page.train.seed) == ("epoch", "scratch", 2020)
        assert (page.model.teacher, page.model.student, page.model.width) == ("i3d", "top-i3d", 1.0)
        assert (page.model.dropout, page.model.bn_momentum) == (0.5, 0.01)
        assert page.data.holdout == 0


@pytest.mark.parametrize(("preset", "short_side", "clip_short_side"), [("ucf101", 0, 0), ("hmdb51", 0, 240)])
def test_how_recognition_sees_its_frames(preset: str, short_side: int, clip_short_side: int) -> None:
    for modality, scales, (mean, std) in (("rgb", SCALES, RGB), ("flow", SCALES[:3], FLOW)):
        page = _resolve(preset, "distill", modality).settings
        assert (page.data.short_side, page.clips.short_side) == (short_side, clip_short_side)
        assert (page.clips.scales, page.clips.mean, page.clips.std) == (scales, mean, std)
        assert page.task == "recognition"


def test_how_detection_sees_its_frames() -> None:
    page = _resolve("thumos14").settings
    assert (page.task, page.data.storage, page.data.size, page.data.fps) == (
        "detection",
        "raw",
        [112, 112],
        10,
    )
    assert (page.clips.mean, page.clips.std) == ([0.5], [0.5])


@pytest.mark.parametrize("preset", ["demo", "demo-tiny", "folder"])
def test_ones_own_sets_are_corrected_and_start_from_the_teacher(preset: str) -> None:
    page = _resolve(preset).settings
    assert (page.recipe, page.train.init, page.train.schedule) == ("corrected", "teacher", "step")
    assert _resolve(preset, "pretrain").settings.train.init == "scratch"
    assert page.data.holdout == 0.1


@pytest.mark.parametrize("modality", MODALITIES)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("preset", preset_names())
def test_every_page_resolves_and_prints_as_toml_that_says_the_same(
    preset: str, stage: str, modality: str, tmp_path: Path
) -> None:
    found = _resolve(preset, stage, modality)
    for text in (to_toml(found.settings), to_toml(found.settings, found.origin)):
        (tmp_path / "again.toml").write_text(text, encoding="utf-8")
        assert Settings.model_validate(tomllib.loads(text)) == found.settings
        assert load_settings(tmp_path / "again.toml") == found.settings
        assert _resolve(str(tmp_path / "again.toml"), stage, modality).settings == found.settings
    assert list(found.origin) == setting_names()


@pytest.mark.parametrize("preset", preset_names())
def test_a_page_written_again_is_the_same_page(preset: str) -> None:
    page = read_page(preset_folder() / f"{preset}.toml")
    assert tomllib.loads(page_to_toml(page)) == page


@settings(derandomize=True, deadline=None, max_examples=200)
@given(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"])),
        st.integers(-(2**63), 2**63 - 1),
        st.floats(allow_nan=False, allow_infinity=False),
        st.booleans(),
        st.lists(st.floats(allow_nan=False, allow_infinity=False)),
    )
)
def test_any_value_survives_being_written_as_toml(value: Any) -> None:
    found = tomllib.loads(f"value = {toml_value(value)}")["value"]
    assert found == value
    assert type(found) is type(value)


# ---- the order of the sources ----

SOURCES = ("default", "preset", "--config", "GKD_", "--set", "--epochs")


def _from(sources: set[str], folder: Path) -> Resolved:
    """`optim.epochs` given by some sources, each with its own number."""
    number = {source: 11 + place for place, source in enumerate(SOURCES)}
    preset, config = folder / "page.toml", folder / "config.toml"
    preset.write_text(f"[optim]\nepochs = {number['preset']}\n" if "preset" in sources else "[optim]\n")
    config.write_text(f"[optim]\nepochs = {number['--config']}\n")
    return _resolve(
        str(preset),
        config=config if "--config" in sources else None,
        environment={"GKD_OPTIM__EPOCHS": str(number["GKD_"])} if "GKD_" in sources else {},
        sets=[f"optim.epochs={number['--set']}"] if "--set" in sources else [],
        flags={"optim.epochs": ("--epochs", number["--epochs"])} if "--epochs" in sources else {},
    )


@pytest.mark.parametrize(("weak", "strong"), list(itertools.pairwise(SOURCES)))
def test_each_source_beats_the_one_below(weak: str, strong: str, tmp_path: Path) -> None:
    below = set(SOURCES[: SOURCES.index(strong)])
    assert _from({weak, strong}, tmp_path).settings.optim.epochs == 11 + SOURCES.index(strong)
    everything = _from(below | {strong}, tmp_path)
    assert everything.settings.optim.epochs == 11 + SOURCES.index(strong)
    origin = {
        "preset": "preset page",
        "--config": f"--config {tmp_path / 'config.toml'}",
        "GKD_": "GKD_OPTIM__EPOCHS",
    }
    assert everything.origin["optim.epochs"] == origin.get(strong, strong)
    assert everything.origin["optim.momentum"] == "default"


OVERLAYS = ("[optim]", "[flow.optim]", "[distill.optim]", "[distill.flow.optim]")


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("reverse", [False, True])
def test_within_a_page_the_most_specific_wins_wherever_it_stands(
    count: int, reverse: bool, tmp_path: Path
) -> None:
    tables = OVERLAYS[:count]
    lines = [f"{table}\nepochs = {11 + place}\n" for place, table in enumerate(tables)]
    page = tmp_path / "page.toml"
    page.write_text("".join(reversed(lines) if reverse else lines))
    found = _resolve(str(page), "distill", "flow")
    assert found.settings.optim.epochs == 10 + count
    assert found.origin["optim.epochs"] == f"preset page{'' if count == 1 else f' {tables[-1]}'}"


@pytest.mark.parametrize("table", OVERLAYS[1:])
def test_overlays_of_other_stages_and_modalities_do_nothing(table: str, tmp_path: Path) -> None:
    (tmp_path / "page.toml").write_text(f"[optim]\nepochs = 1\n{table}\nepochs = 2\n")
    assert _resolve(str(tmp_path / "page.toml"), "pretrain", "rgb").settings.optim.epochs == 1


def test_a_plain_value_of_a_stronger_page_beats_an_overlay_of_a_weaker_one(tmp_path: Path) -> None:
    """`--config` means what it says, however specific the preset is."""
    (tmp_path / "page.toml").write_text("[distill.flow.optim]\nepochs = 1\n")
    (tmp_path / "config.toml").write_text("[optim]\nepochs = 2\n")
    found = _resolve(str(tmp_path / "page.toml"), "distill", "flow", config=tmp_path / "config.toml")
    assert found.settings.optim.epochs == 2


@pytest.mark.parametrize("name", ["distill", "export"])
def test_a_stage_that_is_also_a_section_can_be_meant_either_way(name: str, tmp_path: Path) -> None:
    key, default, other = ("beta", 0.1, 0.2) if name == "distill" else ("opset", 20, 21)
    page = tmp_path / "page.toml"
    page.write_text(f"[{name}]\n{key} = {other}\n[{name}.{name}]\n{key} = {default}\n")
    assert _value(_resolve(str(page), name).settings, f"{name}.{key}") == default
    assert _value(_resolve(str(page), "evaluate").settings, f"{name}.{key}") == other


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("train.init=teacher", "train.init", "teacher"),
        ('train.init="a # b"', "train.init", "a # b"),
        ("train.init=runs/a=b", "train.init", "runs/a=b"),
        (" optim.epochs = 3 ", "optim.epochs", 3),
        ("optim.learning_rate=1e-5", "optim.learning_rate", 1e-5),
        ("clips.flip=false", "clips.flip", False),
        ("clips.mean=[0.1, 0.2, 0.3]", "clips.mean", [0.1, 0.2, 0.3]),
        ("recipe=official", "recipe", "official"),
    ],
)
def test_set_and_environment_read_values_alike(text: str, name: str, value: Any) -> None:
    variable = "GKD_" + name.upper().replace(".", "__")
    for found in (_resolve(sets=[text]), _resolve(environment={variable: text.partition("=")[2]})):
        assert _value(found.settings, name) == value


def test_the_last_of_several_sets_wins() -> None:
    assert _resolve(sets=["optim.epochs=3", "optim.epochs=4"]).settings.optim.epochs == 4


def test_runs_follow_the_presets_name_and_stores_the_dataset(tmp_path: Path) -> None:
    (tmp_path / "slow.toml").write_text('dataset = "demo"\n')
    page = _resolve(str(tmp_path / "slow.toml")).settings
    assert (page.name, page.dataset) == ("slow", "demo")
    (tmp_path / "own.toml").write_text("")
    page = _resolve(str(tmp_path / "own.toml")).settings
    assert (page.name, page.dataset) == ("own", "own")


def test_a_store_of_ones_own_is_a_preset_too(tmp_path: Path) -> None:
    folder = tmp_path / "stores" / "mine"
    folder.mkdir(parents=True)
    (folder / "preset.toml").write_text("[optim]\nepochs = 7\n")
    assert _resolve("mine", root=tmp_path).settings.optim.epochs == 7
    assert "mine" in _refused(preset="mini", root=tmp_path).hint
    assert f"Known: {', '.join(preset_names())};" in _refused(preset="mine").hint


# ---- names and values that are refused ----


@pytest.mark.parametrize(
    ("line", "table", "key"),
    [
        ("[optim]\nepoch = 3", "optim", "optim.epoch"),
        ("[export.flow.optim]\nepoch = 3", "export.flow.optim", "optim.epoch"),
        ("[prepare.optim]\nepoch = 3", "prepare.optim", "optim.epoch"),
        ("optim.epoch = 3", "optim", "optim.epoch"),
        ("recipes = 'official'", "", "recipes"),
    ],
)
def test_an_unknown_key_is_an_error_even_in_an_overlay_that_is_not_in_use(
    line: str, table: str, key: str, tmp_path: Path
) -> None:
    for role in ("preset", "config"):
        page = tmp_path / f"{role}.toml"
        page.write_text(f"# a comment\n\n{line}\n")
        error = _refused(**{role: str(page) if role == "preset" else page})
        assert error.what == f"`{key}` is not a setting"
        number = 3 if "\n" not in line else 4
        whole = ".".join(filter(None, [table, key.rpartition(".")[2]]))
        assert error.where == f"{page}, line {number}, key `{whole}`"
        nearest = "optim.epochs" if "epoch" in key else "recipe"
        assert error.hint == f"nearest is `{nearest}`; `gkd distill demo --show-config` lists all"


@pytest.mark.parametrize(
    "table", ["optimm", "distil.optim", "flow.rgb.optim", "distill.flows.optim", "data.fps"]
)
@pytest.mark.parametrize("body", ["", "epochs = 3\n"])
def test_an_unknown_table_is_an_error_even_if_it_is_empty(table: str, body: str, tmp_path: Path) -> None:
    page = tmp_path / "page.toml"
    page.write_text(f"[{table}]\n{body}")
    error = _refused(preset=str(page))
    assert "is not a table of settings" in error.what
    assert error.where.startswith(f"{page}, ")
    assert "nearest is" in error.hint


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("GKD_OPTIM__LEARNING_RAT", "GKD_OPTIM__LEARNING_RATE"),
        ("GKD_OPTIM_LEARNING_RATE", "GKD_OPTIM__LEARNING_RATE"),
        ("GKD_RECIPES", "GKD_RECIPE"),
        ("GKD_", None),
        ("GKD_HOME", None),
    ],
)
def test_an_unknown_variable_is_an_error(name: str, near: str | None) -> None:
    error = _refused(environment={name: "1"})
    assert error.what == f"`{name}` stands for no setting"
    assert error.where == f"environment variable {name}=1"
    assert error.hint == (f"nearest is `{near}`; " if near else "") + "unset it, or write GKD_SECTION__KEY"


def test_other_variables_are_nobodys_business() -> None:
    _resolve(environment={"GKDX": "1", "PATH": "/bin", "gkd_recipe": "x"})


def test_an_unknown_set_names_the_nearest_and_its_present_value() -> None:
    error = _refused(preset="thumos14", sets=["optim.learning_rat=1e-5"])
    assert error.what == "`optim.learning_rat` is not a setting"
    assert error.where == "--set optim.learning_rat=1e-5"
    assert error.hint == (
        "nearest is `optim.learning_rate`, now 1e-06 from preset thumos14;"
        " `gkd distill thumos14 --show-config` lists all"
    )


def test_a_setting_without_its_section_is_recognised() -> None:
    assert (
        "nearest is `data.jpeg_quality`, now 95 from preset demo" in _refused(sets=["jpeg_quality=90"]).hint
    )


@pytest.mark.parametrize("text", ["optim.epochs", "", "optim"])
def test_a_set_without_a_value_sets_nothing(text: str) -> None:
    assert _refused(sets=[text]).hint == "write `--set section.key=value`"


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("optim.learning_rate", "0", "should be greater than 0"),
        ("optim.learning_rate", "nan", "should be a finite number"),
        ("optim.epochs", "2.5", "should be a valid integer"),
        ("optim.epochs", "many", "should be a valid integer"),
        ("optim.epochs", "true", "takes no truth value"),
        ("clips.length", "60", "should be a multiple of 8"),
        ("clips.scales", "[1.0, 2.0]", "should be less than or equal to 1"),
        ("clips.scales", "[]", "should have at least 1 item"),
        ("optim.algorithm", "sdg", "should be 'sgd' or 'adam'"),
        ("dataset", "a b", "should match pattern"),
        ("train.init", "3", "should be a valid string"),
        ("optim.generator_betas", "[0.9]", "required"),
    ],
)
def test_a_value_that_cannot_be_is_refused_with_its_place_and_meaning(
    name: str, value: str, says: str, tmp_path: Path
) -> None:
    """The same words whatever the source; the place is the source's own."""
    section, _, key = name.rpartition(".")
    page = tmp_path / "page.toml"
    quoted = f'"{value}"' if value in ("many", "sdg", "a b") else value
    page.write_text(f"[{section}]\n{key} = {quoted}\n" if section else f"{key} = {quoted}\n")
    number = 2 if section else 1
    variable = "GKD_" + name.upper().replace(".", "__")
    for source, where in (
        ({"preset": str(page)}, f"{page}, line {number}, key `{name}`"),
        ({"config": page}, f"{page}, line {number}, key `{name}`"),
        ({"environment": {variable: value}}, f"environment variable {variable}={value}"),
        ({"sets": [f"{name}={value}"]}, f"--set {name}={value}"),
    ):
        error = _refused(**source)
        assert error.what.startswith(f"`{name}` is ")
        assert says in error.what
        assert error.where == where
        assert error.hint.startswith(f"{name}: ")


def test_a_rule_over_several_settings_names_the_one_that_was_given(tmp_path: Path) -> None:
    page = tmp_path / "mine.toml"
    page.write_text('task = "detection"\n\n[clips]\nlength = 248\n')
    error = _refused(preset=str(page))
    assert error.what == "clips.length is 248 frames; the detector needs a multiple of 128"
    assert error.where == f"{page}, line 4, key `clips.length`"
    assert error.hint == "use 256"
    page.write_text('task = "detection"\n')
    assert _refused(preset=str(page)).where == "default of clips.length"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"[optim]\nepochs = = 3\n", "line 2"),
        (b"[optim]\nepochs = 3\nepochs = 4\n", "line 3"),
        (b"[optim\n", "line 1"),
        (b"name = \xff\n", "utf-8"),
    ],
)
def test_a_page_that_is_no_toml_names_the_line(content: bytes, says: str, tmp_path: Path) -> None:
    page = tmp_path / "page.toml"
    page.write_bytes(content)
    for error in (_refused(preset=str(page)), _refused(config=page)):
        assert error.what.startswith("this page is not valid TOML")
        assert says in error.what
        assert error.where == str(page)


def test_a_byte_order_mark_and_crlf_are_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "page.toml").write_bytes(b"\xef\xbb\xbf[optim]\r\nepochs = 3\r\n")
    assert _resolve(str(tmp_path / "page.toml")).settings.optim.epochs == 3


@pytest.mark.parametrize("preset", ["thumos-14", "", ".", "..", "a" * 300, "../presets", "x" * 300 + ".toml"])
def test_a_preset_that_is_not_there_is_a_usage_error(preset: str) -> None:
    error = _refused(preset=preset)
    assert error.where == "argument PRESET of `gkd distill`"
    assert ("did you mean `thumos14`? " in error.hint) == (preset == "thumos-14")
    assert error.hint.endswith(f"Known: {', '.join(preset_names())}; a path such as `./mine.toml` works too")


def test_the_settings_of_a_run_that_another_version_wrote_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    path.write_text('name = "x"\n\n[optim]\nlearning_rate = 1.0\nlr = 3\n')
    with pytest.raises(GkdError) as caught:
        load_settings(path)
    assert caught.value.code == ExitCode.FAILED
    assert caught.value.what == "the settings of this run cannot be used: `optim.lr` is not a setting"
    assert caught.value.where == f"{path}, line 5, key `optim.lr`"
    with pytest.raises(GkdError, match="this run has no settings"):
        load_settings(tmp_path / "none.toml")
    path.write_text("[optim\n")
    with pytest.raises(GkdError, match="not valid TOML"):
        load_settings(path)
