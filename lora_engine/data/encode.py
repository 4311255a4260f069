"""Rendered text to token ids and labels.

What is trained and what is not is encoded apart, so a prompt has the same tokens in training as in
generation. One long text (blocks) is joined again where blocks are neighbours and cut in windows of
`max_length`; no token is lost. A single text that is too long is cut in windows too. A conversation
that is too long loses its end.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from lora_engine.data.render import Piece, Rendered, prompt_pieces, render_pieces
from lora_engine.data.schema import DroppedRow, Encoded, Example
from lora_engine.data.tokenizer import TextTokenizer
from lora_engine.errors import ConfigError

IGNORED = -100

Labelled = tuple[list[int], list[int]]


@dataclass(frozen=True)
class EncodedRows:
    """All sequences, the examples that gave none, and what was noticed on the way.

    `long_rows` counts examples longer than `max_length`, `longest` is the most tokens of one
    example; `problems` counts why the chat template was not used."""

    sequences: list[Encoded]
    dropped: list[DroppedRow]
    long_rows: int
    longest: int
    problems: dict[str, int]
    rendered: list[Rendered]


def encode_examples(examples: Sequence[Example], tokenizer: TextTokenizer, max_length: int) -> list[Encoded]:
    """Sequences of at most `max_length` tokens, each with at least one token to predict.

    An example without any (its prompt alone fills `max_length`) is left out; see `check_dataset`."""
    return encode_rows(examples, tokenizer, max_length).sequences


def encode_prompt(text: str, tokenizer: TextTokenizer, task: str) -> list[int]:
    """Ids of `render_prompt(text, ...)`, the text's own spellings of special tokens taken literally."""
    return _encode_pieces([prompt_pieces(text, tokenizer, task)], tokenizer)[0][0]


def encode_rows(examples: Sequence[Example], tokenizer: TextTokenizer, max_length: int) -> EncodedRows:
    """`encode_examples` with an account of everything. Raises ConfigError for a `max_length` below 3."""
    if max_length < 3:
        raise ConfigError("max_length", max_length, "a whole number of at least 3")
    rendered = [render_pieces(example, tokenizer) for example in examples]
    encoded = _encode_pieces([r.pieces for r in rendered], tokenizer)
    problems: dict[str, int] = {}
    for r in rendered:
        if r.problem:
            problems[r.problem] = problems.get(r.problem, 0) + 1
    sequences: list[Encoded] = []
    dropped: list[DroppedRow] = []
    long_rows = longest = 0
    run: list[tuple[int, Labelled]] = []
    for i, (example, (ids, labels)) in enumerate(zip(examples, encoded, strict=True)):
        if example.block:
            run.append((example.row, (ids, labels)))
            following = examples[i + 1] if i + 1 < len(examples) else None
            if following is None or not following.block or following.row != example.row + 1:
                sequences += _windows(run, max_length)
                run = []
            continue
        longest = max(longest, len(ids))
        long_rows += len(ids) > max_length
        if all(part.role == "text" for part in example.parts):
            made = _windows([(example.row, (ids, labels))], max_length)
        else:
            made = [Encoded(example.row, ids[:max_length], labels[:max_length], truncated=len(ids) > max_length)]
        made = [sequence for sequence in made if num_trained(sequence)]
        if made:
            sequences += made
        else:
            dropped.append(DroppedRow(example.row, _why_untrained(len(ids), max_length)))
    return EncodedRows(sequences, dropped, long_rows, longest, problems, rendered)


def num_trained(sequence: Encoded) -> int:
    """Tokens whose prediction is trained; the first token has nothing before it to be predicted from."""
    return len(sequence.labels) - 1 - sequence.labels[1:].count(IGNORED) if sequence.labels else 0


def _why_untrained(length: int, max_length: int) -> str:
    if length > max_length:
        return f"the prompt alone fills max_length ({max_length} tokens), so nothing of the reply is left"
    return "nothing in it can be predicted"


def _windows(run: list[tuple[int, Labelled]], max_length: int) -> list[Encoded]:
    """Consecutive windows over joined texts; a window's row is that of its first token."""
    ids = [token for _, (tokens, _) in run for token in tokens]
    labels = [label for _, (_, some) in run for label in some]
    rows = [row for row, (tokens, _) in run for _ in tokens]
    windows: list[Encoded] = []
    start = 0
    while start < len(ids):
        end = min(start + max_length, len(ids))
        if len(ids) - end == 1:
            end -= 1  # a window of one token would predict nothing
        windows.append(Encoded(rows[start], ids[start:end], labels[start:end], truncated=False))
        start = end
    return [window for window in windows if num_trained(window)]


def _encode_pieces(examples: Sequence[Sequence[Piece]], tokenizer: TextTokenizer) -> list[Labelled]:
    """(input_ids, labels) of each example, all texts in one batch."""
    texts: list[str] = []
    plans: list[list[tuple[bool, int | None, str]]] = []
    for pieces in examples:
        plan: list[tuple[bool, int | None, str]] = []
        for (trained, literal), group in groupby(pieces, key=lambda piece: (piece.trained, piece.literal)):
            text = "".join(piece.text for piece in group)
            plan.append((trained, None if literal else len(texts), text))
            if not literal:
                texts.append(text)
        plans.append(plan)
    batch = tokenizer.encode_many(texts)
    result: list[Labelled] = []
    for plan in plans:
        ids: list[int] = []
        labels: list[int] = []
        for trained, index, text in plan:
            tokens = tokenizer.encode_literal(text) if index is None else batch[index]
            ids += tokens
            labels += tokens if trained else [IGNORED] * len(tokens)
        result.append((ids, labels))
    return result
