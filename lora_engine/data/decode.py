"""From bytes to text: size, binary files, NUL bytes, encodings. Nothing is guessed silently."""

import codecs
from pathlib import Path

from lora_engine.errors import DataError, NotFoundError

MAX_UPLOAD_BYTES = 20_000_000

_SIGNATURES = (
    (b"PK\x03\x04", "a ZIP or Excel file; export the sheet as .csv and use that"),
    (b"\xd0\xcf\x11\xe0", "an old Excel or Word file; export the sheet as .csv and use that"),
    (b"PAR1", "a Parquet file; give it the ending .parquet"),
    (b"%PDF", "a PDF; copy its text into a .txt file"),
    (b"\x1f\x8b", "a gzip archive; unpack it first"),
    (b"BZh", "a bzip2 archive; unpack it first"),
    (b"7z\xbc\xaf", "a 7-Zip archive; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard archive; unpack it first"),
    (b"SQLite format 3", "an SQLite database; export a table as .csv and use that"),
    (b"\x89PNG", "a PNG image; a file with text is needed"),
    (b"\xff\xd8\xff", "a JPEG image; a file with text is needed"),
    (b"\x7fELF", "a program; a file with text is needed"),
)
_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# Control characters that no text has; tab, line feed, form feed, carriage return and escape may occur.
_CONTROLS = bytes(c for c in range(1, 32) if c not in (9, 10, 11, 12, 13, 27)) + b"\x7f"


def read_bytes(path: Path) -> bytes:
    """The file's bytes. Raises NotFoundError, and DataError when it is empty, too large or unreadable."""
    if not path.exists():
        raise NotFoundError(f"data is {str(path)!r}; there is no such file.")
    if not path.is_file():
        raise DataError(f"data is {str(path)!r}; allowed: a file, not a folder.")
    size = path.stat().st_size
    if size > MAX_UPLOAD_BYTES:
        raise DataError(
            f"{path.name} has {size / 1e6:.1f} MB; at most {MAX_UPLOAD_BYTES / 1e6:.0f} MB are read: "
            "keep a part of its rows."
        )
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path.name} cannot be read: {error.strerror or error}.") from error
    if not data.strip():
        raise DataError(f"{path.name} is empty; use a file with at least 2 rows.")
    return data


def decode_text(data: bytes, name: str, encoding: str | None = None) -> tuple[str, str, list[str]]:
    """(text, encoding, warnings) of `data`; `name` is for messages.

    The order: `encoding` when given, else the byte-order mark, else strict UTF-8, else cp1252 with
    a warning. Line ends become "\\n". Raises DataError."""
    warnings: list[str] = []
    if encoding is not None:
        text = _decode_as(data, name, encoding)
    else:
        _refuse_binary(data, name)
        marked = next((codec for mark, codec in _BOMS if data.startswith(mark)), None)
        if marked is not None:
            encoding = marked
            text = _decode_as(data, name, encoding)
        else:
            _refuse_nul_bytes(data, name)
            try:
                text, encoding = data.decode("utf-8"), "utf-8"
            except UnicodeDecodeError as error:
                text, encoding = _decode_cp1252(data, name, error), "cp1252"
                line = data.count(b"\n", 0, error.start) + 1
                warnings.append(
                    f"{name} is not UTF-8 (line {line}) and was read as Windows-1252 (cp1252); "
                    "if letters look wrong in the preview, choose another encoding."
                )
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(f"{name} has a NUL character in line {line}; remove it and try again.")
    text = text.replace("\r\n", "\n").replace("\r", "\n").removeprefix("\ufeff")
    if not text.strip():
        raise DataError(f"{name} is empty; use a file with at least 2 rows.")
    return text, encoding, warnings


def _decode_as(data: bytes, name: str, encoding: str) -> str:
    try:
        return data.decode(encoding)
    except LookupError as error:
        raise DataError(f"encoding is {encoding!r}; allowed: a text encoding such as utf-8 or cp1252.") from error
    except UnicodeError as error:
        start = getattr(error, "start", 0)
        line = data.count(b"\n", 0, start) + 1
        raise DataError(
            f"{name} is not {encoding} (line {line}); choose the encoding it was saved in, or save it as UTF-8."
        ) from error


def _decode_cp1252(data: bytes, name: str, utf8_error: UnicodeDecodeError) -> str:
    try:
        return data.decode("cp1252")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, utf8_error.start) + 1
        raise DataError(
            f"{name} is neither UTF-8 nor Windows-1252 (line {line}); save it as UTF-8, or choose its encoding."
        ) from error


def _refuse_binary(data: bytes, name: str) -> None:
    for signature, what in _SIGNATURES:
        if data.startswith(signature):
            raise DataError(f"{name} is not text: it is {what}.")
    if any(data.startswith(mark) for mark, _ in _BOMS):
        return
    head = data[:65536]
    controls = len(head) - len(head.translate(None, _CONTROLS))
    if controls > max(8, len(head) // 100):
        raise DataError(f"{name} is not text but a binary file; use .txt, .md, .csv, .tsv, .json, .jsonl or .parquet.")


def _refuse_nul_bytes(data: bytes, name: str) -> None:
    first = data.find(b"\0")
    if first < 0:
        return
    head = data[:65536]
    for offset, codec in ((1, "utf-16-le"), (0, "utf-16-be")):
        half = head[offset::2]
        if half.count(b"\0") > 0.6 * len(half):
            raise DataError(
                f"{name} looks like UTF-16 without its mark; choose the encoding {codec}, or save as UTF-8."
            )
    line = data.count(b"\n", 0, first) + 1
    count = data.count(b"\0")
    raise DataError(
        f"{name} has {count:,} NUL byte{'s' if count > 1 else ''}, the first in line {line}; "
        "remove them or export the file again as UTF-8."
    )
