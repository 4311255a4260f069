"""A file of any understood format to a Dataset."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from lora_engine.data.blocks import cut_blocks
from lora_engine.data.decode import decode_text, read_bytes
from lora_engine.data.parquet import read_parquet
from lora_engine.data.schema import Dataset, DroppedRow, Example, Part
from lora_engine.data.shaping import shape_row
from lora_engine.data.tables import Table, read_csv, read_json, read_jsonl
from lora_engine.data.tasks import recognise_task
from lora_engine.errors import ConfigError, DataError

FORMATS = ("txt", "md", "csv", "tsv", "json", "jsonl", "parquet")


def read_dataset(
    path: str | Path,
    *,
    task: str | None = None,
    columns: Mapping[str, str] | None = None,
    encoding: str | None = None,
) -> Dataset:
    """Read and shape a file. Row order is the file's.

    Raises DataError when it cannot be used or nothing is left of it, NotFoundError when it is not
    there, ConfigError for a task or role that does not exist. Each message is one sentence."""
    file = Path(path)
    kind = file.suffix.lower().removeprefix(".")
    if kind not in FORMATS:
        allowed = ", ".join(f".{known}" for known in FORMATS)
        raise DataError(f"{file.name} ends in {file.suffix!r}; allowed: {allowed}.")
    data = read_bytes(file)
    if kind == "parquet":
        table = read_parquet(data, file.name, lambda names: _columns_needed(names, file.name, task, columns))
        return _from_table(file, kind, None, table, task, columns, [])
    text, used, warnings = decode_text(data, file.name, encoding)
    if kind in ("txt", "md"):
        return _from_text(file, kind, used, text, task, warnings)
    if kind == "csv":
        table = read_csv(text, file.name)
    elif kind == "tsv":
        table = read_csv(text, file.name, delimiter="\t")
    else:
        table = read_json(text, file.name) if kind == "json" else read_jsonl(text, file.name)
    return _from_table(file, kind, used, table, task, columns, warnings)


def explain_all_dropped(dropped: Sequence[DroppedRow]) -> str:
    """One sentence for data of which nothing is left."""
    reasons = Counter(row.reason for row in dropped)
    total = len(dropped)
    who = "The only row was" if total == 1 else f"All {total:,} rows were"
    if len(reasons) == 1:
        return f"{who} dropped: {next(iter(reasons))}."
    listed = "; ".join(f"{reason} ({count:,})" for reason, count in reasons.most_common(3))
    more = f"; and {len(reasons) - 3} more reasons" if len(reasons) > 3 else ""
    return f"{who} dropped: {listed}{more}."


def _columns_needed(
    names: Sequence[str], file: str, task: str | None, columns: Mapping[str, str] | None
) -> Sequence[str]:
    return list(recognise_task(names, file, task=task, columns=columns)[1].values())


def _from_text(file: Path, kind: str, encoding: str, text: str, task: str | None, warnings: list[str]) -> Dataset:
    if task not in (None, "text"):
        raise ConfigError("task", task, f"text, because {file.name} is plain text")
    examples = tuple(
        Example(i, (Part("text", block, trained=True),), block=True) for i, block in enumerate(cut_blocks(text), 1)
    )
    return Dataset(str(file), kind, encoding, (), "text", {}, len(examples), examples, (), tuple(warnings))


def _from_table(
    file: Path,
    kind: str,
    encoding: str | None,
    table: Table,
    task: str | None,
    columns: Mapping[str, str] | None,
    warnings: list[str],
) -> Dataset:
    found_task, found = recognise_task(table.column_names, file.name, task=task, columns=columns)
    examples: list[Example] = []
    dropped: list[DroppedRow] = []
    for number, row in table.rows:
        shaped = shape_row(number, row, found_task, found)
        if isinstance(shaped, Example):
            examples.append(shaped)
        else:
            dropped.append(DroppedRow(number, shaped))
    if not examples:
        raise DataError(explain_all_dropped(dropped))
    return Dataset(
        str(file),
        kind,
        encoding,
        table.column_names,
        found_task,
        found,
        len(table.rows),
        tuple(examples),
        tuple(dropped),
        tuple(warnings),
    )
