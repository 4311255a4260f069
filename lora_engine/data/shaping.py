"""From the cells of a row to an Example, or to the reason why there is none."""

import json
from collections.abc import Mapping
from typing import Any

from lora_engine.data.schema import Example, Part
from lora_engine.data.tables import _json_type

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "customer": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}


class _UnusableError(Exception):
    """The row cannot be used; the message says why."""


def shape_row(number: int, row: Mapping[str, Any] | str, task: str, columns: Mapping[str, str]) -> Example | str:
    """The row's Example, or the reason why it is dropped."""
    if isinstance(row, str):
        return row
    cells = {role: row.get(name) for role, name in columns.items()}
    try:
        return Example(number, _SHAPES[task](cells))
    except _UnusableError as unusable:
        return str(unusable)


def _text_parts(cells: Mapping[str, Any]) -> tuple[Part, ...]:
    return (Part("text", _text(cells, "text", strip=False), trained=True),)


def _pair(prompt: str, completion: str) -> tuple[Part, ...]:
    return (Part("user", prompt, trained=False), Part("assistant", completion, trained=True))


def _prompt_completion_parts(cells: Mapping[str, Any]) -> tuple[Part, ...]:
    return _pair(_text(cells, "prompt"), _text(cells, "completion"))


def _instruction_parts(cells: Mapping[str, Any]) -> tuple[Part, ...]:
    more = _text(cells, "input", required=False)
    prompt = _text(cells, "instruction") + (f"\n\n{more}" if more else "")
    return _pair(prompt, _text(cells, "output"))


def _question_parts(cells: Mapping[str, Any]) -> tuple[Part, ...]:
    context = _text(cells, "context", required=False)
    prompt = (f"{context}\n\n" if context else "") + _text(cells, "question")
    return _pair(prompt, _text(cells, "answer"))


def _label_parts(cells: Mapping[str, Any]) -> tuple[Part, ...]:
    return _pair(_text(cells, "text"), _text(cells, "label"))


def _message_parts(cells: Mapping[str, Any]) -> tuple[Part, ...]:
    messages = cells["messages"]
    if isinstance(messages, str):
        try:
            messages = json.loads(messages)
        except (ValueError, RecursionError):
            raise _UnusableError("messages is not a list of messages") from None
    if not isinstance(messages, list) or not messages:
        raise _UnusableError("messages is empty" if not messages else "messages is not a list of messages")
    parts = [_message_part(i, message) for i, message in enumerate(messages, 1)]
    last = max((i for i, part in enumerate(parts) if part.trained), default=None)
    if last is None:
        raise _UnusableError("messages has no assistant message")
    return tuple(parts[: last + 1])  # nothing after the last reply is ever trained


def _message_part(index: int, message: Any) -> Part:
    if not isinstance(message, Mapping):
        raise _UnusableError(f"message {index} is not an object")
    role = message.get("role", message.get("from"))
    known = _ROLES.get(str(role).strip().casefold())
    if known is None:
        raise _UnusableError(f"message {index} has the role {role!r}; allowed: system, user, assistant")
    content = message.get("content", message.get("value"))
    if isinstance(content, list):
        pieces = [piece.get("text") if isinstance(piece, Mapping) else piece for piece in content]
        texts = [piece for piece in pieces if isinstance(piece, str)]
        if len(texts) < len(pieces):
            raise _UnusableError(f"message {index} has a part that is not text")
        content = "".join(texts)
    if content is not None and not isinstance(content, str):
        raise _UnusableError(f"message {index} is {_json_type(content)}, not text")
    text = (content or "").strip()
    if not text:
        raise _UnusableError(f"message {index} ({known}) is empty")
    _check_characters(text, f"message {index}")
    return Part(known, text, trained=known == "assistant")


_SHAPES = {
    "text": _text_parts,
    "prompt_completion": _prompt_completion_parts,
    "instruction": _instruction_parts,
    "messages": _message_parts,
    "question_answer": _question_parts,
    "text_label": _label_parts,
}


def _text(cells: Mapping[str, Any], role: str, *, required: bool = True, strip: bool = True) -> str:
    """The cell as text. A number is written as in JSON; null is empty; a list or object is refused."""
    value = cells.get(role)
    if value is None:
        text = ""
    elif isinstance(value, str):
        text = value
    elif isinstance(value, bytes):
        text = value.decode("utf-8", "replace")
    elif isinstance(value, list | Mapping):
        raise _UnusableError(f"{role} is {_json_type(value)}, not text")
    else:
        text = json.dumps(value) if isinstance(value, bool | int | float) else str(value)
    _check_characters(text, role)
    stripped = text.strip()
    if required and not stripped:
        raise _UnusableError(f"{role} is empty")
    return stripped if strip else text


def _check_characters(text: str, what: str) -> None:
    if "\0" in text:
        raise _UnusableError(f"{what} has a NUL character")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _UnusableError(f"{what} has half of a character (a lone surrogate)") from None
