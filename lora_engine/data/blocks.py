"""One long text, cut in blocks, so that some of it can be held out for evaluation."""

import re

MIN_BLOCK_CHARACTERS = 256
MAX_BLOCK_CHARACTERS = 2048
AIMED_BLOCKS = 40

_PARAGRAPH = re.compile(r"(?<=\S)\n[ \t]*\n")
_LINE = re.compile(r"(?<=\S)[ \t]*\n")
_WORD = re.compile(r"(?<=\S)[ \t]")


def cut_blocks(text: str) -> list[str]:
    """Consecutive pieces of `text` whose concatenation is `text`, each a group of whole paragraphs.

    About forty blocks, but of 256 to 2048 characters each. Cuts lie before the blank line, else
    before a line end, else before a space, so a byte-level tokenizer sees the words as in the whole
    text. A short text still gives two blocks where it has a place to cut."""
    size = min(MAX_BLOCK_CHARACTERS, max(MIN_BLOCK_CHARACTERS, len(text) // AIMED_BLOCKS))
    if len(text) <= size:
        size = max(1, len(text) // 2)
    blocks: list[str] = []
    start = 0
    while start < len(text):
        end = len(text) if len(text) - start <= size * 1.25 else _cut(text, start, size)
        if blocks and not (blocks[-1].strip() and text[start:end].strip()):
            blocks[-1] += text[start:end]  # blank stretches belong to a neighbour
        else:
            blocks.append(text[start:end])
        start = end
    return blocks


def _cut(text: str, start: int, size: int) -> int:
    """Where to end the block that begins at `start`: the last good place within `size`."""
    for pattern in (_PARAGRAPH, _LINE, _WORD):
        # Below half the size a coarser cut costs more balance than it is worth.
        places = [m.start() for m in pattern.finditer(text, start + size // 2 + 1, start + size + 1)]
        if places:
            return places[-1]
    return start + size
