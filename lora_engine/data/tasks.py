"""Which columns mean what: tasks recognised by column names, or set by hand."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lora_engine.config import TASKS
from lora_engine.errors import ConfigError, DataError


@dataclass(frozen=True)
class TaskColumns:
    """Roles of a task and the column names each is known by, best first; optional roles may be absent."""

    names: Mapping[str, tuple[str, ...]]
    optional: tuple[str, ...] = ()

    @property
    def required(self) -> tuple[str, ...]:
        return tuple(role for role in self.names if role not in self.optional)


# In the order they are tried: the more particular first.
TASK_COLUMNS: dict[str, TaskColumns] = {
    "messages": TaskColumns({"messages": ("messages", "conversations", "conversation", "chat", "dialogue", "dialog")}),
    "instruction": TaskColumns(
        {
            "instruction": ("instruction", "instructions"),
            "input": ("input", "inputs", "context"),
            "output": ("output", "outputs", "response", "completion", "answer", "target"),
        },
        optional=("input",),
    ),
    "question_answer": TaskColumns(
        {
            "question": ("question", "q"),
            "answer": ("answer", "a"),
            "context": ("context", "passage"),
        },
        optional=("context",),
    ),
    "prompt_completion": TaskColumns(
        {
            "prompt": (
                *("prompt", "query", "request", "input", "inputs", "source", "src", "user", "customer"),
                *("question", "document", "article", "record"),
            ),
            "completion": (
                *("completion", "response", "reply", "output", "outputs", "target", "tgt", "assistant", "agent"),
                *("answer", "summary", "sentence"),
            ),
        }
    ),
    "text_label": TaskColumns(
        {
            "text": ("text", "sentence", "review", "content", "comment", "tweet", "message", "document", "body"),
            "label": ("label", "labels", "sentiment", "category", "class", "target", "intent"),
        }
    ),
    "text": TaskColumns({"text": ("text", "content", "story", "sentence", "document", "body", "paragraph")}),
}
assert set(TASK_COLUMNS) == set(TASKS)

UNDERSTOOD = "text; prompt, completion; instruction, input, output; messages; question, answer; text, label"


def check_column_names(names: Sequence[str], file: str) -> None:
    """Raises DataError when a name occurs twice (upper and lower case being the same)."""
    seen: dict[str, tuple[int, str]] = {}
    for i, name in enumerate(names, 1):
        key = _normal(name)
        if key in seen:
            first, other = seen[key]
            what = f"{name!r} twice" if name == other else f"{other!r} and {name!r}, which count as one name"
            raise DataError(f"{file} has the column {what} (columns {first} and {i}); rename or remove one of them.")
        seen[key] = (i, name)


def recognise_task(
    names: Sequence[str], file: str, *, task: str | None = None, columns: Mapping[str, str] | None = None
) -> tuple[str, dict[str, str]]:
    """(task, role -> column name) for a table with these column names.

    `columns` fixes roles by hand and the rest is recognised; `task` fixes the task. Raises
    ConfigError for a task or role that does not exist, DataError when columns are missing."""
    given = {role: name for role, name in (columns or {}).items() if name}
    if task is not None and task not in TASKS:
        raise ConfigError("task", task, f"one of {', '.join(TASKS)}")
    _check_given(given, names, file, task)
    for candidate in [task] if task else TASK_COLUMNS:
        found = _match(candidate, names, given)
        if found is not None:
            return candidate, found
    have = ", ".join(repr(name) for name in names)
    if task is not None:
        found_roles = _found_roles(task, names, given)
        missing = [role for role in TASK_COLUMNS[task].required if role not in found_roles]
        raise DataError(
            f"The task {task} needs a column for {' and '.join(missing)}, and {file} has {have}; "
            "name the column, or choose another task."
        )
    what = (
        f"one column, {have}, and its name alone is not understood"
        if len(names) == 1
        else f"the columns {have}, and what they mean is not understood"
    )
    raise DataError(f"{file} has {what}; name them as one of: {UNDERSTOOD}; or choose task and columns by hand.")


def _check_given(given: Mapping[str, str], names: Sequence[str], file: str, task: str | None) -> None:
    roles = TASK_COLUMNS[task].names if task else {role for t in TASK_COLUMNS.values() for role in t.names}
    for role, name in given.items():
        if role not in roles:
            raise ConfigError("columns", role, f"the roles {', '.join(sorted(roles))}")
        if name not in names:
            raise DataError(f"columns says {role}={name!r}, and {file} has {', '.join(repr(n) for n in names)}.")
    if len(set(given.values())) < len(given):
        raise DataError(f"columns is {dict(given)!r}; allowed: a different column for each role.")


def _match(task: str, names: Sequence[str], given: Mapping[str, str]) -> dict[str, str] | None:
    spec = TASK_COLUMNS[task]
    if any(role not in spec.names for role in given):
        return None
    found = _found_roles(task, names, given)
    return found if all(role in found for role in spec.required) else None


def _found_roles(task: str, names: Sequence[str], given: Mapping[str, str]) -> dict[str, str]:
    by_name = {_normal(name): name for name in reversed(names)}
    found: dict[str, str] = {}
    taken = set(given.values())
    for role, known in TASK_COLUMNS[task].names.items():
        name = given.get(role) or next((by_name[k] for k in known if k in by_name and by_name[k] not in taken), None)
        if name is not None:
            found[role] = name
            taken.add(name)
    return found


def _normal(name: str) -> str:
    return re.sub(r"[\s_-]+", "_", name.strip().casefold())
