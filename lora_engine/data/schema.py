"""What the data package hands around: plain frozen records."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Part:
    """One turn or one text. `role` is "system", "user", "assistant" or "text"."""

    role: str
    text: str
    trained: bool


@dataclass(frozen=True)
class Example:
    """One thing to learn from.

    `row` is the line of a .jsonl file and otherwise the number of the record, counted from 1, a
    header not counted. `block` marks a piece of one long text: it carries on where the example of
    the row before ends, and gets no end token."""

    row: int
    parts: tuple[Part, ...]
    block: bool = False

    @property
    def prompt(self) -> str:
        """What comes before the first trained part; the whole text when everything is trained."""
        before: list[str] = []
        for part in self.parts:
            if part.trained and part.role != "text":
                break
            before.append(f"{part.role}: {part.text.strip()}")
        return "\n".join(before)


@dataclass(frozen=True)
class DroppedRow:
    """A row that is not used, and why."""

    row: int
    reason: str


@dataclass(frozen=True)
class Dataset:
    """A file that was read: `rows == len(examples) + len(dropped)`.

    `columns` maps a role ("prompt") to the column it was found in ("Question")."""

    path: str
    format: str
    encoding: str | None
    column_names: tuple[str, ...]
    task: str
    columns: Mapping[str, str]
    rows: int
    examples: tuple[Example, ...]
    dropped: tuple[DroppedRow, ...] = ()
    warnings: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Encoded:
    """Token ids of one sequence and its labels, -100 where nothing is trained.

    Both lists have the same length, at most `max_length`. `truncated`: a tail was cut off. A text for a classifier has
    the number of its class in `label`, and no `labels`."""

    row: int
    input_ids: list[int]
    labels: list[int]
    truncated: bool
    label: int | None = None
