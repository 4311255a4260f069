"""The exact text a model is trained on, and which of it is trained.

Two formats. With a chat template, the template's own; without one (or when it is unusable)

    prompt <blank line> completion <end token>

where only completion and end token are trained. Plain texts are trained whole, from the start token
(for tokenizers that add one) to the end token; a block of one long text has no end token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import TemplateError

from lora_engine.data.schema import Example, Part
from lora_engine.data.tokenizer import TextTokenizer

_FIRST_STAND_IN = 0xF0000  # a private-use plane: no text means anything by these characters


@dataclass(frozen=True)
class Piece:
    """A stretch of rendered text. `literal`: someone's text that only spells a special token."""

    text: str
    trained: bool
    literal: bool = False


@dataclass(frozen=True)
class Rendered:
    """An example's text in pieces; `problem` says why the chat template was not used for it."""

    pieces: tuple[Piece, ...]
    problem: str | None = None


def render_example(example: Example, tokenizer: TextTokenizer) -> list[tuple[str, bool]]:
    """(text, trained) pieces; neighbours differ in `trained`, joined they are the exact text."""
    merged: list[tuple[str, bool]] = []
    for piece in render_pieces(example, tokenizer).pieces:
        if merged and merged[-1][1] == piece.trained:
            merged[-1] = (merged[-1][0] + piece.text, piece.trained)
        else:
            merged.append((piece.text, piece.trained))
    return merged


def render_prompt(text: str, tokenizer: TextTokenizer, task: str) -> str:
    """What generation continues: `text` as a user's turn, or as it is for the task "text"."""
    return "".join(piece.text for piece in prompt_pieces(text, tokenizer, task))


def render_pieces(example: Example, tokenizer: TextTokenizer) -> Rendered:
    """`render_example` with the spellings of special tokens in people's text kept apart."""
    if any(part.role == "text" for part in example.parts):
        pieces = [piece for part in example.parts for piece in _literal_pieces(part.text, part.trained, tokenizer)]
        start = [] if example.block and example.row > 1 else _start(tokenizer)
        end = [] if example.block else _end(tokenizer)
        return Rendered((*start, *pieces, *end))
    problem = tokenizer.template_problem
    if tokenizer.template is not None:
        pieces_or_none, problem = _with_template(example.parts, tokenizer)
        if pieces_or_none is not None:
            return Rendered(tuple(pieces_or_none))
    return Rendered(tuple(_plain(example.parts, tokenizer)), problem)


def prompt_pieces(text: str, tokenizer: TextTokenizer, task: str) -> tuple[Piece, ...]:
    """`render_prompt` in pieces."""
    if task == "text":
        return (*_start(tokenizer), *_literal_pieces(text, False, tokenizer))
    if tokenizer.template is not None:
        stand_ins = _StandIns([text], tokenizer)
        message = {"role": "user", "content": stand_ins.hide(text)}
        rendered = tokenizer.template.render([message], add_generation_prompt=True)
        return tuple(stand_ins.show(rendered, trained=False))
    return (*_start(tokenizer), *_literal_pieces(text + "\n\n", False, tokenizer))


def _start(tokenizer: TextTokenizer) -> list[Piece]:
    return [Piece(tokenizer.bos_token, trained=False)] if tokenizer.adds_bos else []


def _end(tokenizer: TextTokenizer) -> list[Piece]:
    return [Piece(tokenizer.eos_token, trained=True)] if tokenizer.eos_token else []


def _plain(parts: Sequence[Part], tokenizer: TextTokenizer) -> list[Piece]:
    """Turns with a blank line between them, an end token after each reply."""
    pieces = _start(tokenizer)
    for i, part in enumerate(parts):
        text = part.text if part.trained else part.text + "\n\n"
        pieces += _literal_pieces(text, part.trained, tokenizer)
        if part.trained:
            pieces += _end(tokenizer)
            if i + 1 < len(parts):
                pieces.append(Piece("\n\n", trained=False))
    return pieces


def _with_template(parts: Sequence[Part], tokenizer: TextTokenizer) -> tuple[list[Piece] | None, str | None]:
    """(pieces, None), or (None, why the template does not fit these turns)."""
    assert tokenizer.template is not None
    stand_ins = _StandIns([part.text for part in parts], tokenizer)
    messages = [{"role": part.role, "content": stand_ins.hide(part.text)} for part in parts]
    try:
        spans = _spans(messages, tokenizer)
    except TemplateError as error:
        return None, f"The chat template refuses a conversation ({error})"
    if spans is None:
        return None, "The chat template changes earlier turns when later ones are added"
    return [piece for text, trained in spans for piece in stand_ins.show(text, trained)], None


def _spans(messages: list[dict[str, str]], tokenizer: TextTokenizer) -> list[tuple[str, bool]] | None:
    assert tokenizer.template is not None
    try:
        return tokenizer.template.spans(messages)
    except TemplateError:
        # Some templates know no system role: what it says then opens the first user turn.
        if len(messages) > 1 and messages[0]["role"] == "system" and messages[1]["role"] == "user":
            first = {"role": "user", "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
            return tokenizer.template.spans([first, *messages[2:]])
        raise


def _literal_pieces(text: str, trained: bool, tokenizer: TextTokenizer) -> list[Piece]:
    """Someone's text, the spellings of special tokens in it apart as literal pieces."""
    if tokenizer.special_pattern is None:
        return [Piece(text, trained)]
    pieces: list[Piece] = []
    position = 0
    for match in tokenizer.special_pattern.finditer(text):
        if match.start() > position:
            pieces.append(Piece(text[position : match.start()], trained))
        pieces.append(Piece(match.group(), trained, literal=True))
        position = match.end()
    if position < len(text):
        pieces.append(Piece(text[position:], trained))
    return pieces


class _StandIns:
    """Hides spellings of special tokens in people's text behind one unused character each.

    The template then writes its own special tokens among text that has none, and what it trims or
    moves is still told apart from what people wrote."""

    def __init__(self, texts: Sequence[str], tokenizer: TextTokenizer) -> None:
        self._pattern = tokenizer.special_pattern
        found = {m.group() for text in texts for m in self._pattern.finditer(text)} if self._pattern else set()
        used = set("".join(texts)) if found else set()
        unused = (chr(code) for code in range(_FIRST_STAND_IN, 0xFFFFE) if chr(code) not in used)
        self._spelling = dict(zip(unused, sorted(found), strict=False))
        self._stand_in = {spelling: letter for letter, spelling in self._spelling.items()}

    def hide(self, text: str) -> str:
        if not self._spelling or self._pattern is None:
            return text
        return self._pattern.sub(lambda match: self._stand_in[match.group()], text)

    def show(self, text: str, trained: bool) -> list[Piece]:
        pieces: list[Piece] = []
        if not self._spelling:
            return [Piece(text, trained)]
        start = 0
        for i, letter in enumerate(text):
            if letter in self._spelling:
                if i > start:
                    pieces.append(Piece(text[start:i], trained))
                pieces.append(Piece(self._spelling[letter], trained, literal=True))
                start = i + 1
        if start < len(text):
            pieces.append(Piece(text[start:], trained))
        return pieces
