"""Results as tables on stdout, for people; pipelines use --json."""

from __future__ import annotations

import re
import sys
from typing import Any

from gkdcli.cli import emit_json
from gkdcli.console import first_rank
from gkdcli.files import human_bytes
from gkdcli.resolve import Resolved, to_toml

_LONG = 500  # rows of a table
_CONTROL = r"[\x00-\x1f\x7f]"  # a video's name cannot break the layout, or colour the terminal


def render_config(command: str, resolved: Resolved, as_json: bool) -> None:
    """`--show-config`: the resolved page with the origin of each value."""
    if not first_rank():
        return
    if as_json:
        emit_json(
            command, result={"settings": resolved.settings.model_dump(mode="json"), "origin": resolved.origin}
        )
    else:
        sys.stdout.write(to_toml(resolved.settings, resolved.origin))


def render_result(command: str, payload: dict[str, Any]) -> None:
    """Prints a payload: scalars in two columns, lists of rows as tables, tuples of lines below a title."""
    if not first_rank():
        return
    scalars = {key: value for key, value in payload.items() if not isinstance(value, (dict, list, tuple))}
    tables = {key: value for key, value in payload.items() if _is_rows(value)}
    nested = {key: value for key, value in payload.items() if isinstance(value, dict) and _is_flat(value)}
    _two_columns(scalars)
    for key, value in nested.items():
        if value:
            _heading(key)
            _two_columns(_readable(value) if key == "forecast" else value)
    for key, rows in tables.items():
        _heading(key)
        _table(rows)
    for key, lines in payload.items():
        if _is_lines(lines):
            sys.stdout.write(f"\n{key}\n")
            sys.stdout.writelines(f"  {re.sub(_CONTROL, ' ', line)}\n" for line in lines)


def _is_lines(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(line, str) for line in value)


def _readable(values: dict[str, Any]) -> dict[str, Any]:
    """Bytes and seconds in units for people; the values are estimates anyway."""
    found = dict(values)
    for key, value in values.items():
        if "bytes" in key:
            found[key] = human_bytes(value)
        elif "seconds" in key:
            found[key] = _duration(value)
    return found


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02} min"


def _is_flat(value: dict[str, Any]) -> bool:
    return all(not isinstance(item, (dict, list)) or _is_short_list(item) for item in value.values())


def _is_short_list(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= 4
        and all(not isinstance(item, (dict, list)) for item in value)
    )


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _heading(key: str) -> None:
    sys.stdout.write(f"\n{key.replace('_', ' ')}\n")


def _two_columns(values: dict[str, Any]) -> None:
    width = max((len(key) for key in values), default=0)
    for key, value in values.items():
        sys.stdout.write(f"{key.replace('_', ' '):<{width}}  {_text(value)}\n")


def _table(rows: list[dict[str, Any]]) -> None:
    if len(rows) > _LONG:
        _long_table(rows)
        return
    from rich.console import Console
    from rich.table import Table

    rows = [_spread(row) for row in rows]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for key in rows[0]:
        number = isinstance(rows[0][key], (int, float)) and not isinstance(rows[0][key], bool)
        table.add_column(key.replace("_", " "), justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_text(row.get(key)) for key in rows[0]))
    # a pipe has no width: nothing is cut there
    width = None if sys.stdout.isatty() else 200
    Console(file=sys.stdout, markup=False, highlight=False, width=width).print(table)


def _spread(row: dict[str, Any]) -> dict[str, Any]:
    """A row with the values of the dictionaries in it as columns of their own."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        flat |= value if isinstance(value, dict) else {key: value}
    return flat


def _long_table(rows: list[dict[str, Any]]) -> None:
    """Plain lines: rich takes seconds for ten thousand of them."""
    cells = [[key.replace("_", " ") for key in rows[0]]]
    cells += [[_text(row.get(key)) for key in rows[0]] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        text = "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        sys.stdout.write(text.rstrip() + "\n")


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(_text(item) for item in value) or "-"
    return str(value)
