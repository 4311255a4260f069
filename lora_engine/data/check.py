"""What a dataset would train on: counts, warnings and a preview, or the reason why it cannot be used."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_engine.data.classes import (
    class_names,
    class_warnings,
    count_classes,
    encode_labelled,
    label_of,
    special_tokens,
    text_of,
)
from lora_engine.data.encode import IGNORED, EncodedRows, encode_rows, num_trained
from lora_engine.data.read import explain_all_dropped, read_dataset
from lora_engine.data.render import render_example
from lora_engine.data.schema import Dataset, DroppedRow, Encoded, Example
from lora_engine.data.split import split_examples
from lora_engine.data.tokenizer import TextTokenizer
from lora_engine.errors import ConfigError, DataError

NUM_PREVIEWS = 3
FEW_EXAMPLES = 20

Segments = list[dict[str, Any]]


@dataclass(frozen=True)
class DataReport:
    """A checked dataset.

    `rows` are the file's rows (blocks of a plain text), `examples` the sequences trained on,
    `tokens` all their tokens and `trained_tokens` those with a loss. `truncated` counts rows that
    lose their end, `duplicates` rows that repeat an earlier one. `preview` holds the first examples
    as segments {"text", "trained"}.

    Of texts with labels a classifier is trained: it reads the texts' `tokens`, has one loss a row, and `classes` says
    (name, number of rows), most frequent first. There are none for other tasks."""

    format: str
    encoding: str | None
    rows: int
    columns: Mapping[str, str]
    column_names: tuple[str, ...]
    task: str
    examples: int
    tokens: int
    trained_tokens: int
    longest_tokens: int
    max_length: int
    truncated: int
    duplicates: int
    dropped: tuple[DroppedRow, ...]
    warnings: tuple[str, ...]
    preview: tuple[Segments, ...]
    classes: tuple[tuple[str, int], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "format": self.format,
            "encoding": self.encoding,
            "rows": self.rows,
            "columns": dict(self.columns),
            "column_names": list(self.column_names),
            "task": self.task,
            "examples": self.examples,
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
            "longest_tokens": self.longest_tokens,
            "max_length": self.max_length,
            "truncated": self.truncated,
            "duplicates": self.duplicates,
            "dropped": [{"row": row.row, "reason": row.reason} for row in self.dropped],
            "warnings": list(self.warnings),
            "preview": [list(segments) for segments in self.preview],
            "classes": [{"name": name, "rows": rows} for name, rows in self.classes],
        }


def check_dataset(
    path: str | Path,
    tokenizer: TextTokenizer,
    *,
    max_length: int,
    task: str | None = None,
    columns: Mapping[str, str] | None = None,
    encoding: str | None = None,
) -> DataReport:
    """Read, split and encode a file as training would, every row of it.

    Raises DataError when it cannot be read, has fewer than two usable rows, trains on nothing, or has fewer classes
    than two or more than a classifier takes."""
    dataset = read_dataset(path, task=task, columns=columns, encoding=encoding)
    return check_examples(dataset, tokenizer, max_length=max_length)


def check_examples(dataset: Dataset, tokenizer: TextTokenizer, *, max_length: int) -> DataReport:
    """`check_dataset` for a file that was read already."""
    names = class_names(dataset) if len(dataset.examples) > 1 else ()  # a single row is refused below
    encoded = (
        _encode_texts(dataset, names, tokenizer, max_length)
        if names
        else encode_rows(dataset.examples, tokenizer, max_length)
    )
    dropped = sorted([*dataset.dropped, *encoded.dropped], key=lambda row: row.row)
    if not encoded.sequences and dropped:
        raise DataError(explain_all_dropped(dropped))
    lost = {row.row for row in encoded.dropped}
    kept = [example for example in dataset.examples if example.row not in lost]
    if len(kept) < 2 and dropped:
        raise DataError(
            f"{Path(dataset.path).name} has 1 usable row of {dataset.rows:,}; at least 2 are needed "
            f"(row {dropped[0].row} was dropped: {dropped[0].reason})."
        )
    one_text = dataset.examples[0].block
    if one_text:
        _check_both_sides(dataset, kept, tokenizer, max_length)
    else:
        split_examples(kept)  # raises for a single row or only equal ones
    duplicates = 0 if one_text else _count_duplicates(kept)
    truncated = sum(sequence.truncated for sequence in encoded.sequences)
    classes = count_classes(encoded.sequences, names)
    warnings = _warnings(dataset, encoded, kept, truncated, duplicates, max_length)
    return DataReport(
        format=dataset.format,
        encoding=dataset.encoding,
        rows=dataset.rows,
        columns=dataset.columns,
        column_names=dataset.column_names,
        task=dataset.task,
        examples=len(encoded.sequences),
        tokens=sum(len(sequence.input_ids) for sequence in encoded.sequences),
        trained_tokens=len(encoded.sequences) if names else sum(map(num_trained, encoded.sequences)),
        longest_tokens=encoded.longest or max(len(sequence.input_ids) for sequence in encoded.sequences),
        max_length=max_length,
        truncated=truncated,
        duplicates=duplicates,
        dropped=tuple(dropped),
        warnings=(*dataset.warnings, *warnings, *(class_warnings(classes) if names else ())),
        preview=tuple(_preview(dataset.examples, encoded.sequences, tokenizer)),
        classes=classes,
    )


def _encode_texts(dataset: Dataset, names: Sequence[str], tokenizer: TextTokenizer, max_length: int) -> EncodedRows:
    """The texts as a classifier reads them. Raises ConfigError for a `max_length` below 3."""
    if max_length < 3:
        raise ConfigError("max_length", max_length, "a whole number of at least 3")
    sequences, longest = encode_labelled(dataset.examples, names, tokenizer, max_length)
    kept = {sequence.row for sequence in sequences}
    dropped = [DroppedRow(x.row, "text has no token") for x in dataset.examples if x.row not in kept]
    return EncodedRows(sequences, dropped, sum(x.truncated for x in sequences), longest, {}, [])


def _check_both_sides(dataset: Dataset, kept: Sequence[Example], tokenizer: TextTokenizer, max_length: int) -> None:
    """A short text may be cut in blocks of which one has too few tokens to predict anything."""
    if len(kept) > FEW_EXAMPLES:
        return
    sides = split_examples(kept) if len(kept) > 1 else ()
    if not sides or not all(encode_rows(side, tokenizer, max_length).sequences for side in sides):
        raise DataError(
            f"{Path(dataset.path).name} is too short to train on a part and evaluate with the rest; "
            "use at least a few sentences."
        )


def _warnings(
    dataset: Dataset, encoded: EncodedRows, kept: Sequence[Example], truncated: int, duplicates: int, max_length: int
) -> list[str]:
    found: list[str] = []
    if truncated:
        found.append(
            f"{_rows(truncated)} longer than max_length ({max_length} tokens) and cut at the end; "
            f"the longest has {encoded.longest:,} tokens."
        )
    elif encoded.long_rows > len(encoded.dropped):
        found.append(
            f"{_rows(encoded.long_rows)} longer than max_length ({max_length} tokens) and cut in windows; "
            "nothing is lost."
        )
    if duplicates:
        found.append(f"{_rows(duplicates)} an exact copy of an earlier row and kept.")
    total = len(dataset.dropped) + len(encoded.dropped)
    if total:
        reason, count = Counter(row.reason for row in (*dataset.dropped, *encoded.dropped)).most_common(1)[0]
        among = "" if count == total else f", most often because {count:,} times"
        found.append(f"{_rows(total)} dropped{among}: {reason}.")
    for problem, count in encoded.problems.items():
        who = "all examples use" if count == len(dataset.examples) else f"{count:,} of the examples use"
        found.append(f"{problem}; {who} the plain format (prompt, blank line, reply).")
    if len(kept) < FEW_EXAMPLES:
        what = "blocks of text" if dataset.examples[0].block else "usable rows"
        found.append(f"Only {len(kept)} {what}: the evaluation loss will be noisy.")
    return found


def _rows(count: int) -> str:
    return "1 row is" if count == 1 else f"{count:,} rows are"


def _count_duplicates(examples: Sequence[Example]) -> int:
    return len(examples) - len({example.parts for example in examples})


def _preview(examples: Sequence[Example], sequences: Sequence[Encoded], tokenizer: TextTokenizer) -> list[Segments]:
    by_row = {example.row: example for example in examples}
    shown: list[Segments] = []
    for sequence in sequences[:NUM_PREVIEWS]:
        example = by_row[sequence.row]
        if sequence.label is not None:
            shown.append(_label_segments(example, sequence, tokenizer))
        elif sequence.truncated or all(part.role == "text" for part in example.parts):
            shown.append(_segments_of_ids(sequence, tokenizer))
        else:
            shown.append([{"text": text, "trained": trained} for text, trained in render_example(example, tokenizer)])
    return shown


def _label_segments(example: Example, sequence: Encoded, tokenizer: TextTokenizer) -> Segments:
    """The text between the tokens that the tokenizer puts around it, and the class to choose."""
    before, after = (tokenizer.decode(ids) for ids in special_tokens(tokenizer))
    text = tokenizer.decode(sequence.input_ids) if sequence.truncated else before + text_of(example) + after
    return [{"text": text, "trained": False}, {"text": label_of(example), "trained": True}]


def _segments_of_ids(sequence: Encoded, tokenizer: TextTokenizer) -> Segments:
    """What is left of a cut example, read back from its tokens."""
    trained = [label != IGNORED for label in sequence.labels]
    segments: Segments = []
    start = 0
    for i in range(1, len(trained) + 1):
        if i == len(trained) or trained[i] != trained[start]:
            text = tokenizer.decode(sequence.input_ids[start:i])
            segments.append({"text": text, "trained": trained[start]})
            start = i
    return segments
