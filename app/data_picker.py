"""Choosing a dataset and seeing what is in it; used by Fine-tune and Sweep."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cache
import state
import streamlit as st
from formatting import format_integer, plural
from state import Settings
from widgets import empty_state, text_block

from lora_engine.config import DataConfig
from lora_engine.data import EXAMPLES, FORMATS, MAX_UPLOAD_BYTES, TASK_COLUMNS, classes_text
from lora_engine.errors import InputError
from lora_engine.runs import store_upload

FIRST_EXAMPLE = EXAMPLES[0]
TITLES = {example.name: example.title for example in EXAMPLES}
TASK_WORDS = {
    "text": "plain text",
    "prompt_completion": "prompt and completion",
    "instruction": "instruction, input and output",
    "messages": "messages",
    "question_answer": "question and answer",
    "text_label": "text and label",
}
RECOGNISED = "as recognised"
ENCODINGS = (RECOGNISED, "utf-8", "cp1252", "latin-1", "utf-16")
# Streamlit's own instructions name the server's limit; the caption names what is read.
HIDE_INSTRUCTIONS = "<style>[data-testid=stFileUploaderDropzoneInstructions]{display:none}</style>"
UPLOAD, EXAMPLE, SEEN_UPLOAD, TOO_LARGE = "upload", "example", "_seen_upload", "_too_large"


@dataclass(frozen=True)
class Chosen:
    """A dataset and how to read it; `report` is the check's dict, or {"error": one sentence}."""

    name: str
    title: str
    path: Path
    report: Mapping[str, Any]
    task: str | None = None
    columns: Mapping[str, str] | None = None
    encoding: str | None = None

    @property
    def usable(self) -> bool:
        return "error" not in self.report

    def config(self) -> DataConfig:
        """The dataset of a run."""
        return DataConfig(path=str(self.path), task=self.task, columns=self.columns, encoding=self.encoding)


def choose(settings: Settings, *, preview: bool = True, used: Path | None = None) -> Chosen | None:
    """Upload or pick, then the check in words; None while nothing is chosen. Without `preview` the rendered
    examples are folded away. `used` is the data of the run on the page, taken while nothing else is chosen."""
    left, right = st.columns([3, 2], gap="large")
    with left:
        _upload()
    with right:
        picked = state.recall(state.DATA)
        st.session_state[EXAMPLE] = picked if picked in TITLES else None
        st.pills(
            "Or take an example",
            list(TITLES),
            format_func=TITLES.__getitem__,
            key=EXAMPLE,
            wrap=True,
            on_change=_take_example,
        )
    name = state.recall(state.DATA)
    if name is None and st.session_state.get(TOO_LARGE):
        st.error(st.session_state[TOO_LARGE])
        return None
    name = name or (name_of(used) if used else None)
    if name is None:
        if empty_state(
            "Here you will see what is in your data: the format, rows kept and dropped, tokens, "
            "and one example as the model reads it.",
            f"Use the example: {FIRST_EXAMPLE.title.lower()}",
            key="first_example",
        ):
            state.remember(state.DATA, FIRST_EXAMPLE.name)
            st.rerun()
        return None
    return _check(name, settings, preview)


def _upload() -> None:
    """The uploader; a new file is kept at home, one that is too large is only spoken of."""
    st.html(HIDE_INSTRUCTIONS)
    upload = st.file_uploader("Drop a file, or choose one", type=list(FORMATS), key=UPLOAD)
    limit = f"{MAX_UPLOAD_BYTES / 1e6:.0f} MB"
    st.caption(f"{', '.join(FORMATS)}; at most {limit}. It stays on this machine.")
    if upload is None or st.session_state.get(SEEN_UPLOAD) == upload.file_id:
        return
    st.session_state[SEEN_UPLOAD] = upload.file_id
    _forget_reading()
    if upload.size > MAX_UPLOAD_BYTES:
        size = f"{upload.size / 1e6:.1f} MB"
        st.session_state[TOO_LARGE] = (
            f"{_plain(upload.name)} has {size}; at most {limit} are read: keep a part of its rows."
        )
        state.remember(state.DATA, None)
        return
    path = store_upload(cache.ledger().home, upload.name, upload.getvalue())
    state.remember(state.DATA, f"{path.parent.name}/{path.name}")


def _take_example() -> None:
    if st.session_state[EXAMPLE]:
        _forget_reading()
        state.remember(state.DATA, st.session_state[EXAMPLE])


def _forget_reading() -> None:
    """Another file: what was said about reading the last one no longer holds."""
    st.session_state.pop(TOO_LARGE, None)
    for key in [key for key in st.session_state if str(key).startswith("read_")]:
        del st.session_state[key]


