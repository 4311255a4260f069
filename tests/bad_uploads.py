"""Twelve kinds of file that cannot be trained on, and words that their refusal must hold."""

import io
from collections.abc import Callable

import pyarrow as pa
import pyarrow.parquet as pq


def _parquet_of_200_megabytes() -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": pa.array(["a" * 2000] * 100_000)}), buffer, compression="zstd")
    return buffer.getvalue()


HEADER = b"prompt,completion\n"
# kind -> (file name, content, words of the refusal)
BAD_UPLOADS: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "empty": ("d.csv", lambda: b"", "d.csv is empty"),
    "binary": ("d.txt", lambda: bytes(i * 7919 % 256 for i in range(1, 5000)), "d.txt is not text"),
    "wrong encoding": ("d.csv", lambda: "text\nfirst\n日本語、テキスト\n".encode("shift-jis"), "save it as UTF-8"),
    "one column": ("d.csv", lambda: b"Notes\nfirst\nsecond\n", "has one column, 'Notes'"),
    "broken JSON": ("d.jsonl", lambda: b'{"prompt": "p", "completion": "c"}\n{"prompt": }\n', "broken in line 2"),
    "empty completions": ("d.csv", lambda: HEADER + b"p,\n" * 12, "All 12 rows were dropped: completion is empty"),
    "30 MB": ("d.csv", lambda: HEADER + b"p,c\n" * 7_500_000, "at most 20 MB are read"),
    "parquet of 200 MB": ("d.parquet", _parquet_of_200_megabytes, "unpacks to more than 64 MB"),
    "duplicate columns": ("d.csv", lambda: b"prompt,completion,prompt\na,b,c\n", "the column 'prompt' twice"),
    "NUL bytes": ("d.csv", lambda: HEADER + b"a,b\nc\0,d\n", "1 NUL byte"),
    "one row": ("d.csv", lambda: HEADER + b"a,b\n", "1 usable row; at least 2 are needed"),
    "rows longer than the context": (
        "d.csv",
        lambda: HEADER + b"".join(b"word " * 300 + b"%d,reply\n" % i for i in range(5)),
        "the prompt alone fills max_length",
    ),
}
