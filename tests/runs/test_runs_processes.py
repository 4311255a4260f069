"""Many processes and threads on one ledger, and ledgers of other versions."""

import multiprocessing
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lora_engine.config import DataConfig, RunConfig, to_dict
from lora_engine.errors import LedgerError
from lora_engine.runs import Ledger, schema, this_process

CONFIG = to_dict(RunConfig(data=DataConfig(path="a.csv")))
SPAWN = multiprocessing.get_context("spawn")


def open_and_create(home: str, barrier: object, out: object) -> None:
    barrier.wait()  # type: ignore[attr-defined]
    out.put(Ledger(home).create_run(CONFIG, num_steps=1))  # type: ignore[attr-defined]


def claim_all(home: str, run_ids: list[str], barrier: object, out: object) -> None:
    ledger = Ledger(home)
    barrier.wait()  # type: ignore[attr-defined]
    for run_id in run_ids:
        if ledger.claim_run(run_id, *this_process()):
            ledger.record_step(run_id, 1, train_loss=1.0, lr=1.0, grad_norm=1.0, tokens=1, seconds=1.0)
            ledger.finish_run(run_id, "done", result={})
            out.put(run_id)  # type: ignore[attr-defined]
    out.put(None)  # type: ignore[attr-defined]


def in_processes(number: int, target: object, *arguments: object) -> list[str]:
    """What `number` processes put out, each ended by one None."""
    barrier, out = SPAWN.Barrier(number), SPAWN.Queue()
    processes = [SPAWN.Process(target=target, args=(*arguments, barrier, out)) for _ in range(number)]  # type: ignore[arg-type]
    for process in processes:
        process.start()
    found: list[str] = []
    ended = 0
    while ended < number:
        item = out.get(timeout=60)
        if item is not None:
            found.append(item)
        ended += item is None or target is open_and_create
    for process in processes:
        process.join()
        assert process.exitcode == 0
    out.close()
    out.join_thread()
    return found


