"""A model folder's tokenizer without transformers: tokenizer.json, its special tokens, its chat template."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from lora_engine.data.template import ChatTemplate, compile_template
from lora_engine.errors import ModelLoadError


@dataclass(frozen=True)
class TextTokenizer:
    """Text to token ids and back.

    `backend` understands special tokens written in a text, `literal_backend` takes the same
    characters as plain text. `eos_id` is None for a model without an end token; `pad_id` is always a
    valid id. `special_pattern` finds the special tokens' spellings, `special_ids` are their ids."""

    backend: Any = field(repr=False)
    literal_backend: Any = field(repr=False)
    bos_token: str
    eos_token: str
    bos_id: int | None
    eos_id: int | None
    pad_id: int
    adds_bos: bool
    special_pattern: re.Pattern[str] | None
    special_ids: frozenset[int]
    template: ChatTemplate | None
    template_problem: str | None

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; special tokens written in it count as such, none is added."""
        return list(self.backend.encode(text, add_special_tokens=False).ids)

    def encode_literal(self, text: str) -> list[int]:
        """Ids of `text` as plain characters: never a special token, whatever it spells."""
        ids = list(self.literal_backend.encode(text, add_special_tokens=False).ids)
        if self.special_ids.isdisjoint(ids):
            return ids
        # A vocabulary may reach a special token's spelling without parsing it: take it letter by letter.
        if len(text) > 1:
            return [token for letter in text for token in self.encode_literal(letter)]
        return [token for token in ids if token not in self.special_ids]

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts, on all cores."""
        return [list(e.ids) for e in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_literal_many(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode_literal` of many texts, on all cores."""
        batch = self.literal_backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [
            list(e.ids) if self.special_ids.isdisjoint(e.ids) else self.encode_literal(text)
            for e, text in zip(batch, texts, strict=True)
        ]

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """Text of `ids`, special tokens spelled out unless `skip_special`."""
        return str(self.backend.decode(list(ids), skip_special_tokens=skip_special))


def load_tokenizer(folder: str | Path) -> TextTokenizer:
    """The tokenizer of a model folder. Raises ModelLoadError when tokenizer.json is missing or damaged."""
    root = Path(folder)
    path = root / "tokenizer.json"
    if not path.is_file():
        raise ModelLoadError(f"model is {str(folder)!r}; allowed: a folder with tokenizer.json.")
    try:
        raw = path.read_text(encoding="utf-8")
        added = json.loads(raw).get("added_tokens") or []
        backend, literal = Tokenizer.from_str(raw), Tokenizer.from_str(raw)
    except Exception as error:  # the Rust library raises plain Exception
        raise ModelLoadError(f"{path} is not a readable tokenizer: {str(error).splitlines()[0]}.") from error
    for tokenizer in (backend, literal):
        tokenizer.no_truncation()
        tokenizer.no_padding()
    config = _read_config(root / "special_tokens_map.json") | _read_config(root / "tokenizer_config.json")
    names = {kind: _token_text(config.get(f"{kind}_token")) for kind in ("bos", "eos", "pad", "unk")}
    ids = {kind: backend.token_to_id(name) if name else None for kind, name in names.items()}
    eos_id = ids["eos"] if ids["eos"] is not None else _eos_of_model(root)
    eos_token = names["eos"] if ids["eos"] is not None else _spelling(backend, eos_id)
    pad_id = next((i for i in (ids["pad"], eos_id, ids["unk"]) if i is not None), 0)

    special = _special_spellings(added, names)
    literal.encode_special_tokens = True
    _treat_as_special(literal, special)
    first = backend.encode("a").ids[:1]
    template, problem = _template(root, config, names["bos"], eos_token)
    return TextTokenizer(
        backend=backend,
        literal_backend=literal,
        bos_token=names["bos"],
        eos_token=eos_token,
        bos_id=ids["bos"],
        eos_id=eos_id,
        pad_id=pad_id,
        adds_bos=bool(first) and first[0] == ids["bos"],
        special_pattern=_pattern(special, added),
        special_ids=frozenset(i for s in special if (i := backend.token_to_id(s)) is not None and i != ids["unk"]),
        template=template,
        template_problem=problem,
    )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ModelLoadError(f"{path} is not valid JSON: {error}.") from error
    return value if isinstance(value, dict) else {}


def _token_text(value: Any) -> str:
    """A special token is written as a text, as {"content": ...}, or as null."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""


def _eos_of_model(root: Path) -> int | None:
    value = _read_config(root / "config.json").get("eos_token_id")
    if isinstance(value, list):
        value = value[0] if value else None
    return value if isinstance(value, int) else None


def _spelling(backend: Any, token_id: int | None) -> str:
    return "" if token_id is None else backend.id_to_token(token_id) or ""


def _special_spellings(added: list[dict[str, Any]], names: dict[str, str]) -> list[str]:
    """Spellings that user text must not turn into control tokens.

    Beside the tokens that say they are special: those the config names, and control tokens such as
    <|im_end|> that some tokenizers list as ordinary. Runs of blanks and the like stay ordinary."""
    spellings = {name for kind, name in names.items() if name and kind != "unk"}
    for token in added:
        content = str(token.get("content", ""))
        if content and (token.get("special") or re.fullmatch(r"<\|[^\s<>]+\|>|<[/\w]*(?:turn|eos|bos)[\w]*>", content)):
            spellings.add(content)
    return sorted(spellings - {""}, key=lambda spelling: (-len(spelling), spelling))


def _treat_as_special(tokenizer: Any, special: list[str]) -> None:
    """Mark `special` as special in `tokenizer`, where `encode_special_tokens` then makes them plain text."""
    known = [spelling for spelling in special if tokenizer.token_to_id(spelling) is not None]
    if known:
        tokenizer.add_special_tokens(known)


def _pattern(special: list[str], added: list[dict[str, Any]]) -> re.Pattern[str] | None:
    if not special:
        return None
    # A token that is matched after normalisation may be spelled in any case.
    normalized = any(token.get("normalized") and token.get("content") in special for token in added)
    return re.compile("|".join(map(re.escape, special)), re.IGNORECASE if normalized else 0)


def _template(root: Path, config: dict[str, Any], bos: str, eos: str) -> tuple[ChatTemplate | None, str | None]:
    """(template, problem): chat_template.jinja before tokenizer_config.json, as transformers does."""
    path = root / "chat_template.jinja"
    source: Any = path.read_text(encoding="utf-8") if path.is_file() else config.get("chat_template")
    if isinstance(source, list):
        by_name = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        source = by_name.get("default")
    if not isinstance(source, str) or not source.strip():
        return None, None
    return compile_template(source, bos, eos)
