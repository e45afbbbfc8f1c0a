"""Each setting says what it is, and refuses what it cannot be."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from gkdcli.resolve import setting_names
from gkdcli.settings import SECTIONS, DataSettings, Fraction, Settings


def _field(name: str) -> Any:
    section, dot, key = name.rpartition(".")
    model: Any = Settings.model_fields[section].annotation if dot else Settings
    return model.model_fields[key]


def test_sections_are_those_of_the_manual() -> None:
    assert SECTIONS == ("data", "clips", "model", "optim", "distill", "train", "eval", "export")


@pytest.mark.parametrize("name", setting_names())
def test_every_setting_is_described_and_bounded(name: str) -> None:
    """Help, printed pages and messages are made of these; a number without bounds cannot be refused early."""
    field = _field(name)
    assert field.description
    assert "unit" in field.json_schema_extra
    if field.annotation in (int, float):
        bounds = {type(rule).__name__ for rule in field.metadata}
        assert bounds & {"Ge", "Gt"}, f"{name} has no lower bound"
    if field.annotation is str:
        assert field.metadata, f"{name} takes any text"


@pytest.mark.parametrize(
    "name", [name for name in setting_names() if "float" in str(_field(name).annotation)]
)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_infinities_and_nan_are_refused(name: str, value: float) -> None:
    """They would pass a comparison here and surface as a broken loss an hour later."""
    section, _, key = name.rpartition(".")
    given: dict[type, Any] = {float: value, tuple[Fraction, Fraction]: (value, value)}
    with pytest.raises(ValidationError):
        Settings.model_validate({section: {key: given.get(_field(name).annotation, [value])}})


@pytest.mark.parametrize(
    ("page", "what", "hint"),
    [
        (
            {"data": {"size": [112]}},
            "data.size takes two numbers, width and height, or none",
            "for example [112, 112]",
        ),
        (
            {"task": "detection", "clips": {"length": 200}},
            "clips.length is 200 frames; the detector needs a multiple of 128",
            "use 256",
        ),
        (
            {"task": "detection", "clips": {"length": 16}},
            "clips.length is 16 frames; the detector needs a multiple of 128",
            "use 128",
        ),
        (
            {"task": "detection", "recipe": "official", "clips": {"length": 256}, "optim": {"batch_size": 2}},
            "optim.batch_size is 2; recipe official sums over the batch in detection and needs 1",
            "optim.accumulation makes larger steps",
        ),
        (
            {"optim": {"schedule": "step"}},
            "optim.schedule is step, but optim.step_epochs is empty",
            "for example [30, 45]",
        ),
        (
            {"train": {"compile": True, "checkpoint_activations": True}},
            "train.compile and train.checkpoint_activations exclude each other",
            "the compiler chooses by itself what backward computes again",
        ),
    ],
)
def test_rules_over_several_settings(page: dict[str, Any], what: str, hint: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Settings.model_validate(page)
    (found,) = caught.value.errors(include_url=False)
    assert found["ctx"]["error"].args == (what, hint)


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "-flag", "a b", "ü"])
@pytest.mark.parametrize("key", ["name", "dataset"])
def test_names_that_become_folders_stay_in_their_place(key: str, name: str) -> None:
    with pytest.raises(ValidationError):
        Settings.model_validate({key: name})


def test_settings_do_not_change_under_a_run() -> None:
    with pytest.raises(ValidationError):
        Settings().optim.epochs = 3
    with pytest.raises(ValidationError):
        Settings().recipe = "official"


def test_a_store_does_not_depend_on_how_it_was_made_or_is_divided() -> None:
    """A store stays usable with another number of processes and another held-out share."""
    one, other = DataSettings(workers=1, holdout=0.0), DataSettings(workers=8, holdout=0.5)
    assert one.stored("rgb") == other.stored("rgb")
    others = {"workers", "gpu_share", "timeout", "holdout", "flow_batch", "flow_weights"}
    assert set(one.stored("flow")) == set(DataSettings.model_fields) - others
    assert set(one.stored("flow")) - set(one.stored("rgb")) == {"flow", "flow_bound"}


def test_every_section_is_a_model_of_its_own() -> None:
    for section in SECTIONS:
        kind = Settings.model_fields[section].annotation
        assert isinstance(kind, type)
        assert issubclass(kind, BaseModel)