def resolve(name: str) -> tuple[str, Path]:
    """(title, path) of an example or of an upload kept at home. Raises InputError."""
    for example in EXAMPLES:
        if example.name == name:
            return example.title, example.path
    folder = (cache.ledger().home / "datasets").resolve()
    path = (folder / name).resolve()
    if not path.is_relative_to(folder) or not path.is_file():
        raise InputError(f"The data {name!r} is not on this machine; drop the file again or take an example.")
    return path.name, path


def name_of(path: Path) -> str | None:
    """Inverse of `resolve`: the name in the address bar of a dataset's path; None where it has none."""
    for example in EXAMPLES:
        if example.file == path.name and path.parent.name == "datasets":
            return example.name
    folder = (cache.ledger().home / "datasets").resolve()
    return str(path.relative_to(folder)) if path.is_relative_to(folder) and path.is_file() else None


def _check(name: str, settings: Settings, preview: bool) -> Chosen | None:
    try:
        title, path = resolve(name)
    except InputError as error:
        st.error(str(error))
        return None
    task, columns, encoding = _reading()
    report = cache.check_data(path, settings.model, settings.seq_length, task=task, columns=columns, encoding=encoding)
    chosen = Chosen(name, title, path, report, task, columns, encoding)
    if chosen.usable:
        _show_report(title, report, preview)
        note = cache.tokenizer(settings.model)[1]
        if note:
            st.caption(note)
    else:
        st.error(report["error"])
    _reading_form(report)
    return chosen


def _show_report(title: str, report: Mapping[str, Any], preview: bool) -> None:
    dropped = report["dropped"]
    kept = report["rows"] - len({row["row"] for row in dropped})
    encoding = f", {report['encoding'].upper()}" if report["encoding"] else ""
    classes = [(row["name"], row["rows"]) for row in report["classes"]]
    trained = f", of which {format_integer(report['trained_tokens'])} are trained on"
    st.markdown(
        f"**{_plain(title)}** is {report['format'].upper()}{encoding}, read as {TASK_WORDS[report['task']]}: "
        f"{format_integer(kept)} of {plural(report['rows'], 'row')} kept, "
        f"{plural(report['examples'], 'sequence')}, {plural(report['tokens'], 'token')}"
        f"{'; ' + _plain(classes_text(classes)) if classes else trained}."
    )
    for warning in report["warnings"]:
        st.caption(f":material/info: {_plain(warning)}")
    if dropped:
        with st.expander(f"{plural(len(dropped), 'dropped row')}"):
            st.dataframe(dropped, hide_index=True, column_config={"row": "Row", "reason": "Why"})
    with st.container() if preview else st.expander("Rendered examples"):
        learned = "the class that it learns to choose" if classes else "what it learns to write"
        st.caption(f"As the model reads it; the highlighted part is {learned}.")
        tabs = st.tabs([f"Example {i}" for i in range(1, len(report["preview"]) + 1)])
        for tab, segments in zip(tabs, report["preview"], strict=True):
            with tab:
                text_block(_apart(segments) if classes else segments)


def _apart(segments: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """A text and its class, with an empty line between."""
    return [segments[0], {"text": "\n\n", "trained": False}, *segments[1:]]


def _plain(text: str) -> str:
    """`text` with nothing that Markdown would read."""
    return "".join(f"\\{c}" if c in r"\`*_{}[]<>#|~$:" else c for c in text)


def _reading() -> tuple[str | None, dict[str, str] | None, str | None]:
    """What was said by hand: (task, columns, encoding), None where it is recognised."""
    task = st.session_state.get("read_task", RECOGNISED)
    encoding = st.session_state.get("read_encoding", RECOGNISED)
    roles = TASK_COLUMNS[task].names if task in TASK_COLUMNS else ()
    said = {role: str(st.session_state.get(f"read_column_{role}") or "").strip() for role in roles}
    columns = {role: name for role, name in said.items() if name and name != RECOGNISED}
    return (
        None if task == RECOGNISED else task,
        columns or None,
        None if encoding == RECOGNISED else encoding,
    )


def _reading_form(report: Mapping[str, Any]) -> None:
    with st.expander("Read it another way", expanded="error" in report and "column" in report["error"]):
        left, right = st.columns(2)
        task = left.selectbox(
            "Task", [RECOGNISED, *TASK_COLUMNS], format_func=lambda t: TASK_WORDS.get(t, t), key="read_task"
        )
        right.selectbox("Encoding", ENCODINGS, key="read_encoding")
        if task == RECOGNISED:
            st.caption("Choose a task to name its columns by hand.")
            return
        names = report.get("column_names")
        for role in TASK_COLUMNS[task].names:
            word = f"Column of the {role}" + (" (may be missing)" if role in TASK_COLUMNS[task].optional else "")
            if names:
                st.selectbox(word, [RECOGNISED, *names], key=f"read_column_{role}")
            else:
                st.text_input(word, key=f"read_column_{role}", placeholder="its name in the file")
