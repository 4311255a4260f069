"""Twelve kinds of bad upload, each refused (or, for two, accepted with a warning) in one sentence."""

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lora_engine.data import TextTokenizer, check_dataset
from lora_engine.errors import DataError, NotFoundError


def refusal(path: Path, tokenizer: TextTokenizer, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        check_dataset(path, tokenizer, **({"max_length": 64} | options))
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    assert str(path.parent) not in message, "a person knows the file, not the folder it was put in"
    return message


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize("name", ["d.csv", "d.txt", "d.jsonl", "d.json", "d.parquet"])
@pytest.mark.parametrize("content", [b"", b" \r\n\t\n"])
def test_empty(tmp_path: Path, embedded: TextTokenizer, name: str, content: bytes) -> None:
    path = write(tmp_path, name, content)
    assert refusal(path, embedded) == f"{name} is empty; use a file with at least 2 rows."


def test_empty_but_for_its_mark(tmp_path: Path, embedded: TextTokenizer) -> None:
    assert "d.txt is empty" in refusal(write(tmp_path, "d.txt", b"\xef\xbb\xbf\n"), embedded)


def test_a_header_and_no_rows(tmp_path: Path, embedded: TextTokenizer) -> None:
    path = write(tmp_path, "d.csv", "prompt,completion\n")
    assert refusal(path, embedded) == "d.csv has column names and no rows; add at least 2 rows."
    assert refusal(write(tmp_path, "d.json", "[]"), embedded) == "d.json has no rows; add at least 2."


def test_binary(tmp_path: Path, embedded: TextTokenizer) -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("xl/workbook.xml", "<x/>")
    path = write(tmp_path, "d.csv", archive.getvalue())
    assert refusal(path, embedded) == (
        "d.csv is not text: it is a ZIP or Excel file; export the sheet as .csv and use that."
    )
    path = write(tmp_path, "e.txt", bytes(i * 7919 % 256 for i in range(1, 5000)))
    assert refusal(path, embedded) == (
        "e.txt is not text but a binary file; use .txt, .md, .csv, .tsv, .json, .jsonl or .parquet."
    )
    path = write(tmp_path, "d.xlsx", archive.getvalue())
    assert refusal(path, embedded) == (
        "d.xlsx ends in '.xlsx'; allowed: .txt, .md, .csv, .tsv, .json, .jsonl, .parquet."
    )
    path = write(tmp_path, "d.parquet", b"PAR1 and nothing more PAR1")
    assert refusal(path, embedded) == (
        "d.parquet is not a readable Parquet file; write it again, or use .csv or .jsonl."
    )


def test_wrong_encoding(tmp_path: Path, embedded: TextTokenizer) -> None:
    content = "text\nfirst\n日本語、テキスト\n"
    path = write(tmp_path, "d.csv", content.encode("shift-jis"))
    assert refusal(path, embedded) == (
        "d.csv is neither UTF-8 nor Windows-1252 (line 3); save it as UTF-8, or choose its encoding."
    )
    assert refusal(path, embedded, encoding="utf-8") == (
        "d.csv is not utf-8 (line 3); choose the encoding it was saved in, or save it as UTF-8."
    )
    assert check_dataset(path, embedded, max_length=64, encoding="shift-jis").examples == 2
    path = write(tmp_path, "e.csv", "text\ncafé\nthé\n".encode("latin-1"))
    assert "was read as Windows-1252" in check_dataset(path, embedded, max_length=64).warnings[0]


def test_one_unknown_column(tmp_path: Path, embedded: TextTokenizer) -> None:
    path = write(tmp_path, "d.csv", "Notes from Monday\nfirst\nsecond\n")
    assert refusal(path, embedded) == (
        "d.csv has one column, 'Notes from Monday', and its name alone is not understood; name them as one of: "
        "text; prompt, completion; instruction, input, output; messages; question, answer; text, label; "
        "or choose task and columns by hand."
    )
    by_hand = check_dataset(path, embedded, max_length=64, columns={"text": "Notes from Monday"})
    assert (by_hand.task, by_hand.examples) == ("text", 2)
    path = write(tmp_path, "e.csv", "text\nfirst\nsecond\n")
    assert check_dataset(path, embedded, max_length=64).examples == 2


def test_broken_json_at_line_n(tmp_path: Path, embedded: TextTokenizer) -> None:
    good = json.dumps({"prompt": "p", "completion": "c"})
    path = write(tmp_path, "d.jsonl", f'{good}\n\n{good}\n{{"prompt": "p", "completion": }}\n{good}\n')
    assert refusal(path, embedded) == "d.jsonl is broken in line 4, column 31: Expecting value; correct that line."
    path = write(tmp_path, "d.json", f"[\n{good},\n{good}\n{good}]")
    assert refusal(path, embedded) == (
        "d.json is broken in line 4, column 1: Expecting ',' delimiter; correct that place."
    )
    path = write(tmp_path, "e.jsonl", f"[\n{good}\n]")
    assert "d.jsonl" not in refusal(path, embedded)
    assert "one JSON list over several lines needs the ending .json" in refusal(path, embedded)
    path = write(tmp_path, "f.json", "[" * 100_000)
    assert refusal(path, embedded).startswith("f.json")
    path = write(tmp_path, "g.json", '"just a text"')
    assert refusal(path, embedded) == (
        'g.json holds no rows; allowed: a list of objects, {"data": [...]} or columns as lists.'
    )


def test_only_empty_completions(tmp_path: Path, embedded: TextTokenizer) -> None:
    path = write(tmp_path, "d.csv", "prompt,completion\n" + "".join(f"p{i},  \n" for i in range(12)))
    assert refusal(path, embedded) == "All 12 rows were dropped: completion is empty."
    path = write(tmp_path, "e.csv", "prompt,completion\na,\nb,\n,c\n")
    assert refusal(path, embedded) == "All 3 rows were dropped: completion is empty (2); prompt is empty (1)."


def test_thirty_megabytes(tmp_path: Path, embedded: TextTokenizer) -> None:
    path = tmp_path / "d.csv"
    with path.open("wb") as file:
        file.truncate(30_000_000)
    assert refusal(path, embedded) == "d.csv has 30.0 MB; at most 20 MB are read: keep a part of its rows."


@pytest.mark.parametrize("shape", ["rows", "one cell", "nested", "large cells"])
def test_parquet_that_unpacks_to_200_mb(tmp_path: Path, embedded: TextTokenizer, shape: str) -> None:
    path = tmp_path / "d.parquet"
    if shape == "rows":
        table = pa.table({"text": pa.array(["a" * 2000] * 100_000)})
    elif shape == "one cell":
        table = pa.table({"text": pa.array(["a" * 200_000_000, "b"])})
    elif shape == "large cells":
        table = pa.table({"text": pa.array(["a" * 1_000_000] * 200, pa.large_string())})
    else:
        turns = [{"role": "user", "content": "a" * 2000}, {"role": "assistant", "content": "b" * 2000}]
        table = pa.table({"messages": pa.array([turns] * 50_000)})
    pq.write_table(table, path, compression="zstd")
    assert path.stat().st_size < 100_000
    message = refusal(path, embedded)
    assert message.startswith("d.parquet unpacks to more than 64 MB (")
    assert message.endswith("); keep a part of its rows.")


def test_too_many_rows(tmp_path: Path, embedded: TextTokenizer) -> None:
    path = tmp_path / "d.parquet"
    pq.write_table(pa.table({"text": pa.array(["a"] * 200_001)}), path)
    assert refusal(path, embedded) == "d.parquet has 200,001 rows; at most 200,000 are read: keep a part of them."
    path = write(tmp_path, "d.csv", "text,label\n" + "a,b\n" * 200_001)
    assert refusal(path, embedded) == "d.csv has more than 200,000 rows; keep a part of them."


def test_duplicate_columns(tmp_path: Path, embedded: TextTokenizer) -> None:
    path = write(tmp_path, "d.csv", "prompt,completion, prompt\na,b,c\nd,e,f\n")
    assert refusal(path, embedded) == (
        "d.csv has the column 'prompt' twice (columns 1 and 3); rename or remove one of them."
    )
    path = write(tmp_path, "e.csv", "Text,label,text\na,b,c\nd,e,f\n")
    assert refusal(path, embedded) == (
        "e.csv has the column 'Text' and 'text', which count as one name (columns 1 and 3); "
        "rename or remove one of them."
    )
    path = write(tmp_path, "d.jsonl", '{"text": "a"}\n{"text": "b", "text": "c"}\n')
    assert refusal(path, embedded) == "The field 'text' occurs twice in line 2 of d.jsonl; remove one."
    table = pa.Table.from_arrays([pa.array(["a", "b"])] * 2, names=["text", "text"])
    pq.write_table(table, tmp_path / "d.parquet")
    assert "d.parquet has the column 'text' twice (columns 1 and 2)" in refusal(tmp_path / "d.parquet", embedded)


def test_nul_bytes(tmp_path: Path, embedded: TextTokenizer) -> None:
    path = write(tmp_path, "d.csv", b"text,label\nfirst,a\nsec\0ond,b\0\n")
    assert refusal(path, embedded) == (
        "d.csv has 2 NUL bytes, the first in line 3; remove them or export the file again as UTF-8."
    )
    path = write(tmp_path, "e.csv", "text\nfirst\nsecond\n".encode("utf-16-le"))
    assert refusal(path, embedded) == (
        "e.csv looks like UTF-16 without its mark; choose the encoding utf-16-le, or save as UTF-8."
    )
    assert check_dataset(path, embedded, max_length=64, encoding="utf-16-le").examples == 2


def test_one_row(tmp_path: Path, embedded: TextTokenizer) -> None:
    path = write(tmp_path, "d.csv", "prompt,completion\na,b\n")
    assert refusal(path, embedded) == (
        "The data has 1 usable row; at least 2 are needed, one to train on and one to evaluate with."
    )
    path = write(tmp_path, "e.csv", "prompt,completion\na,b\nc,\n")
    assert refusal(path, embedded) == (
        "e.csv has 1 usable row of 2; at least 2 are needed (row 2 was dropped: completion is empty)."
    )
    path = write(tmp_path, "f.csv", "prompt,completion\na,b\na,b\na,b\n")
    assert refusal(path, embedded) == "All 3 rows are the same; at least 2 different ones are needed."
    for content in ("a", "word", "too short"):
        assert refusal(write(tmp_path, "g.txt", content), embedded) == (
            "g.txt is too short to train on a part and evaluate with the rest; use at least a few sentences."
        )
    path = write(tmp_path, "h.txt", "A single line of text is enough, because it is cut in blocks.")
    report = check_dataset(path, embedded, max_length=64)
    assert report.rows >= 2
    assert "the evaluation loss will be noisy" in report.warnings[-1]


def test_rows_longer_than_the_context(tmp_path: Path, embedded: TextTokenizer) -> None:
    rows = [("short", "fine"), ("short", "word " * 300), ("word " * 300, "never seen"), ("other", "fine")]
    body = "".join(f"{prompt},{completion}\n" for prompt, completion in rows)
    report = check_dataset(write(tmp_path, "d.csv", "prompt,completion\n" + body), embedded, max_length=64)
    reason = "the prompt alone fills max_length (64 tokens), so nothing of the reply is left"
    assert (report.examples, report.truncated) == (3, 1)
    assert [(row.row, row.reason) for row in report.dropped] == [(3, reason)]
    assert report.warnings[0].startswith(
        "1 row is longer than max_length (64 tokens) and cut at the end; the longest has"
    )
    assert f"1 row is dropped: {reason}." in report.warnings

    body = "".join(f"{'word ' * 300}{i},reply\n" for i in range(5))
    path = write(tmp_path, "e.csv", "prompt,completion\n" + body)
    assert refusal(path, embedded) == f"All 5 rows were dropped: {reason}."


def test_a_missing_file_or_a_folder(tmp_path: Path, embedded: TextTokenizer) -> None:
    with pytest.raises(NotFoundError, match="there is no such file"):
        check_dataset(tmp_path / "none.csv", embedded, max_length=64)
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(DataError, match="allowed: a file, not a folder"):
        check_dataset(tmp_path / "folder.csv", embedded, max_length=64)
