"""Train and evaluation sides: seeded, deterministic everywhere, equal prompts on one side."""

import hashlib
from collections.abc import Callable, Sequence

from lora_engine.data.schema import Example
from lora_engine.errors import ConfigError, DataError


def split_examples(
    examples: Sequence[Example], eval_share: float = 0.1, seed: int = 0
) -> tuple[list[Example], list[Example]]:
    """(train, evaluation), each in file order and not empty; about `eval_share` of them evaluate.

    Examples with an equal prompt stay together, so no evaluation prompt was ever trained on. When
    all prompts are equal, equal examples stay together instead. A function of the examples' text,
    `eval_share` and `seed` alone (SHA-256, no `hash()`). Raises DataError for fewer than 2 examples
    or only equal ones."""
    if not 0.0 < eval_share < 1.0:
        raise ConfigError("eval_share", eval_share, "a number between 0 and 1")
    if len(examples) < 2:
        what = "block of text" if any(example.block for example in examples) else "usable row"
        raise DataError(
            f"The data has {len(examples)} {what}{'' if len(examples) == 1 else 's'}; "
            "at least 2 are needed, one to train on and one to evaluate with."
        )
    groups = _group(examples, lambda example: example.prompt)
    if len(groups) < 2:
        groups = _group(examples, lambda example: repr([(part.role, part.text) for part in example.parts]))
    if len(groups) < 2:
        raise DataError(f"All {len(examples):,} rows are the same; at least 2 different ones are needed.")

    order = sorted(groups, key=lambda key: _digest(f"{seed}:{key}"))
    target = min(max(1, round(len(examples) * eval_share)), len(examples) - 1)
    held_out: set[int] = set()
    for key in order:
        if len(held_out) + len(groups[key]) <= target:
            held_out.update(groups[key])
    if not held_out:
        held_out.update(groups[min(order, key=lambda key: len(groups[key]))])
    train = [example for i, example in enumerate(examples) if i not in held_out]
    return train, [examples[i] for i in sorted(held_out)]


def _group(examples: Sequence[Example], key: Callable[[Example], str]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for i, example in enumerate(examples):
        groups.setdefault(_digest(key(example)), []).append(i)
    return groups


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
