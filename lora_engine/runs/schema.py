"""The ledger's tables, their numbered migrations, and how a connection is opened.

`PRAGMA user_version` says how many of MIGRATIONS a file has seen. A published migration is never
edited: a change of the schema is a new entry at the end."""

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lora_engine.errors import LedgerError

BUSY_SECONDS = 30.0

# Times are epoch seconds (UTC), JSON is text. NaN is stored as NULL, which is what SQLite makes of it.
_VERSION_1 = (
    """
    CREATE TABLE sweeps (
        number  INTEGER PRIMARY KEY,              -- order of creation
        id      TEXT NOT NULL UNIQUE,
        spec    TEXT NOT NULL,                    -- JSON: what the grid is made of
        created REAL NOT NULL
    )""",
    """
    CREATE TABLE runs (
        number           INTEGER PRIMARY KEY,     -- order of creation; of a sweep's cells: grid order
        id               TEXT NOT NULL UNIQUE,
        sweep_id         TEXT REFERENCES sweeps (id),
        status           TEXT NOT NULL DEFAULT 'queued'
            CHECK (status IN ('queued', 'running', 'done', 'failed', 'cancelled', 'interrupted')),
        config           TEXT NOT NULL,           -- JSON: RunConfig
        prediction       TEXT,                    -- JSON: what it was expected to cost, before it began
        result           TEXT,                    -- JSON: what it cost and gave, once done
        error            TEXT,                    -- one sentence, if it failed
        progress         TEXT NOT NULL DEFAULT '',
        num_steps        INTEGER NOT NULL,
        cancel_requested INTEGER NOT NULL DEFAULT 0,
        created          REAL NOT NULL,
        started          REAL,                    -- first claim
        finished         REAL,
        -- The worker: while running the one that has it, while queued the one that will come to it.
        pid              INTEGER,
        create_time      REAL,                    -- of the process, as psutil gives it
        identity         TEXT                     -- of the process, where the system has a steadier one
    )""",
    "CREATE INDEX runs_by_sweep ON runs (sweep_id, number)",
    "CREATE INDEX runs_by_status ON runs (status)",
    """
    CREATE TABLE steps (
        run_id     TEXT NOT NULL REFERENCES runs (id) ON DELETE CASCADE,
        step       INTEGER NOT NULL,              -- optimizer steps done, from 1
        train_loss REAL,                          -- nats per trained token
        lr         REAL,
        grad_norm  REAL,                          -- before clipping
        tokens     INTEGER NOT NULL,              -- read so far
        seconds    REAL NOT NULL,                 -- spent in steps so far
        PRIMARY KEY (run_id, step)
    ) WITHOUT ROWID""",
    """
    CREATE TABLE evals (
        run_id    TEXT NOT NULL REFERENCES runs (id) ON DELETE CASCADE,
        step      INTEGER NOT NULL,               -- 0: before training
        eval_loss REAL,                           -- nats per trained token
        tokens    INTEGER NOT NULL,
        PRIMARY KEY (run_id, step)
    ) WITHOUT ROWID""",
)

MIGRATIONS: tuple[tuple[str, ...], ...] = (_VERSION_1,)


@contextmanager
def transaction(path: Path, *, write: bool) -> Iterator[sqlite3.Connection]:
    """One connection with one transaction in it: committed at the end, rolled back on an error, closed.

    Raises LedgerError when the file is from a newer version, damaged, or locked for BUSY_SECONDS."""
    try:
        connection = _open(path)
        try:
            # IMMEDIATE: a writer waits for its turn here and cannot be refused half way.
            connection.execute("BEGIN IMMEDIATE" if write else "BEGIN")
            yield connection
            connection.execute("COMMIT")
        finally:
            connection.close()  # also rolls back what was not committed
    except sqlite3.IntegrityError:
        raise
    except sqlite3.Error as error:
        raise LedgerError(f"ledger is {path.name!r}, which cannot be used: {error}.") from error


@contextmanager
def kept_open(path: Path) -> Iterator[None]:
    """Hold one idle connection during the block: `Ledger.kept_open` says what for."""
    connection = _open(path)
    try:
        connection.execute("SELECT COUNT(*) FROM sweeps").fetchone()  # a first read takes its place in the log
        yield
    finally:
        connection.close()


def _open(path: Path) -> sqlite3.Connection:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)
    try:
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA synchronous = NORMAL")  # with WAL: a crash of the machine may lose the last steps
        connection.execute("PRAGMA foreign_keys = ON")
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version != len(MIGRATIONS):
            _migrate(connection, path, version)
    except BaseException:
        connection.close()
        raise
    return connection


def _migrate(connection: sqlite3.Connection, path: Path, version: int) -> None:
    """Bring the file to the newest version, all or nothing; of several processes one does it."""
    if version < len(MIGRATIONS):
        _switch_to_wal(connection)
        connection.execute("BEGIN IMMEDIATE")
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        for statements in MIGRATIONS[version:]:
            for statement in statements:
                connection.execute(statement)
        if version <= len(MIGRATIONS):
            version = len(MIGRATIONS)
            connection.execute(f"PRAGMA user_version = {version}")
        connection.execute("COMMIT")
    if version > len(MIGRATIONS):
        raise LedgerError(
            f"ledger is {path.name!r} of version {version}; allowed: up to version {len(MIGRATIONS)}, "
            "so update LoRA Explorer or choose another home folder."
        )


def _switch_to_wal(connection: sqlite3.Connection) -> None:
    # The busy timeout does not cover this switch, so wait by hand when several processes start at once.
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        with suppress(sqlite3.OperationalError):
            connection.execute("PRAGMA journal_mode = WAL")
            return
        if time.monotonic() > deadline:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        time.sleep(0.02)
