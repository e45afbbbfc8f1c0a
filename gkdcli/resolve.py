"""Merges the sources of settings: flags > --set > GKD_SECTION__KEY > --config > preset > default.

A page (preset or --config file) is TOML: top-level keys, one table per section, and overlays for a
stage, a modality or both (`[distill.optim]`, `[flow.optim]`, `[distill.flow.optim]`). Within a page the
most specific wins: both > stage > modality > plain section.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from gkdcli.errors import GkdError, usage_error
from gkdcli.settings import MODALITIES, NAME, SECTIONS, STAGES, Settings

PREFIX = "GKD_"


@dataclass(frozen=True)
class Resolved:
    """Settings, for every dotted key where its value came from, and the preset as it was read."""

    settings: Settings
    origin: dict[str, str]
    page: dict[str, Any]


@dataclass(frozen=True)
class _Given:
    value: Any
    origin: str
    where: str


def setting_names() -> list[str]:
    """All dotted names: `optim.learning_rate`, `recipe`, ..."""
    names = []
    for name, field in Settings.model_fields.items():
        kind = field.annotation
        if name in SECTIONS and isinstance(kind, type) and issubclass(kind, BaseModel):
            names += [f"{name}.{key}" for key in kind.model_fields]
        else:
            names.append(name)
    return names


def preset_folder() -> Path:
    """In a wheel `gkdcli/presets`; in a checkout the folder beside the package."""
    packed = Path(__file__).parent / "presets"
    return packed if packed.is_dir() else Path(__file__).parent.parent / "presets"


def preset_names() -> list[str]:
    """The pages that come with gkd."""
    return sorted(path.stem for path in preset_folder().glob("*.toml"))


def _find_page(preset: str, root: Path, command: str) -> tuple[Path, str]:
    """The TOML file behind a preset's name, a path, or the name of an existing store; and its run name."""
    where = f"argument PRESET of `gkd {command}`"
    if preset.endswith(".toml") or "/" in preset:
        if not os.path.isfile(preset):
            raise usage_error(f"there is no preset file `{preset}`", where, _known(preset, root))
        return Path(preset), Path(preset).stem
    packed, own = preset_folder() / f"{preset}.toml", root / "stores" / preset / "preset.toml"
    for path in (packed, own):
        if re.fullmatch(NAME, preset) and os.path.isfile(path):
            return path, preset
    raise usage_error(f"no preset is called `{preset}`", where, _known(preset, root))


def _known(preset: str, root: Path) -> str:
    names = sorted({*preset_names(), *(path.parent.name for path in root.glob("stores/*/preset.toml"))})
    near = difflib.get_close_matches(preset, names, n=1)
    guess = f"did you mean `{near[0]}`? " if near else ""
    return f"{guess}Known: {', '.join(names)}; a path such as `./mine.toml` works too"


