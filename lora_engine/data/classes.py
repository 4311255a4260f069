"""Texts with a label, for a classifier: the classes of a dataset, and token ids as the model was pretrained on them."""

from collections.abc import Sequence

from lora_engine.data.schema import Dataset, Encoded, Example
from lora_engine.data.tokenizer import TextTokenizer
from lora_engine.errors import DataError

MAX_CLASSES = 1000


def class_names(dataset: Dataset) -> tuple[str, ...]:
    """The labels of a text_label dataset in alphabetical order; nothing for other tasks.

    Raises DataError for a single label, or for more than MAX_CLASSES."""
    if dataset.task != "text_label":
        return ()
    names = sorted({label_of(example) for example in dataset.examples})
    column = dataset.columns.get("label", "label")
    if len(names) < 2:
        raise DataError(f"The column {column!r} says {names[0]!r} in every row; a classifier needs at least 2 labels.")
    if len(names) > MAX_CLASSES:
        raise DataError(
            f"The column {column!r} has {len(names):,} different labels; allowed: at most {MAX_CLASSES:,}. "
            "For texts to be written rather than chosen, take the task prompt_completion."
        )
    return tuple(names)


def label_of(example: Example) -> str:
    """The text of the trained part."""
    return next(part.text for part in example.parts if part.trained)


def text_of(example: Example) -> str:
    """What is to be labelled."""
    return "".join(part.text for part in example.parts if not part.trained)


def encode_classes(
    examples: Sequence[Example], names: Sequence[str], tokenizer: TextTokenizer, max_length: int
) -> list[Encoded]:
    """One sequence per example, its `label` the index of its class in `names`; a text of no token is left out."""
    index = {name: i for i, name in enumerate(names)}
    rows = []
    for example in examples:
        ids, truncated = encode_text(text_of(example), tokenizer, max_length)
        if ids:
            rows.append(Encoded(example.row, ids, [], truncated, label=index[label_of(example)]))
    return rows


def encode_text(text: str, tokenizer: TextTokenizer, max_length: int) -> tuple[list[int], bool]:
    """(ids, truncated): `text` between the special tokens that the tokenizer adds (BERT's [CLS] and [SEP]), at most
    `max_length` of them; what spells a special token in the text is plain text."""
    plain = tokenizer.encode_literal(text)
    whole = list(tokenizer.literal_backend.encode("", add_special_tokens=True).ids)
    # The template puts its tokens around the text: BERT's one before and one after, Llama's one before.
    probe = list(tokenizer.literal_backend.encode("a", add_special_tokens=True).ids)
    before = next((i for i, (a, b) in enumerate(zip(whole, probe, strict=False)) if a != b), len(whole))
    room = max(1, max_length - len(whole))
    return whole[:before] + plain[:room] + whole[before:], len(plain) > room
