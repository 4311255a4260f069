"""Rows out of .csv, .tsv, .json, .jsonl and .parquet. Values stay as they are written."""

import csv
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from lora_engine.data.tasks import check_column_names
from lora_engine.errors import DataError

MAX_ROWS = 200_000
DELIMITERS = (",", ";", "\t", "|")
# What a file with one column is parsed with, so that commas in its text cut nothing.
_NO_DELIMITER = "\x1f"


@dataclass(frozen=True)
class Table:
    """`rows` holds (row number, cells by column name), or (row number, reason) for a malformed row."""

    column_names: tuple[str, ...]
    rows: list[tuple[int, dict[str, Any] | str]]


# ----------------------------------------------------------------------------------------------- csv


def read_csv(text: str, name: str, *, delimiter: str | None = None) -> Table:
    """A table with a header line; every cell is text, "NA" included. Raises DataError."""
    delimiter = delimiter or sniff_delimiter(text)
    rows = _csv_rows(text, name, delimiter)
    header = next(rows, None)
    if header is None:
        raise DataError(f"{name} is empty; use a file with at least 2 rows.")
    if len(header) == 1 and delimiter != _NO_DELIMITER:
        rows = _csv_rows(text, name, _NO_DELIMITER)
        header = next(rows)
    names = tuple(cell.strip() or f"column {i}" for i, cell in enumerate(header, 1))
    check_column_names(names, name)
    table: list[tuple[int, dict[str, Any] | str]] = []
    for number, row in enumerate(rows, 1):
        _check_rows(number, name)
        if len(row) == len(names):
            table.append((number, dict(zip(names, row, strict=True))))
        else:
            table.append((number, f"{_plural(len(row), 'field')} where the header has {len(names)}"))
    if not table:
        raise DataError(f"{name} has column names and no rows; add at least 2 rows.")
    return Table(names, table)


def sniff_delimiter(text: str) -> str:
    """The one of , ; tab | that cuts the first records into the most even rows of several fields."""
    sample = text[:65536]

    def evenness(delimiter: str) -> tuple[float, int]:
        records = [row for row in islice(csv.reader(io.StringIO(sample), delimiter=delimiter), 50) if row]
        if not records or len(records[0]) < 2:
            return (0.0, 0)
        same = sum(len(row) == len(records[0]) for row in records)
        return (same / len(records), len(records[0]))

    _set_field_limit()
    best = max(DELIMITERS, key=evenness)
    return best if evenness(best)[1] else _NO_DELIMITER


def _csv_rows(text: str, name: str, delimiter: str) -> Iterator[list[str]]:
    """Records without the blank ones. A quote that is never closed is an error, a stray one is text."""
    _set_field_limit()
    rows: list[list[str]] = []
    line = 1
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        for row in reader:
            line = reader.line_num + 1
            rows.append(row)
    except csv.Error as error:
        if "unexpected end" in str(error):
            raise DataError(
                f"{name} opens a quote in line {line} and never closes it; close it, or double the quotes inside text."
            ) from error
        try:
            rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))
        except csv.Error as again:
            raise DataError(f"{name} is not readable as a table near line {line}: {again}.") from again
    return (row for row in rows if any(cell.strip() for cell in row))


def _set_field_limit() -> None:
    # The csv module stops at 131,072 characters a field by default; one long story is more.
    if csv.field_size_limit() < 1 << 30:
        csv.field_size_limit(1 << 30)


# ---------------------------------------------------------------------------------------------- json


class _DuplicateKeyError(ValueError):
    pass


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _DuplicateKeyError(twice)
    return made


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_pairs)


def read_jsonl(text: str, name: str) -> Table:
    """One object a line; the row number is the line number. Raises DataError with the line."""
    rows: list[tuple[int, dict[str, Any] | str]] = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines(): U+2028 may stand inside a string
        if not line.strip():
            continue
        _check_rows(len(rows) + 1, name)
        try:
            value = _DECODER.decode(line)
        except _DuplicateKeyError as error:
            raise DataError(f"The field {str(error)!r} occurs twice in line {number} of {name}; remove one.") from error
        except json.JSONDecodeError as error:
            hint = " (one JSON list over several lines needs the ending .json)" if line.strip() in ("[", "{") else ""
            raise DataError(
                f"{name} is broken in line {number}, column {error.colno}: {error.msg}; correct that line{hint}."
            ) from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{name} is broken in line {number}: {_short(error)}; correct that line.") from error
        rows.append((number, _as_row(value)))
    return _from_objects(rows, name)


def read_json(text: str, name: str) -> Table:
    """A list of objects (or of texts), {"data": [...]}, or columns as lists or index objects."""
    try:
        value = _DECODER.decode(text)
    except _DuplicateKeyError as error:
        raise DataError(f"The field {str(error)!r} occurs twice in one object of {name}; remove one.") from error
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip()[:1] == "{":
            return read_jsonl(text, name)
        raise DataError(
            f"{name} is broken in line {error.lineno}, column {error.colno}: {error.msg}; correct that place."
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name} is not readable as JSON: {_short(error)}.") from error
    items = _items(value, name)
    _check_rows(len(items), name)
    if items and all(isinstance(item, str) for item in items):
        items = [{"text": item} for item in items]
    return _from_objects([(i, _as_row(item)) for i, item in enumerate(items, 1)], name)


def _items(value: Any, name: str) -> list[Any]:
    if isinstance(value, list):
        return value
    if isinstance(value, dict):
        lists = {key: v for key, v in value.items() if isinstance(v, list)}
        if "data" in lists and (len(value) == 1 or lists.keys() != value.keys()):
            return lists["data"]
        if len(lists) == 1 and all(isinstance(item, dict) for v in lists.values() for item in v):
            return next(iter(lists.values()))
        if value and all(isinstance(v, dict) for v in value.values()):
            lists = {key: list(v.values()) for key, v in value.items()}
        if lists and len(lists) == len(value):
            lengths = {key: len(v) for key, v in lists.items()}
            if len(set(lengths.values())) > 1:
                raise DataError(f"The columns of {name} differ in length ({lengths}); make them equally long.")
            return [dict(zip(lists, cells, strict=True)) for cells in zip(*lists.values(), strict=True)]
    raise DataError(f'{name} holds no rows; allowed: a list of objects, {{"data": [...]}} or columns as lists.')


def _as_row(value: Any) -> dict[str, Any] | str:
    if isinstance(value, dict):
        return value
    return f"not an object but {_json_type(value)}"


def _from_objects(rows: list[tuple[int, dict[str, Any] | str]], name: str) -> Table:
    names = tuple(dict.fromkeys(key for _, row in rows if isinstance(row, dict) for key in row))
    if not rows:
        raise DataError(f"{name} has no rows; add at least 2.")
    if not names:
        raise DataError(f'{name} has no row with named fields; write each row as an object such as {{"text": ...}}.')
    check_column_names(names, name)
    return Table(names, rows)


# ------------------------------------------------------------------------------------------- helpers


def _check_rows(count: int, name: str) -> None:
    if count > MAX_ROWS:
        raise DataError(f"{name} has more than {MAX_ROWS:,} rows; keep a part of them.")


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def _short(error: BaseException) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error).split("\n")[0].rstrip(".")


def _json_type(value: Any) -> str:
    names: Iterable[tuple[type, str]] = (
        (bool, "true or false"),
        (int, "a number"),
        (float, "a number"),
        (str, "a text"),
        (list, "a list"),
        (dict, "an object"),
    )
    return next((label for kind, label in names if isinstance(value, kind)), "nothing")
