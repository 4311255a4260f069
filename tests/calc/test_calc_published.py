"""The table of published figures: every row can be computed and says what it is. No row is asked to be close."""

import math

import pytest
from published import ACTIVE, ALLOCATED, GB, GIB, PUBLISHED, RESERVED, Published, rows, text

from lora_engine import calc
from lora_engine.config import FullConfig, LoraConfig


def named(row):
    return f"{row.model.rpartition('/')[2]}-{row.method.method}-{row.settings['precision']}-{row.value:g}"


def test_the_row_that_everyone_asks_for_and_ten_more():
    first = PUBLISHED[0]
    assert isinstance(first.method, LoraConfig)
    assert (first.model, first.method.r, first.method.target_modules) == (
        "meta-llama/Llama-2-7b-hf",
        8,
        ("q_proj", "v_proj"),
    )
    wanted = {"precision": "bf16", "batch_size": 1, "seq_length": 512}
    assert {key: first.settings[key] for key in wanted} == wanted
    settings = {(row.model, str(row.method), str(row.settings)) for row in PUBLISHED}
    assert len(settings) >= 11
    assert len({row.source for row in PUBLISHED}) >= 4
    assert any(isinstance(row.method, FullConfig) for row in PUBLISHED)
    assert any(row.settings["precision"] == "nf4" for row in PUBLISHED)


@pytest.mark.parametrize("row", PUBLISHED, ids=named)
def test_a_row_can_be_computed_and_says_what_it_is(row: Published):
    memory = row.predicted()
    assert memory.peak_bytes > 0
    assert math.isfinite(row.difference_percent())
    assert row.unit in (1, GB, GIB)
    assert row.meaning in (ALLOCATED, RESERVED, ACTIVE)
    assert row.source
    assert row.note
    assert 1e9 < row.published_bytes < 1e12


def test_trained_parameters_are_those_the_source_states():
    """Resource tables: 4,194,304 (Llama 2 7B), 6,553,600 (13B), 1,572,864 (phi-1.5). PEFT: 9,175,040 and 9,461,760."""
    stated = {4194304, 6553600, 1572864, 9175040, 9461760}
    counted = {
        calc.count_parameters(row.shape(), row.method).trainable_parameters
        for row in PUBLISHED
        if "resource-tables" in row.source or ("PEFT" in row.source and isinstance(row.method, LoraConfig))
    }
    assert counted == stated


def test_the_table_prints_every_row(capsys):
    print(text())
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(PUBLISHED) + 2
    assert "difference" in printed[0]
    assert all(line[7].endswith(" %") for line in rows())
