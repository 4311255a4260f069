"""Formats, encodings, tasks and columns."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lora_engine.data import DroppedRow, Part, read_dataset
from lora_engine.errors import ConfigError, DataError, InputError

PAIRS = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(3)]


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def texts(path: Path, **options: Any) -> list[tuple[str, ...]]:
    return [tuple(part.text for part in example.parts) for example in read_dataset(path, **options).examples]


def as_parquet(folder: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(PAIRS), folder / "d.parquet")
    return folder / "d.parquet"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("d.csv", "prompt,completion\np0,c0\np1,c1\np2,c2\n"),
        ("d.csv", "completion;prompt;id\nc0;p0;1\nc1;p1;2\nc2;p2;3\n"),
        ("d.csv", "prompt|completion\r\np0|c0\r\np1|c1\r\n\r\np2|c2\r\n"),
        ("d.csv", "prompt\tcompletion\np0\tc0\np1\tc1\np2\tc2"),
        ("d.tsv", "prompt\tcompletion\np0\tc0\np1\tc1\np2\tc2"),
        ("d.jsonl", "\n".join(map(json.dumps, PAIRS)) + "\n\n"),
        ("d.json", json.dumps(PAIRS)),
        ("d.json", json.dumps({"version": 1, "data": PAIRS})),
        ("d.json", json.dumps({"rows": PAIRS})),
        ("d.json", json.dumps({key: [row[key] for row in PAIRS] for key in PAIRS[0]})),
        ("d.json", json.dumps({key: {str(i): row[key] for i, row in enumerate(PAIRS)} for key in PAIRS[0]})),
        ("d.json", "\n".join(map(json.dumps, PAIRS))),
        ("D.JSONL", "\n".join(map(json.dumps, PAIRS))),
    ],
)
def test_every_format_gives_the_same_examples(tmp_path: Path, name: str, content: str) -> None:
    dataset = read_dataset(write(tmp_path, name, content))
    assert dataset.task == "prompt_completion"
    assert dataset.columns == {"prompt": "prompt", "completion": "completion"}
    assert dataset.rows == 3
    assert [example.row for example in dataset.examples] == [1, 2, 3]
    for i, example in enumerate(dataset.examples):
        assert example.parts == (Part("user", f"p{i}", False), Part("assistant", f"c{i}", True))


def test_parquet(tmp_path: Path) -> None:
    dataset = read_dataset(as_parquet(tmp_path))
    assert dataset.encoding is None
    assert [example.parts[1].text for example in dataset.examples] == ["c0", "c1", "c2"]


def test_parquet_with_messages(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}]} for i in (0, 1)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    assert texts(tmp_path / "d.parquet") == [("q0", "a0"), ("q1", "a1")]


def test_cells_are_text_as_written(tmp_path: Path) -> None:
    path = write(tmp_path, "d.csv", 'text,label\nNA,007\nnull,1.50\n"a, ""b""\nc",nan\n')
    assert texts(path) == [("NA", "007"), ("null", "1.50"), ('a, "b"\nc', "nan")]


def test_numbers_and_booleans_become_text_and_null_is_empty(tmp_path: Path) -> None:
    path = write(tmp_path, "d.json", '[{"text": 1.5, "label": true}, {"text": "a", "label": null}]')
    dataset = read_dataset(path)
    assert [part.text for part in dataset.examples[0].parts] == ["1.5", "true"]
    assert dataset.dropped == (DroppedRow(2, "label is empty"),)


def test_one_text_column_keeps_its_commas(tmp_path: Path) -> None:
    path = write(tmp_path, "d.csv", 'text\nOne, two, three.\n"Four, five."\nSix\n')
    assert texts(path) == [("One, two, three.",), ("Four, five.",), ("Six",)]


def test_long_fields_are_read(tmp_path: Path) -> None:
    path = write(tmp_path, "d.csv", f"text,label\n{'a' * 200_000},x\nb,y\n")
    assert len(texts(path)[0][0]) == 200_000


def test_json_list_of_texts(tmp_path: Path) -> None:
    assert texts(write(tmp_path, "d.json", '["one", "two"]')) == [("one",), ("two",)]


# ------------------------------------------------------------------------------------------ encoding


@pytest.mark.parametrize("codec", ["utf-8", "utf-8-sig", "utf-16"])
def test_marked_and_utf8_files_need_no_warning(tmp_path: Path, codec: str) -> None:
    dataset = read_dataset(write(tmp_path, "d.csv", "text\ncafé\nüber\n".encode(codec)))
    assert dataset.encoding == codec
    assert dataset.warnings == ()
    assert dataset.columns == {"text": "text"}
    assert dataset.examples[0].parts[0].text == "café"


def test_cp1252_is_used_with_a_warning(tmp_path: Path) -> None:
    dataset = read_dataset(write(tmp_path, "d.csv", "text\nplain\n“café”\n".encode("cp1252")))
    assert dataset.encoding == "cp1252"
    assert dataset.examples[1].parts[0].text == "“café”"
    assert dataset.warnings == (
        "d.csv is not UTF-8 (line 3) and was read as Windows-1252 (cp1252); "
        "if letters look wrong in the preview, choose another encoding.",
    )


def test_encoding_by_hand(tmp_path: Path) -> None:
    path = write(tmp_path, "d.csv", "text\nпривет\nмир\n".encode("koi8-r"))
    assert texts(path, encoding="koi8-r") == [("привет",), ("мир",)]


@pytest.mark.parametrize("encoding", ["klingon", "hex"])
def test_unknown_encoding(tmp_path: Path, encoding: str) -> None:
    with pytest.raises(DataError, match=f"encoding is '{encoding}'; allowed: a text encoding such as utf-8 or cp1252."):
        read_dataset(write(tmp_path, "d.csv", "text\na\nb\n"), encoding=encoding)


# --------------------------------------------------------------------------------- tasks and columns


@pytest.mark.parametrize(
    ("header", "task", "columns"),
    [
        ("text", "text", {"text": "text"}),
        ("ID,Text", "text", {"text": "Text"}),
        ("Prompt,Completion", "prompt_completion", {"prompt": "Prompt", "completion": "Completion"}),
        ("input,output", "prompt_completion", {"prompt": "input", "completion": "output"}),
        ("query,response,id", "prompt_completion", {"prompt": "query", "completion": "response"}),
        ("output,instruction", "instruction", {"instruction": "instruction", "output": "output"}),
        (
            "instruction,context,response",
            "instruction",
            {"instruction": "instruction", "input": "context", "output": "response"},
        ),
        ("Question, Answer ", "question_answer", {"question": "Question", "answer": "Answer"}),
        (
            "context,question,answer",
            "question_answer",
            {"question": "question", "answer": "answer", "context": "context"},
        ),
        ("sentence,sentiment", "text_label", {"text": "sentence", "label": "sentiment"}),
        ("label,text", "text_label", {"text": "text", "label": "label"}),
    ],
)
def test_tasks_are_recognised_by_column_names(tmp_path: Path, header: str, task: str, columns: dict[str, str]) -> None:
    width = header.count(",") + 1
    rows = "\n".join(",".join(f"v{i}{j}" for j in range(width)) for i in range(3))
    dataset = read_dataset(write(tmp_path, "d.csv", f"{header}\n{rows}\n"))
    assert dataset.task == task
    assert dataset.columns == columns


def test_task_and_columns_by_hand(tmp_path: Path) -> None:
    path = write(tmp_path, "d.csv", "prompt,completion,other\np,c,o\nq,d,r\n")
    assert texts(path, columns={"completion": "other"}) == [("p", "o"), ("q", "r")]
    assert texts(path, task="text", columns={"text": "other"}) == [("o",), ("r",)]
    assert texts(path, task="text_label", columns={"text": "prompt", "label": "other"}) == [("p", "o"), ("q", "r")]
    assert read_dataset(path, columns={"text": "prompt", "label": "other"}).task == "text_label"


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"task": "poetry"}, ConfigError, "task is 'poetry'; allowed: one of text, prompt_completion"),
        ({"columns": {"verse": "prompt"}}, ConfigError, "columns is 'verse'; allowed: the roles answer, completion"),
        ({"columns": {"prompt": "pompt"}}, DataError, "columns says prompt='pompt', and d.csv has 'prompt', 'reply'."),
        (
            {"columns": {"prompt": "reply", "completion": "reply"}},
            DataError,
            "allowed: a different column for each role",
        ),
        (
            {"task": "question_answer"},
            DataError,
            "The task question_answer needs a column for question and answer, and d.csv has 'prompt', 'reply'",
        ),
    ],
)
def test_wrong_task_or_columns(tmp_path: Path, options: dict[str, Any], kind: type[InputError], message: str) -> None:
    path = write(tmp_path, "d.csv", "prompt,reply\np,r\nq,s\n")
    with pytest.raises(kind) as caught:
        read_dataset(path, **options)
    assert message in str(caught.value)


def test_instruction_with_input_and_context_with_question(tmp_path: Path) -> None:
    rows = [{"instruction": "Do", "input": "this", "output": "Done"}, {"instruction": "Do", "input": "", "output": "x"}]
    assert texts(write(tmp_path, "a.json", json.dumps(rows))) == [("Do\n\nthis", "Done"), ("Do", "x")]
    rows = [{"question": "Who?", "answer": "I", "context": "We met."}]
    assert texts(write(tmp_path, "b.json", json.dumps(rows))) == [("We met.\n\nWho?", "I")]


def test_messages_openai_sharegpt_and_json_in_csv(tmp_path: Path) -> None:
    openai = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": [{"type": "text", "text": "Hello"}]},
        {"role": "user", "content": "never answered"},
    ]
    sharegpt = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    expected = (Part("system", "Be kind.", False), Part("user", "Hi", False), Part("assistant", "Hello", True))
    path = write(tmp_path, "a.jsonl", json.dumps({"messages": openai}))
    assert read_dataset(path).examples[0].parts == expected
    path = write(tmp_path, "b.jsonl", json.dumps({"conversations": sharegpt}))
    assert read_dataset(path).examples[0].parts == expected[1:]
    quoted = json.dumps(sharegpt).replace('"', '""')
    path = write(tmp_path, "c.csv", f'id,messages\n1,"{quoted}"\n')
    assert read_dataset(path).examples[0].parts == expected[1:]


# -------------------------------------------------------------------------------------- dropped rows


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "p", "completion": " \n"}, "completion is empty"),
        ({"prompt": None, "completion": "c"}, "prompt is empty"),
        ({"completion": "c"}, "prompt is empty"),
        ({"prompt": ["p"], "completion": "c"}, "prompt is a list, not text"),
        ({"prompt": "p", "completion": "c\0"}, "completion has a NUL character"),
        ({"prompt": "p", "completion": "\ud800"}, "completion has half of a character (a lone surrogate)"),
        (["p", "c"], "not an object but a list"),
        (3, "not an object but a number"),
    ],
)
def test_rows_are_dropped_with_line_and_reason(tmp_path: Path, row: object, reason: str) -> None:
    good = json.dumps({"prompt": "p", "completion": "c"})
    dataset = read_dataset(write(tmp_path, "d.jsonl", f"{good}\n\n{json.dumps(row)}\n{good}\n"))
    assert dataset.dropped == (DroppedRow(3, reason),)
    assert [example.row for example in dataset.examples] == [1, 4]
    assert dataset.rows == 3


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "messages is empty"),
        ("hello", "messages is not a list of messages"),
        ([{"role": "user", "content": "a"}], "messages has no assistant message"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}], "message 2 (assistant) is empty"),
        ([{"role": "tool", "content": "a"}], "message 1 has the role 'tool'; allowed: system, user, assistant"),
        ([{"role": "user", "content": [{"type": "image"}]}], "message 1 has a part that is not text"),
        (["a"], "message 1 is not an object"),
        ([{"role": "user", "content": 3}], "message 1 is a number, not text"),
    ],
)
def test_messages_are_dropped_with_reason(tmp_path: Path, messages: object, reason: str) -> None:
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    dataset = read_dataset(write(tmp_path, "d.json", json.dumps([good, {"messages": messages}])))
    assert dataset.dropped == (DroppedRow(2, reason),)


def test_csv_rows_with_too_few_or_too_many_fields(tmp_path: Path) -> None:
    dataset = read_dataset(write(tmp_path, "d.csv", "prompt,completion\na,b\nc\nd,e,f\ng,h\n"))
    assert dataset.dropped == (
        DroppedRow(2, "1 field where the header has 2"),
        DroppedRow(3, "3 fields where the header has 2"),
    )


def test_stray_quotes_are_text_and_open_quotes_are_an_error(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", 'prompt,completion\n"he" said,b\nc,5" nails\n')
    assert texts(path) == [("he said", "b"), ("c", '5" nails')]
    path = write(tmp_path, "b.csv", 'prompt,completion\na,b\nc,"d\ne,f\n')
    with pytest.raises(DataError, match="b.csv opens a quote in line 3 and never closes it"):
        read_dataset(path)
