"""A model's chat template, rendered in a sandbox, and where its assistant turns lie."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = Mapping[str, str]

# Templates may print today's date; a run that is resumed tomorrow must see the same tokens.
_FIXED_DATE = datetime(2024, 7, 26)


class _GenerationBlock(Extension):
    """`{% generation %}...{% endgeneration %}` marks assistant text for transformers; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it a plain set)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


@dataclass(frozen=True)
class ChatTemplate:
    """A compiled template with the tokens it writes."""

    compiled: Any
    bos_token: str
    eos_token: str

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """The text of `messages`. Raises jinja2.TemplateError, also when the template refuses them."""
        try:
            return str(
                self.compiled.render(
                    messages=list(messages),
                    add_generation_prompt=add_generation_prompt,
                    bos_token=self.bos_token,
                    eos_token=self.eos_token,
                    tools=None,
                    documents=None,
                )
            )
        except TemplateError:
            raise
        except Exception as error:  # a template runs arbitrary expressions: TypeError, KeyError, OverflowError ...
            raise TemplateError(str(error)) from error

    def spans(self, messages: Sequence[Message]) -> list[tuple[str, bool]] | None:
        """Rendered text in pieces (text, written by the assistant), None when it cannot be told.

        An assistant turn is what message i adds to the prompt that asks for it: the rendering of
        the messages before it with the generation prompt must be a prefix of the rendering with it,
        and that a prefix of the whole. White space after the turn's end token is not the assistant's."""
        full = self.render(messages, add_generation_prompt=False)
        pieces: list[tuple[str, bool]] = []
        position = 0
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.render(messages[:i], add_generation_prompt=True)
            through = full if i + 1 == len(messages) else self.render(messages[: i + 1], add_generation_prompt=False)
            if not (through.startswith(before) and full.startswith(through) and len(before) >= position):
                return None
            reply = through[len(before) :]
            text = reply.rstrip() if len(reply.rstrip()) > len(message["content"].rstrip()) else reply
            if message["content"].strip() not in text:
                return None
            pieces += [(full[position : len(before)], False), (text, True)]
            position = len(before) + len(text)
        if position < len(full):
            pieces.append((full[position:], False))
        return [piece for piece in pieces if piece[0]]


def compile_template(source: str, bos_token: str, eos_token: str) -> tuple[ChatTemplate | None, str | None]:
    """(template, None), or (None, what is wrong with it).

    A template that cannot tell a reply from its prompt is refused here once, for all examples, so
    that training and generation use the same format."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _FIXED_DATE.strftime
    try:
        template = ChatTemplate(environment.from_string(source), bos_token, eos_token)
        probe = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
        if template.spans(probe) is None:
            return None, "The chat template does not keep a prompt unchanged when its reply is added"
    except TemplateError as error:
        return None, f"The chat template cannot be used ({error})"
    return template, None


def _raise_exception(message: str) -> None:
    raise TemplateError(message)
