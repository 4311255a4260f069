"""Texts with labels, checked as a classifier is trained on them."""

from pathlib import Path

import pytest
from data_tokenizers import MakeTokenizer

from lora_engine.data import (
    TextTokenizer,
    check_dataset,
    class_names,
    classes_text,
    encode_classes,
    encode_text,
    read_dataset,
)
from lora_engine.errors import ConfigError, DataError

LONG = "good " * 60


def write(folder: Path, rows: list[tuple[str, str]]) -> Path:
    path = folder / "d.csv"
    path.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    return path


def two_classes(good: int, bad: int) -> list[tuple[str, str]]:
    return [(f"film {i} is fine", "good") for i in range(good)] + [(f"film {i} is poor", "bad") for i in range(bad)]


def test_the_report_says_what_the_classifier_sees(tmp_path: Path, embedded: TextTokenizer) -> None:
    path = write(tmp_path, [*two_classes(20, 25), (LONG, "good"), ("film 3 is fine", "good")])
    report = check_dataset(path, embedded, max_length=32).to_dict()
    dataset = read_dataset(path)
    encoded = encode_classes(dataset.examples, class_names(dataset), embedded, 32)
    assert report["task"] == "text_label"
    assert report["classes"] == [{"name": "bad", "rows": 25}, {"name": "good", "rows": 22}]
    assert report["examples"] == report["trained_tokens"] == len(encoded) == 47
    assert report["tokens"] == sum(len(row.input_ids) for row in encoded)
    assert report["longest_tokens"] == len(encode_text(LONG.strip(), embedded, 10_000)[0]) > 32
    assert (report["truncated"], report["duplicates"]) == (1, 1)
    assert "1 row is longer than max_length (32 tokens) and cut at the end; the longest has" in report["warnings"][0]
    assert report["preview"][0] == [
        {"text": "film 0 is fine", "trained": False},
        {"text": "good", "trained": True},
    ]
    assert classes_text([(row["name"], row["rows"]) for row in report["classes"]]) == "2 classes: bad 25, good 22"


def test_the_preview_holds_the_tokens_around_a_text_and_its_cut(tmp_path: Path, make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(bos=True)
    report = check_dataset(write(tmp_path, [(LONG, "bad"), *two_classes(3, 3)]), tokenizer, max_length=16)
    cut, _ = encode_text(LONG.strip(), tokenizer, 16)
    assert report.preview[0][0]["text"] == tokenizer.decode(cut)
    assert report.preview[1][0]["text"] == "<s>film 0 is fine"
    assert report.longest_tokens == len(tokenizer.encode_literal(LONG.strip())) + 1


def test_other_tasks_have_no_classes(tmp_path: Path, embedded: TextTokenizer) -> None:
    path = tmp_path / "d.csv"
    path.write_text("prompt,completion\n" + "".join(f"prompt {i},reply {i}\n" for i in range(20)))
    assert check_dataset(path, embedded, max_length=32).to_dict()["classes"] == []


@pytest.mark.parametrize(
    ("good", "bad", "warnings"),
    [
        (20, 20, []),
        (29, 10, []),
        (
            30,
            10,
            [
                "The classes are uneven: always answering 'good' would be right for 75.0 % of the rows, "
                "so compare accuracy with that, or look at macro-F1."
            ],
        ),
        (20, 9, ["The class 'bad' has only 9 rows: too few to learn it well or to judge how well it was learned."]),
    ],
)
def test_few_rows_and_uneven_classes_are_said(
    tmp_path: Path, embedded: TextTokenizer, good: int, bad: int, warnings: list[str]
) -> None:
    assert list(check_dataset(write(tmp_path, two_classes(good, bad)), embedded, max_length=32).warnings) == warnings


def test_many_classes_are_listed_in_part(tmp_path: Path, embedded: TextTokenizer) -> None:
    rows = [(f"text {i} of {label}", f"kind {label:02}") for label in range(12) for i in range(1 + label)]
    report = check_dataset(write(tmp_path, rows), embedded, max_length=32)
    assert report.classes[0] == ("kind 11", 12)
    assert classes_text(report.classes).endswith("kind 05 6, kind 04 5 and 4 more")
    (few,) = [warning for warning in report.warnings if "classes have" in warning]
    assert few.startswith("9 classes have fewer than 10 rows (kind 00 1, kind 01 2, ")
    assert few.endswith(" and 1 more): too few to learn it well or to judge how well it was learned.")


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([("a", "good"), ("b", "good")], "The column 'label' says 'good' in every row; a classifier needs at least 2"),
        ([(f"text {i}", f"label {i}") for i in range(1001)], "has 1,001 different labels; allowed: at most 1,000."),
        ([("a", "good"), ("b", "")], "has 1 usable row of 2; at least 2 are needed"),
    ],
)
def test_what_no_classifier_can_learn(
    tmp_path: Path, embedded: TextTokenizer, rows: list[tuple[str, str]], says: str
) -> None:
    with pytest.raises(DataError) as caught:
        check_dataset(write(tmp_path, rows), embedded, max_length=32)
    assert says in str(caught.value)


def test_a_context_of_two_tokens_is_none(tmp_path: Path, embedded: TextTokenizer) -> None:
    with pytest.raises(ConfigError, match="max_length is 2; allowed: a whole number of at least 3"):
        check_dataset(write(tmp_path, two_classes(2, 2)), embedded, max_length=2)


def test_texts_encoded_together_are_those_encoded_alone(tmp_path: Path, embedded: TextTokenizer) -> None:
    texts = ["<|user|> said hello", "<|endoftext|>", "plain", LONG]
    path = write(tmp_path, [(text, "ab"[i % 2]) for i, text in enumerate(texts)])
    rows = encode_classes(read_dataset(path).examples, ("a", "b"), embedded, 40)
    assert [(row.input_ids, row.truncated) for row in rows] == [
        encode_text(text.strip(), embedded, 40) for text in texts
    ]
