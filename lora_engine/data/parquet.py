"""Parquet under a byte and a row cap: a 23 KB file can unpack to 200 MB."""

from collections.abc import Callable, Sequence
from io import BytesIO
from typing import Any

from lora_engine.data.tables import MAX_ROWS, Table
from lora_engine.data.tasks import check_column_names
from lora_engine.errors import DataError

MAX_UNPACKED_BYTES = 64_000_000
_BATCH_ROWS = 256


def read_parquet(data: bytes, name: str, choose: Callable[[Sequence[str]], Sequence[str]]) -> Table:
    """The columns that `choose(column names)` names, read batch by batch. Raises DataError.

    Text is read as dictionary indices, so a repeated long text is counted before it is unpacked."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        plain = pq.ParquetFile(BytesIO(data))
        names = tuple(plain.schema_arrow.names)
        check_column_names(names, name)
        wanted = list(choose(names))
        _check_metadata(plain.metadata, wanted, name)
        leaves = [plain.schema.column(i) for i in range(len(plain.schema))]
        texts = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
        file = pq.ParquetFile(BytesIO(data), read_dictionary=texts)
        rows: list[tuple[int, dict[str, Any] | str]] = []
        unpacked = 0
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=wanted):
            unpacked += sum(_unpacked_bytes(column) for column in batch.columns)
            if unpacked > MAX_UNPACKED_BYTES:
                raise _too_large(name, f"stopped at row {len(rows):,}")
            for row in batch.to_pylist():
                rows.append((len(rows) + 1, row))
    except (pa.ArrowException, OSError, ValueError, NotImplementedError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{name} is not a readable Parquet file; write it again, or use .csv or .jsonl.") from error
    if not rows:
        raise DataError(f"{name} has no rows; add at least 2.")
    return Table(names, rows)


def _check_metadata(metadata: Any, wanted: Sequence[str], name: str) -> None:
    if metadata.num_rows > MAX_ROWS:
        raise DataError(f"{name} has {metadata.num_rows:,} rows; at most {MAX_ROWS:,} are read: keep a part of them.")
    claimed = 0
    for group in range(metadata.num_row_groups):
        for i in range(metadata.num_columns):
            column = metadata.row_group(group).column(i)
            if column.path_in_schema.split(".")[0] in wanted:
                claimed += column.total_uncompressed_size
    if claimed > MAX_UNPACKED_BYTES:
        raise _too_large(name, f"{claimed / 1e6:.0f} MB by its own account")


def _too_large(name: str, detail: str) -> DataError:
    return DataError(
        f"{name} unpacks to more than {MAX_UNPACKED_BYTES / 1e6:.0f} MB ({detail}); keep a part of its rows."
    )


def _unpacked_bytes(array: Any) -> int:
    """Bytes of `array` once its dictionaries are written out."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_dictionary(array.type):
        lengths = pc.binary_length(array.dictionary).take(array.indices)
        return int(pc.sum(lengths).as_py() or 0) + 4 * len(array)
    if pa.types.is_struct(array.type):
        return sum(_unpacked_bytes(child) for child in array.flatten())
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        return _unpacked_bytes(array.flatten()) + 4 * len(array)
    return int(array.nbytes)
