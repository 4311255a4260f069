"""The report on a whole file: exact counts, a preview that is what is trained, and how long it takes."""

import json
import random
import time
from pathlib import Path

import pytest

from lora_engine.data import (
    EXAMPLES,
    IGNORED,
    ExampleDataset,
    TextTokenizer,
    check_dataset,
    encode_examples,
    read_dataset,
)

CLI_KEYS = {"format", "rows", "columns", "task", "examples", "tokens", "dropped", "warnings", "preview"}


def test_counts_are_those_of_the_encoded_rows(tmp_path: Path, embedded: TextTokenizer) -> None:
    rows = [("Hello", "Good day"), ("Hello", "Good day"), ("Bye", ""), ("Bye", "word " * 60), ("Night", "Sleep well")]
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": p, "completion": c}) for p, c in rows))
    report = check_dataset(path, embedded, max_length=32).to_dict()
    assert CLI_KEYS | {"truncated", "duplicates", "trained_tokens"} <= report.keys()
    assert json.loads(json.dumps(report)) == report
    encoded = encode_examples(read_dataset(path).examples, embedded, 32)
    assert report["rows"] == 5
    assert report["examples"] == len(encoded) == 4
    assert report["tokens"] == sum(len(e.input_ids) for e in encoded)
    assert report["trained_tokens"] == sum(label != IGNORED for e in encoded for label in e.labels[1:])
    assert report["dropped"] == [{"row": 3, "reason": "completion is empty"}]
    assert (report["truncated"], report["duplicates"]) == (1, 1)
    assert "1 row is an exact copy of an earlier row and kept." in report["warnings"]
    assert report["preview"][0] == [
        {"text": "<|user|>Hello<|assistant|>", "trained": False},
        {"text": "Good day<|endoftext|>", "trained": True},
    ]
    cut = "".join(segment["text"] for segment in report["preview"][2])
    assert cut == embedded.decode(encoded[2].input_ids)


def test_text_rows_longer_than_the_context_lose_nothing(tmp_path: Path, embedded: TextTokenizer) -> None:
    path = tmp_path / "d.csv"
    path.write_text("text\n" + "word " * 100 + "\nshort\n")
    report = check_dataset(path, embedded, max_length=32)
    assert report.truncated == 0
    assert "1 row is longer than max_length (32 tokens) and cut in windows; nothing is lost." in report.warnings


@pytest.mark.parametrize("kind", ["csv", "txt"])
def test_a_megabyte_is_checked_in_two_seconds(tmp_path: Path, embedded: TextTokenizer, kind: str) -> None:
    rng = random.Random(0)
    words = [*read_dataset(EXAMPLES[1].path).examples[0].parts[0].text.split(), "Zanzibar", "quixotic", "1907"]
    lines = [" ".join(rng.choices(words, k=22)) for _ in range(10_000)]
    path = tmp_path / f"d.{kind}"
    if kind == "csv":
        path.write_text(
            "text,label\n" + "".join(f'"{line}",{rng.choice(["good", "bad"])}\n' for line in lines).replace('""', "")
        )
    else:
        path.write_text("\n\n".join(line.replace('"', "") for line in lines))
    assert path.stat().st_size > 1_000_000
    best = float("inf")
    for _ in range(3):
        wall, busy = time.perf_counter(), time.process_time()
        report = check_dataset(path, embedded, max_length=128)
        # Processor time of all threads stands in where other work on the machine slows the wall clock.
        best = min(best, time.perf_counter() - wall, time.process_time() - busy)
    assert report.tokens > 150_000
    assert best < 2.0


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_bundled_examples_are_clean(embedded: TextTokenizer, example: ExampleDataset) -> None:
    report = check_dataset(example.path, embedded, max_length=256)
    assert report.encoding == "utf-8"
    assert (report.dropped, report.duplicates, report.truncated, report.warnings) == ((), 0, 0, ())
    assert example.title
    assert example.description.endswith(".")
    assert example.description.count(".") == 1


def test_bundled_support_replies_are_many_and_varied() -> None:
    examples = read_dataset(EXAMPLES[0].path).examples
    assert len(examples) >= 200
    prompts, replies = zip(*((e.parts[0].text, e.parts[1].text) for e in examples), strict=True)
    assert len(set(prompts)) == len(prompts)
    assert all(15 <= len(reply.split()) <= 45 for reply in replies)
    for column in (prompts, replies):
        grams = [{tuple(text.split()[i : i + 3]) for i in range(len(text.split()) - 2)} for text in column]
        pairs = ((a, b) for i, a in enumerate(grams) for b in grams[:i] if a and b)
        assert max(len(a & b) / min(len(a), len(b)) for a, b in pairs) < 0.5, "two rows read as copies"


def test_bundled_stories_and_records_have_their_size() -> None:
    assert 25_000 <= EXAMPLES[1].path.stat().st_size <= 40_000
    records = read_dataset(EXAMPLES[2].path)
    assert len(records.examples) >= 250
    assert len({example.prompt for example in records.examples}) == len(records.examples)
    assert len({example.parts[1].text for example in records.examples}) == len(records.examples)