def test_eight_processes_claim_twenty_runs_once_each(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    _, run_ids = ledger.create_sweep({}, [(CONFIG, None)] * 20)
    assert sorted(in_processes(8, claim_all, str(tmp_path), run_ids)) == run_ids
    assert {record.status for record in ledger.list_runs()} == {"done"}
    assert len(ledger.read_steps(run_ids)) == 20


def test_eight_processes_make_the_same_ledger_at_once(tmp_path: Path) -> None:
    run_ids = in_processes(8, open_and_create, str(tmp_path / "home"))
    assert len(set(run_ids)) == 8
    assert {record.id for record in Ledger(tmp_path / "home").list_runs()} == set(run_ids)


def test_threads_write_while_others_read(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    run_ids = [ledger.create_run(CONFIG, num_steps=20) for _ in range(4)]

    def write(run_id: str) -> None:
        for number in range(1, 21):
            ledger.record_step(run_id, number, train_loss=1.0, lr=1.0, grad_norm=1.0, tokens=1, seconds=1.0)

    with ThreadPoolExecutor(8) as pool:
        writers = [pool.submit(write, run_id) for run_id in run_ids]
        readers = [pool.submit(ledger.list_runs) for _ in range(40)]
        for writer in writers:
            writer.result()
        for reader in readers:
            reader.result()
    assert [row[1] for row in ledger.read_steps(run_ids)] == [*range(1, 21)] * 4


# Version 1 as it was published. Never edit: it stands for the ledgers that people have.
VERSION_1 = """
CREATE TABLE sweeps (number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, spec TEXT NOT NULL, created REAL NOT NULL);
CREATE TABLE runs (
    number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, sweep_id TEXT REFERENCES sweeps (id),
    status TEXT NOT NULL DEFAULT 'queued'
        CHECK (status IN ('queued', 'running', 'done', 'failed', 'cancelled', 'interrupted')),
    config TEXT NOT NULL, prediction TEXT, result TEXT, error TEXT, progress TEXT NOT NULL DEFAULT '',
    num_steps INTEGER NOT NULL, cancel_requested INTEGER NOT NULL DEFAULT 0, created REAL NOT NULL, started REAL,
    finished REAL, pid INTEGER, create_time REAL, identity TEXT);
CREATE INDEX runs_by_sweep ON runs (sweep_id, number);
CREATE INDEX runs_by_status ON runs (status);
CREATE TABLE steps (
    run_id TEXT NOT NULL REFERENCES runs (id) ON DELETE CASCADE, step INTEGER NOT NULL, train_loss REAL, lr REAL,
    grad_norm REAL, tokens INTEGER NOT NULL, seconds REAL NOT NULL, PRIMARY KEY (run_id, step)) WITHOUT ROWID;
CREATE TABLE evals (
    run_id TEXT NOT NULL REFERENCES runs (id) ON DELETE CASCADE, step INTEGER NOT NULL, eval_loss REAL,
    tokens INTEGER NOT NULL, PRIMARY KEY (run_id, step)) WITHOUT ROWID;
INSERT INTO runs (id, status, config, result, num_steps, created)
    VALUES ('r0mfz8k2qabcdef', 'done', '{"model": "embedded"}', '{"steps": 1}', 1, 1700000000.0);
INSERT INTO steps VALUES ('r0mfz8k2qabcdef', 1, 2.5, 0.001, 1.0, 8, 0.1);
PRAGMA user_version = 1;
"""


def make_file(path: Path, script: str) -> None:
    connection = sqlite3.connect(path)
    try:
        connection.executescript(f"PRAGMA journal_mode = WAL; {script}")
    finally:
        connection.close()


def test_a_ledger_of_version_1_opens(tmp_path: Path) -> None:
    make_file(tmp_path / "ledger.sqlite3", VERSION_1)
    ledger = Ledger(tmp_path)
    record = ledger.get_run("r0mfz8k2qabcdef")
    assert (record.status, record.result, record.last_train_loss) == ("done", {"steps": 1}, 2.5)
    assert ledger.claim_run(ledger.create_run(CONFIG, num_steps=1), *this_process())


def test_an_older_ledger_is_brought_up_to_date_and_keeps_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_file(tmp_path / "ledger.sqlite3", VERSION_1)
    newer = (*schema.MIGRATIONS, *[()] * (1 - len(schema.MIGRATIONS)), ("ALTER TABLE runs ADD COLUMN note TEXT",))
    monkeypatch.setattr(schema, "MIGRATIONS", newer)
    Ledger(tmp_path)
    with schema.transaction(tmp_path / "ledger.sqlite3", write=False) as connection:
        assert connection.execute("PRAGMA user_version").fetchone()[0] == len(newer)
        assert tuple(connection.execute("SELECT id, note FROM runs").fetchone()) == ("r0mfz8k2qabcdef", None)


def test_a_migration_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Ledger(tmp_path)
    path, version = tmp_path / "ledger.sqlite3", len(schema.MIGRATIONS)
    broken = (*schema.MIGRATIONS, ("CREATE TABLE extra (x)", "CREATE nonsense"))
    monkeypatch.setattr(schema, "MIGRATIONS", broken)
    with pytest.raises(LedgerError, match="syntax error"):
        Ledger(tmp_path)
    monkeypatch.undo()
    with schema.transaction(path, write=False) as connection:
        assert connection.execute("PRAGMA user_version").fetchone()[0] == version
        assert connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'extra'").fetchone() is None


def test_a_newer_ledger_is_refused_in_one_sentence(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    make_file(tmp_path / "ledger.sqlite3", "PRAGMA user_version = 999;")
    for call in (lambda: Ledger(tmp_path), ledger.list_runs, lambda: ledger.create_run(CONFIG, num_steps=1)):
        with pytest.raises(LedgerError, match=r"of version 999; allowed: up to version \d+, so update LoRA Explorer"):
            call()


def test_a_damaged_ledger_is_named(tmp_path: Path) -> None:
    (tmp_path / "ledger.sqlite3").write_bytes(b"not a database at all, but long enough to be looked at" * 20)
    with pytest.raises(LedgerError, match="cannot be used: file is not a database"):
        Ledger(tmp_path)
