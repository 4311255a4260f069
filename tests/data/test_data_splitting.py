"""Blocks of one text, and the two sides of a split."""

import subprocess
import sys
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_engine.data import Example, Part, split_examples
from lora_engine.data.blocks import MAX_BLOCK_CHARACTERS, cut_blocks
from lora_engine.errors import ConfigError, DataError


def pairs(prompts: Sequence[str]) -> list[Example]:
    return [
        Example(i, (Part("user", prompt, False), Part("assistant", f"reply {i}", True)))
        for i, prompt in enumerate(prompts, 1)
    ]


@given(
    st.lists(st.sampled_from("abcdefghij"), min_size=2, max_size=60),
    st.floats(0.01, 0.9),
    st.integers(0, 1000),
)
def test_both_sides_hold_something_and_share_no_prompt(prompts: list[str], share: float, seed: int) -> None:
    examples = pairs(prompts)
    train, evaluation = split_examples(examples, share, seed)
    assert train
    assert evaluation
    assert sorted([*train, *evaluation], key=lambda example: example.row) == examples
    assert [example.row for example in train] == sorted(example.row for example in train)
    if len(set(prompts)) > 1:
        assert {example.prompt for example in train}.isdisjoint(example.prompt for example in evaluation)
    assert (train, evaluation) == split_examples(examples, share, seed)


def test_the_share_is_kept_and_the_seed_matters() -> None:
    examples = pairs([f"prompt {i}" for i in range(500)])
    sides = [split_examples(examples, 0.1, seed)[1] for seed in range(3)]
    assert [len(side) for side in sides] == [50, 50, 50]
    assert len({tuple(example.row for example in side) for side in sides}) == 3


def test_a_dominant_prompt_is_trained_on() -> None:
    train, evaluation = split_examples(pairs(["common"] * 20 + ["rare", "seldom"]), 0.1, 0)
    assert {example.prompt for example in evaluation} <= {"user: rare", "user: seldom"}
    assert len(train) >= 20


def test_one_prompt_for_all_is_split_by_reply() -> None:
    train, evaluation = split_examples(pairs(["Tell me a story"] * 10), 0.2, 0)
    assert (len(train), len(evaluation)) == (8, 2)


def test_conversations_that_begin_alike_stay_together() -> None:
    def talk(row: int, *texts: str) -> Example:
        roles = ("user", "assistant") * 2
        return Example(row, tuple(Part(r, t, r == "assistant") for r, t in zip(roles, texts, strict=False)))

    examples = [talk(1, "a", "x"), talk(2, "a", "y", "more", "z"), talk(3, "b", "x")]
    for seed in range(5):
        sides = split_examples(examples, 0.5, seed)
        assert {frozenset(e.row for e in side) for side in sides} == {frozenset({1, 2}), frozenset({3})}


def test_the_split_is_the_same_in_another_process() -> None:
    code = (
        "from lora_engine.data import *\n"
        "examples = [Example(i, (Part('text', f'story {i}', True),)) for i in range(40)]\n"
        "print([e.row for e in split_examples(examples, 0.2, 7)[1]])"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}
        ).stdout
        for seed in ("1", "2")
    }
    here = [
        e.row for e in split_examples([Example(i, (Part("text", f"story {i}", True),)) for i in range(40)], 0.2, 7)[1]
    ]
    assert runs == {f"{here}\n"}


def test_too_few_examples_or_a_wrong_share() -> None:
    with pytest.raises(DataError, match="The data has 1 usable row; at least 2 are needed, one to train on and one"):
        split_examples(pairs(["a"]))
    with pytest.raises(DataError, match="The data has 0 usable rows"):
        split_examples([])
    with pytest.raises(ConfigError, match=r"eval_share is 1\.0; allowed: a number between 0 and 1"):
        split_examples(pairs(["a", "b"]), 1.0)


@settings(deadline=None)
@given(st.text(alphabet="ab. \n\té", min_size=1, max_size=6000).filter(str.strip))
def test_blocks_lose_nothing(text: str) -> None:
    blocks = cut_blocks(text)
    assert "".join(blocks) == text
    assert all(block.strip() for block in blocks)


def test_blocks_are_groups_of_whole_paragraphs() -> None:
    paragraphs = [f"Paragraph {i} says something of middling length about a lamp." for i in range(400)]
    blocks = cut_blocks("\n\n".join(paragraphs))
    assert len(blocks) > 20
    assert [line for block in blocks for line in block.strip().split("\n\n")] == paragraphs
    assert max(map(len, blocks)) <= 1.25 * MAX_BLOCK_CHARACTERS


def test_one_long_line_is_cut_between_words() -> None:
    blocks = cut_blocks("word " * 1000)
    assert len(blocks) > 10
    assert all(block.split() == ["word"] * len(block.split()) for block in blocks)