def resolve(
    preset: str,
    *,
    stage: str,
    modality: str,
    root: Path,
    config: Path | None = None,
    sets: Sequence[str] = (),
    flags: Mapping[str, tuple[str, Any]] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Resolved:
    """Merges all sources for one command.

    Args:
        preset: a preset's name, a path to a .toml, or the name of an existing store.
        stage: which overlays apply, one of `STAGES`.
        modality: likewise, one of `MODALITIES`.
        root: the folder under which stores are looked up.
        config: a page that overrides the preset.
        sets: `section.key=value`, from the command line.
        flags: dotted key -> (flag, value), for the flags that stand for settings.
        environment: usually `os.environ`.

    Raises:
        GkdError: an unknown name or a value out of range, with its origin (exit code 2).
    """
    path, name = _find_page(preset, root, STAGES[stage])
    page = read_page(path)
    given: dict[str, _Given] = {
        "name": _Given(name, f"preset {name}", str(path)),
        "dataset": _Given(name, f"preset {name}", str(path)),
    }
    given |= _flatten(page, stage, modality, f"preset {name}", path)
    if config is not None:
        if not os.path.isfile(config):
            raise usage_error(
                f"there is no config file `{config}`",
                f"--config {config}",
                f"`gkd {STAGES[stage]} {preset} --show-config` prints a page to start from",
            )
        given |= _flatten(read_page(config), stage, modality, f"--config {config}", config)
    given |= _from_environment(environment or {})
    for text in sets:
        key, separator, value = text.partition("=")
        key, where = key.strip(), f"--set {text}"
        if not separator:
            raise usage_error(f"`{text}` sets nothing", where, "write `--set section.key=value`")
        _require_known(key, where, given, f"`gkd {STAGES[stage]} {preset} --show-config` lists all")
        given[key] = _Given(_value(value.strip()), "--set", where)
    for key, (flag, value) in (flags or {}).items():
        given[key] = _Given(value, flag, f"{flag} {value}")
    settings = _validate(given)
    origin = {key: given[key].origin if key in given else "default" for key in setting_names()}
    return Resolved(settings, origin, page)


def read_page(path: Path) -> dict[str, Any]:
    """Parses a TOML page.

    Raises:
        GkdError: not readable, not UTF-8 or not TOML, with the parser's line (exit code 2).
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise usage_error(f"this page cannot be read: {error.strerror}", str(path)) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise usage_error(f"this page is not valid TOML: {error}", str(path)) from None


def _flatten(
    page: Mapping[str, Any], stage: str, modality: str, origin: str, path: Path
) -> dict[str, _Given]:
    """The values of a page that apply to (stage, modality), after checking every name in it."""
    layers: dict[int, dict[str, _Given]] = {0: {}, 1: {}, 2: {}, 3: {}}
    _check_tables(page, path)
    for names, value in _leaves(page):
        overlay = list(names)
        on_stage = on_modality = None
        # `distill` and `export` are stages as well as sections: the number of names tells which is meant
        if len(overlay) > 2 and overlay[0] in STAGES:
            on_stage = overlay.pop(0)
        if len(overlay) > 2 and overlay[0] in MODALITIES:
            on_modality = overlay.pop(0)
        key, where = ".".join(overlay), f"{path}, {_line_of(path, names)}key `{'.'.join(names)}`"
        _require_known(key, where, {}, "`gkd distill demo --show-config` lists all")
        if on_stage not in (None, stage) or on_modality not in (None, modality):
            continue
        depth = 2 * (on_stage is not None) + (on_modality is not None)
        table = ".".join(names[:-1]) if depth else ""
        layers[depth][key] = _Given(value, f"{origin} [{table}]" if table else origin, where)
    return layers[0] | layers[1] | layers[2] | layers[3]


def _check_tables(page: Mapping[str, Any], path: Path) -> None:
    """Every table is a section or an overlay of one, those that hold nothing included."""
    overlays = [
        "",
        *STAGES,
        *MODALITIES,
        *(f"{stage}.{modality}" for stage in STAGES for modality in MODALITIES),
    ]
    known = {f"{overlay}.{section}".strip(".") for overlay in overlays for section in ("", *SECTIONS)}
    for names in _tables(page):
        table = ".".join(names)
        if table not in known:
            near = difflib.get_close_matches(table, known, n=1)
            raise usage_error(
                f"`[{table}]` is not a table of settings",
                f"{path}, {_line_of(path, names)}table `[{table}]`",
                (f"nearest is `[{near[0]}]`; " if near else "")
                + f"tables are {', '.join(SECTIONS)}, or one of them after a stage or a modality",
            )


def _tables(table: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield (*prefix, key)
            yield from _tables(value, (*prefix, key))


def _leaves(table: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*prefix, key))
        else:
            yield (*prefix, key), value


def _line_of(path: Path, names: tuple[str, ...]) -> str:
    """`line 12, ` of a key or a table; "" for what stands in an inline table."""

    def split(dotted: str) -> tuple[str, ...]:
        return tuple(part.strip(" \t\"'") for part in dotted.split("."))

    table: tuple[str, ...] = ()
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        if header := re.match(r"\s*\[([^\[\]]+)\]", line):
            found = table = split(header[1])
        elif entry := re.match(r"\s*([^=#]+)=", line):
            found = (*table, *split(entry[1]))
        else:
            continue
        if found == names:
            return f"line {number}, "
    return ""


def _from_environment(environment: Mapping[str, str]) -> dict[str, _Given]:
    keys = {key.upper().replace(".", "__"): key for key in setting_names()}
    given = {}
    for variable, text in sorted(environment.items()):
        if not variable.startswith(PREFIX):
            continue
        name = variable.removeprefix(PREFIX)
        if name not in keys:
            near = difflib.get_close_matches(name, keys, n=1)
            raise usage_error(
                f"`{variable}` stands for no setting",
                f"environment variable {variable}={text}",
                (f"nearest is `{PREFIX}{near[0]}`; " if near else "") + "unset it, or write GKD_SECTION__KEY",
            )
        key = keys[name]
        given[key] = _Given(_value(text), variable, f"environment variable {variable}={text}")
    return given


def _value(text: str) -> Any:
    """A TOML value, or the text itself (`teacher` needs no quotes)."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _require_known(key: str, where: str, given: Mapping[str, _Given], lists_all: str) -> None:
    names = setting_names()
    if key in names:
        return
    last = key.rpartition(".")[2]
    near = difflib.get_close_matches(key, names, n=1) or [
        name for name in names if name.rpartition(".")[2] == last
    ]
    now = given.get(near[0]) if near else None
    value = f", now {now.value} from {now.origin}" if now else ""
    nearest = f"nearest is `{near[0]}`{value}; " if near else ""
    raise usage_error(f"`{key}` is not a setting", where, nearest + lists_all)


def _validate(given: Mapping[str, _Given]) -> Settings:
    nested: dict[str, Any] = {}
    for key, item in given.items():
        section, dot, name = key.rpartition(".")
        if isinstance(item.value, bool) and _field(key).annotation is not bool:
            raise usage_error(
                f"`{key}` is {toml_value(item.value)}, but it takes no truth value",
                item.where,
                _meaning(key),
            )
        (nested.setdefault(section, {}) if dot else nested)[name] = item.value
    try:
        return Settings.model_validate(nested)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    parts = [str(part) for part in first["loc"]]
    if first["type"] == "value_error":  # a rule over several settings, raised with what and hint
        what, *hint = first["ctx"]["error"].args
        raise usage_error(what, _where_of(what, given), " ".join(hint))
    key = ".".join(parts[:2] if parts[0] in SECTIONS else parts[:1])
    item = given[key]
    message = re.sub(r"^(Input|String|List|Tuple) ", "", first["msg"])
    raise usage_error(f"`{key}` is {item.value!r}, but it {message}", item.where, _meaning(key))


def _where_of(message: str, given: Mapping[str, _Given]) -> str:
    """A rule over several settings names its keys; the first named one that was given is the place."""
    found = {key: re.search(rf"\b{re.escape(key)}\b", message) for key in setting_names()}
    named = sorted((match.start(), key) for key, match in found.items() if match)
    return next((given[key].where for _, key in named if key in given), f"default of {named[0][1]}")


def _field(key: str) -> Any:
    section, dot, name = key.rpartition(".")
    model: Any = Settings.model_fields[section].annotation if dot else Settings
    return model.model_fields[name]


def describe(key: str) -> str:
    """A setting in words: `optim.epochs: passes over the training videos (epochs)`."""
    field = _field(key)
    unit = field.json_schema_extra["unit"]
    return f"{key}: {field.description}{f' ({unit})' if unit else ''}"


def _meaning(key: str) -> str:
    return f"{describe(key)}; default {toml_value(_field(key).default)}"


def toml_value(value: Any) -> str:
    """One value as TOML (JSON's strings, numbers, booleans and arrays are TOML's, but for one character)."""
    text = json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)
    return text.replace("\x7f", "\\u007f")


