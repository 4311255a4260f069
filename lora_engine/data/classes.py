"""Texts with a label, for a classifier: the classes of a dataset, and token ids as the model was pretrained on them."""

from collections import Counter
from collections.abc import Sequence

from lora_engine.data.schema import Dataset, Encoded, Example
from lora_engine.data.tokenizer import TextTokenizer
from lora_engine.errors import DataError

MAX_CLASSES = 1000
FEW_ROWS = 10  # of a class
UNEVEN = 3  # times as many rows in the largest class as in the others on average
SHOWN = 8  # classes named in a sentence


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
    return encode_labelled(examples, names, tokenizer, max_length)[0]


def encode_labelled(
    examples: Sequence[Example], names: Sequence[str], tokenizer: TextTokenizer, max_length: int
) -> tuple[list[Encoded], int]:
    """(`encode_classes`, tokens of the longest text before any is cut)."""
    index = {name: i for i, name in enumerate(names)}
    before, after = special_tokens(tokenizer)
    rows, longest = [], 0
    texts = tokenizer.encode_literal_many([text_of(example) for example in examples])
    for example, plain in zip(examples, texts, strict=True):
        ids, truncated = _between(before, plain, after, max_length)
        if ids:
            longest = max(longest, len(before) + len(plain) + len(after))
            rows.append(Encoded(example.row, ids, [], truncated, label=index[label_of(example)]))
    return rows, longest


def encode_text(text: str, tokenizer: TextTokenizer, max_length: int) -> tuple[list[int], bool]:
    """(ids, truncated): `text` between the special tokens that the tokenizer adds (BERT's [CLS] and [SEP]), at most
    `max_length` of them; what spells a special token in the text is plain text."""
    before, after = special_tokens(tokenizer)
    return _between(before, tokenizer.encode_literal(text), after, max_length)


def special_tokens(tokenizer: TextTokenizer) -> tuple[list[int], list[int]]:
    """(before, after): the ids that the tokenizer's template puts around a text. BERT's has one before and one after,
    Llama's one before."""
    whole = list(tokenizer.literal_backend.encode("", add_special_tokens=True).ids)
    probe = list(tokenizer.literal_backend.encode("a", add_special_tokens=True).ids)
    cut = next((i for i, (a, b) in enumerate(zip(whole, probe, strict=False)) if a != b), len(whole))
    return whole[:cut], whole[cut:]


def _between(before: list[int], plain: list[int], after: list[int], max_length: int) -> tuple[list[int], bool]:
    room = max(1, max_length - len(before) - len(after))
    return before + plain[:room] + after, len(plain) > room


def count_classes(sequences: Sequence[Encoded], names: Sequence[str]) -> tuple[tuple[str, int], ...]:
    """(name, number of rows) of every class, most frequent first, equals in alphabetical order."""
    rows = Counter(names[sequence.label] for sequence in sequences if sequence.label is not None)
    return tuple(sorted(((name, rows[name]) for name in names), key=lambda each: (-each[1], each[0])))


def class_warnings(classes: Sequence[tuple[str, int]]) -> list[str]:
    """What is wrong with the numbers of rows in `classes`, most frequent first."""
    found = []
    few = [(name, rows) for name, rows in classes if rows < FEW_ROWS]
    if few:
        who = f"The class {_short(few[0][0])} has" if len(few) == 1 else f"{len(few):,} classes have"
        counts = _rows(few[0][1]) if len(few) == 1 else f"fewer than {FEW_ROWS} rows ({_listed(few[::-1])})"
        only = "only " if len(few) == 1 else ""
        found.append(f"{who} {only}{counts}: too few to learn it well or to judge how well it was learned.")
    (largest, most), total = classes[0], sum(rows for _, rows in classes)
    if most * (len(classes) - 1) >= UNEVEN * (total - most):
        found.append(
            f"The classes are uneven: always answering {_short(largest)} would be right for "
            f"{100 * most / total:.1f} % of the rows, so compare accuracy with that, or look at macro-F1."
        )
    return found


def classes_text(classes: Sequence[tuple[str, int]]) -> str:
    """2 classes: positive 5,331, negative 5,331"""
    return f"{len(classes):,} classes: {_listed(classes)}"


def _listed(classes: Sequence[tuple[str, int]]) -> str:
    shown = ", ".join(f"{_cut(name)} {rows:,}" for name, rows in classes[:SHOWN])
    return shown + (f" and {len(classes) - SHOWN:,} more" if len(classes) > SHOWN else "")


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count:,} rows"


def _short(name: str) -> str:
    return repr(_cut(name))


def _cut(name: str) -> str:
    return name if len(name) <= 40 else f"{name[:37]}..."