def to_toml(settings: Settings, origin: Mapping[str, str] | None = None) -> str:
    """The whole resolved page; with `origin`, each value's source stands behind it as a comment."""
    document = settings.model_dump(mode="json")
    lines: list[str] = []
    for name, value in document.items():
        if name not in SECTIONS:
            lines.append(_toml_line(name, name, value, origin))
    for section in SECTIONS:
        lines += ["", f"[{section}]"]
        lines += [
            _toml_line(f"{section}.{key}", key, value, origin) for key, value in document[section].items()
        ]
    return "\n".join(lines) + "\n"


def _toml_line(dotted: str, key: str, value: Any, origin: Mapping[str, str] | None) -> str:
    line = f"{key} = {toml_value(value)}"
    return f"{line:<44}  # {origin[dotted]}" if origin else line


def page_to_toml(page: Mapping[str, Any]) -> str:
    """A page of tables within tables, as TOML."""
    lines = [f"{key} = {toml_value(value)}" for key, value in page.items() if not isinstance(value, dict)]
    tables: dict[tuple[str, ...], list[str]] = {}
    for names, value in _leaves(page):
        if len(names) > 1:
            tables.setdefault(names[:-1], []).append(f"{names[-1]} = {toml_value(value)}")
    for names, entries in tables.items():
        lines += ["", f"[{'.'.join(names)}]", *entries]
    return "\n".join(lines) + "\n"


def load_settings(path: Path) -> Settings:
    """Reads back the `settings.toml` of a run.

    Raises:
        GkdError: the file is missing or damaged, or holds what this version does not know.
    """
    if not path.is_file():
        raise GkdError("this run has no settings.toml", str(path.parent), "name another run")
    try:
        leaves = dict(_leaves(read_page(path)))
        given = {
            ".".join(names): _Given(
                value, str(path), f"{path}, {_line_of(path, names)}key `{'.'.join(names)}`"
            )
            for names, value in leaves.items()
        }
        for key, item in given.items():
            _require_known(key, item.where, {}, "it was written by another version of gkd")
        return _validate(given)
    except GkdError as error:
        raise GkdError(
            f"the settings of this run cannot be used: {error.what}", error.where, error.hint
        ) from None
