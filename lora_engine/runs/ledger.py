"""The ledger: one SQLite file that owns runs, steps, predictions and measurements.

Every call opens its own connection and does one short transaction, so any number of processes and
threads may use it, and a process that dies at any point leaves it as after its last call."""

import json
import math
import shutil
import sqlite3
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from lora_engine.errors import ConfigError, InputError
from lora_engine.runs.ids import check_run_id, check_sweep_id, missing, new_id
from lora_engine.runs.processes import claimed_identity, is_alive
from lora_engine.runs.records import (
    CLAIMABLE,
    RESUMABLE,
    STATUSES,
    RunRecord,
    SweepRecord,
    derive_sweep_status,
    iso,
    run_from_row,
    was_dropped,
)
from lora_engine.runs.schema import kept_open, transaction

LEDGER_FILE = "ledger.sqlite3"

_SELECT_RUNS = """
    SELECT runs.*,
        (SELECT step FROM steps WHERE run_id = runs.id ORDER BY step DESC LIMIT 1) AS last_step,
        (SELECT train_loss FROM steps WHERE run_id = runs.id ORDER BY step DESC LIMIT 1) AS last_train_loss,
        (SELECT step FROM evals WHERE run_id = runs.id ORDER BY step DESC LIMIT 1) AS last_eval_step,
        (SELECT eval_loss FROM evals WHERE run_id = runs.id ORDER BY step DESC LIMIT 1) AS last_eval_loss
    FROM runs"""


class Ledger:
    """The ledger of one home folder, which is made (mode 0700) when it is not there.

    Every method may raise LedgerError; those that take an id raise NotFoundError for one that is
    malformed or names nothing."""

    def __init__(self, home: Path | str) -> None:
        self.home = Path(home).expanduser().absolute()
        self.path = self.home / LEDGER_FILE
        with transaction(self.path, write=False):
            pass  # a ledger that cannot be used says so here

    def run_folder(self, run_id: str) -> Path:
        """Where a run keeps its files, home/runs/<id>; not made here."""
        return self.home / "runs" / check_run_id(run_id)

    def pack_folder(self, sweep_id: str) -> Path:
        """Where the checkpoints of a sweep's packs lie, home/packs/<id>; not made here."""
        return self.home / "packs" / check_sweep_id(sweep_id)

    # Making runs.

    def create_run(
        self,
        config: Mapping[str, Any],
        *,
        sweep_id: str | None = None,
        prediction: Mapping[str, Any] | None = None,
        num_steps: int,
    ) -> str:
        """A new queued run; its id."""
        with transaction(self.path, write=True) as connection:
            if sweep_id is not None:
                _require(connection, "sweeps", check_sweep_id(sweep_id))
            return _insert_run(connection, config, sweep_id, prediction, num_steps)

    def create_sweep(
        self,
        spec: Mapping[str, Any],
        runs: Iterable[tuple[Mapping[str, Any], Mapping[str, Any] | None]],
    ) -> tuple[str, list[str]]:
        """A new sweep with its queued runs [(config, prediction)], all or none: (its id, theirs in order)."""
        sweep_id = new_id("s")
        with transaction(self.path, write=True) as connection:
            connection.execute(
                "INSERT INTO sweeps (id, spec, created) VALUES (?, ?, ?)", (sweep_id, json.dumps(spec), time.time())
            )
            run_ids = [
                _insert_run(connection, config, sweep_id, prediction, int(config["train"]["steps"]))
                for config, prediction in runs
            ]
        return sweep_id, run_ids

    # What an executor and a worker tell.

    def assign_worker(self, run_ids: Sequence[str], pid: int, create_time: float) -> None:
        """Note that the process `pid` was started to do these runs; those it already has stay as they are.

        Tells a queued run that will be done from one whose worker died before reaching it."""
        identity = claimed_identity(pid, create_time)
        with transaction(self.path, write=True) as connection:
            connection.executemany(
                "UPDATE runs SET pid = ?, create_time = ?, identity = ? WHERE id = ? AND status = 'queued'",
                [(pid, create_time, identity, check_run_id(run_id)) for run_id in run_ids],
            )

    def claim_run(self, run_id: str, pid: int, create_time: float) -> bool:
        """Take a queued or interrupted run for the process `pid` that started at `create_time` (psutil).

        True for exactly one of all callers; False too for a run that is finished, cancelled or deleted."""
        identity = claimed_identity(pid, create_time)
        with transaction(self.path, write=True) as connection:
            cursor = connection.execute(
                f"""UPDATE runs SET status = 'running', pid = ?, create_time = ?, identity = ?,
                        started = COALESCE(started, ?), finished = NULL, error = NULL, progress = 'starting'
                    WHERE id = ? AND status IN ({_quoted(CLAIMABLE)})""",
                (pid, create_time, identity, time.time(), check_run_id(run_id)),
            )
            return cursor.rowcount == 1

    def record_step(
        self, run_id: str, step: int, *, train_loss: float, lr: float, grad_norm: float, tokens: int, seconds: float
    ) -> None:
        """Keep optimizer step `step` (from 1); recording it again replaces it. Tokens and seconds count from step 1."""
        row = (check_run_id(run_id), step, train_loss, lr, grad_norm, tokens, seconds)
        self._record("INSERT OR REPLACE INTO steps VALUES (?, ?, ?, ?, ?, ?, ?)", row)

    def record_steps(self, rows: Sequence[tuple[str, int, float, float, float, int, float]]) -> None:
        """Keep a step of each of several runs, all or none: (run_id, step, train_loss, lr, grad_norm, tokens,
        seconds) as `record_step` takes them."""
        checked = [(check_run_id(row[0]), *row[1:]) for row in rows]
        try:
            with transaction(self.path, write=True) as connection:
                connection.executemany("INSERT OR REPLACE INTO steps VALUES (?, ?, ?, ?, ?, ?, ?)", checked)
        except sqlite3.IntegrityError:
            for row in checked:
                self.get_run(row[0])  # raises for the one that is missing
            raise

    def record_eval(self, run_id: str, step: int, *, eval_loss: float, tokens: int = 0) -> None:
        """Keep the evaluation after `step` optimizer steps (0: before training); again replaces it."""
        self._record(
            "INSERT OR REPLACE INTO evals VALUES (?, ?, ?, ?)", (check_run_id(run_id), step, eval_loss, tokens)
        )

    def kept_open(self) -> AbstractContextManager[None]:
        """`with ledger.kept_open():` around many calls, as a worker's, makes each 100 times faster.

        Whoever closes the last connection folds SQLite's log into the file and waits for the disk
        each time; one idle connection, which locks nobody out, leaves that for the end."""
        return kept_open(self.path)

    def _record(self, statement: str, row: tuple[Any, ...]) -> None:
        try:
            with transaction(self.path, write=True) as connection:
                connection.execute(statement, row)
        except sqlite3.IntegrityError:
            raise missing("run", row[0]) from None

    def forget_after(self, run_id: str, step: int) -> None:
        """Drop the steps and evaluations after `step`: a run that resumes there will make them again."""
        with transaction(self.path, write=True) as connection:
            connection.execute("DELETE FROM steps WHERE run_id = ? AND step > ?", (check_run_id(run_id), step))
            connection.execute("DELETE FROM evals WHERE run_id = ? AND step > ?", (run_id, step))

    def note_progress(self, run_id: str, text: str) -> None:
        """Say in a few words what is being done."""
        self.note_progress_of([run_id], text)

    def note_progress_of(self, run_ids: Sequence[str], text: str) -> None:
        """`note_progress` of several runs."""
        rows = [(text, check_run_id(run_id)) for run_id in run_ids]
        with transaction(self.path, write=True) as connection:
            connection.executemany("UPDATE runs SET progress = ? WHERE id = ?", rows)

    def finish_run(
        self, run_id: str, status: str, *, result: Mapping[str, Any] | None = None, error: str | None = None
    ) -> None:
        """Close a run as done, failed or cancelled. Raises InputError for a run that is done already."""
        if status not in ("done", "failed", "cancelled"):
            raise ConfigError("status", status, "done, failed or cancelled")
        with transaction(self.path, write=True) as connection:
            cursor = connection.execute(
                """UPDATE runs SET status = ?, result = ?, error = ?, finished = ?, progress = '', cancel_requested = 0
                   WHERE id = ? AND status != 'done'""",
                (status, None if result is None else json.dumps(result), error, time.time(), check_run_id(run_id)),
            )
            if cursor.rowcount == 0:
                raise _refusal(connection, run_id, "a run that is not done")

    def cancel_requested(self, run_id: str) -> bool:
        """Whether the worker should stop: somebody asked for it, or the run was deleted."""
        with transaction(self.path, write=False) as connection:
            row = connection.execute(
                "SELECT cancel_requested FROM runs WHERE id = ?", (check_run_id(run_id),)
            ).fetchone()
        return row is None or bool(row[0])

    def cancels_requested(self, run_ids: Sequence[str]) -> set[str]:
        """Those of `run_ids` that should stop, as `cancel_requested` says of one."""
        wanted = {check_run_id(run_id) for run_id in run_ids}
        with transaction(self.path, write=False) as connection:
            going_on = connection.execute(
                "SELECT id FROM runs WHERE id IN (SELECT value FROM json_each(?)) AND NOT cancel_requested",
                (json.dumps(sorted(wanted)),),
            ).fetchall()
        return wanted - {row["id"] for row in going_on}

    # What people ask for.

    def request_cancel(self, run_id: str) -> None:
        """Cancel: at once if nobody works on the run, else as soon as its worker sees it. Nothing if it is over."""
        with transaction(self.path, write=True) as connection:
            _require(connection, "runs", check_run_id(run_id))
            connection.execute(
                "UPDATE runs SET cancel_requested = 1, progress = 'stopping' WHERE id = ? AND status = 'running'",
                (run_id,),
            )
            connection.execute(
                f"""UPDATE runs SET status = 'cancelled', finished = ?, progress = ''
                    WHERE id = ? AND status IN ({_quoted(CLAIMABLE)})""",
                (time.time(), run_id),
            )

    def requeue(self, run_id: str) -> bool:
        """Queue an interrupted, cancelled or failed run again; False if it is queued already.

        Raises InputError for one that is running or done."""
        self.reconcile()
        with transaction(self.path, write=True) as connection:
            cursor = connection.execute(
                f"""UPDATE runs SET status = 'queued', cancel_requested = 0, error = NULL, finished = NULL,
                        progress = '', pid = NULL, create_time = NULL, identity = NULL
                    WHERE id = ? AND status IN ({_quoted(RESUMABLE)})""",
                (check_run_id(run_id),),
            )
            if cursor.rowcount == 1:
                return True
            row = connection.execute("SELECT status FROM runs WHERE id = ?", (run_id,)).fetchone()
            if row is not None and row["status"] == "queued":
                return False
            raise _refusal(connection, run_id, "one that is interrupted, cancelled, failed or queued")

    def delete_run(self, run_id: str) -> None:
        """Forget a run and its folder, and its sweep with its last run. Raises InputError while it is running."""
        self.reconcile()
        with transaction(self.path, write=True) as connection:
            row = connection.execute("SELECT sweep_id FROM runs WHERE id = ?", (check_run_id(run_id),)).fetchone()
            cursor = connection.execute("DELETE FROM runs WHERE id = ? AND status != 'running'", (run_id,))
            if cursor.rowcount == 0:
                raise _refusal(connection, run_id, "a run that is not running: cancel it first")
            last = connection.execute(
                "DELETE FROM sweeps WHERE id = ? AND NOT EXISTS (SELECT 1 FROM runs WHERE sweep_id = sweeps.id)",
                (row["sweep_id"],),
            ).rowcount
        self._remove_folders([run_id], row["sweep_id"] if last else None)

    def delete_sweep(self, sweep_id: str) -> None:
        """Forget a sweep with all its runs and their folders. Raises InputError while one is running."""
        self.reconcile()
        with transaction(self.path, write=True) as connection:
            _require(connection, "sweeps", check_sweep_id(sweep_id))
            rows = connection.execute("SELECT id, status FROM runs WHERE sweep_id = ?", (sweep_id,)).fetchall()
            running = [row["id"] for row in rows if row["status"] == "running"]
            if running:
                raise InputError(f"sweep is {sweep_id!r}, whose run {running[0]!r} is running; cancel it first.")
            connection.execute("DELETE FROM runs WHERE sweep_id = ?", (sweep_id,))
            connection.execute("DELETE FROM sweeps WHERE id = ?", (sweep_id,))
        self._remove_folders([row["id"] for row in rows], sweep_id)

    def _remove_folders(self, run_ids: Sequence[str], sweep_id: str | None) -> None:
        for run_id in run_ids:
            shutil.rmtree(self.run_folder(run_id), ignore_errors=True)
        if sweep_id is not None:
            shutil.rmtree(self.pack_folder(sweep_id), ignore_errors=True)

    # Looking.

    def reconcile(self) -> list[str]:
        """Mark running runs whose worker is dead as interrupted (cancelled, where that was asked for); their ids."""
        with transaction(self.path, write=False) as connection:
            running = connection.execute(
                "SELECT id, pid, create_time, identity FROM runs WHERE status = 'running'"
            ).fetchall()
        workers = {(row["pid"], row["create_time"], row["identity"]) for row in running}
        living = {worker: is_alive(*worker) for worker in workers}  # one works on many runs: ask once
        dead = [row for row in running if not living[row["pid"], row["create_time"], row["identity"]]]
        if not dead:
            return []
        changed = []
        with transaction(self.path, write=True) as connection:
            for row in dead:
                # The same worker still: another one may have taken the run since.
                cursor = connection.execute(
                    """UPDATE runs SET progress = '', cancel_requested = 0,
                           status = CASE WHEN cancel_requested THEN 'cancelled' ELSE 'interrupted' END,
                           finished = CASE WHEN cancel_requested THEN ? END
                       WHERE id = ? AND status = 'running' AND pid IS ? AND create_time IS ?""",
                    (time.time(), row["id"], row["pid"], row["create_time"]),
                )
                if cursor.rowcount == 1:
                    changed.append(row["id"])
        return changed

    def get_run(self, run_id: str) -> RunRecord:
        """The run as it stands."""
        check_run_id(run_id)
        self.reconcile()
        with transaction(self.path, write=False) as connection:
            row = connection.execute(f"{_SELECT_RUNS} WHERE id = ?", (run_id,)).fetchone()
        if row is None:
            raise missing("run", run_id)
        return run_from_row(row)

    def find_runs(self, run_ids: Sequence[str]) -> list[RunRecord]:
        """Those of `run_ids` that are there, oldest first; unlike `get_run` without looking whether workers live."""
        wanted = json.dumps([check_run_id(run_id) for run_id in run_ids])
        with transaction(self.path, write=False) as connection:
            rows = connection.execute(
                f"{_SELECT_RUNS} WHERE id IN (SELECT value FROM json_each(?)) ORDER BY number", (wanted,)
            ).fetchall()
        return [run_from_row(row) for row in rows]

    def list_runs(self, *, sweep_id: str | None = None, status: str | None = None) -> list[RunRecord]:
        """Runs, newest first; of one sweep or one status where given."""
        if status is not None and status not in STATUSES:
            raise ConfigError("status", status, f"one of {', '.join(STATUSES)}")
        if sweep_id is not None:
            check_sweep_id(sweep_id)
        self.reconcile()
        with transaction(self.path, write=False) as connection:
            rows = connection.execute(
                f"""{_SELECT_RUNS} WHERE (:sweep_id IS NULL OR sweep_id = :sweep_id)
                    AND (:status IS NULL OR status = :status) ORDER BY number DESC""",
                {"sweep_id": sweep_id, "status": status},
            ).fetchall()
        return [run_from_row(row) for row in rows]

    def get_sweep(self, sweep_id: str) -> SweepRecord:
        """The sweep as it stands."""
        found = self._sweeps(check_sweep_id(sweep_id))
        if not found:
            raise missing("sweep", sweep_id)
        return found[0]

    def list_sweeps(self) -> list[SweepRecord]:
        """Sweeps, newest first."""
        return self._sweeps(None)

    def _sweeps(self, sweep_id: str | None) -> list[SweepRecord]:
        self.reconcile()
        with transaction(self.path, write=False) as connection:
            sweeps = connection.execute(
                "SELECT * FROM sweeps WHERE (:id IS NULL OR id = :id) ORDER BY number DESC", {"id": sweep_id}
            ).fetchall()
            runs = connection.execute(
                """SELECT id, sweep_id, status, pid, create_time, identity,
                       CASE status WHEN 'cancelled' THEN result END AS ending FROM runs
                   WHERE sweep_id IS NOT NULL AND (:id IS NULL OR sweep_id = :id) ORDER BY number""",
                {"id": sweep_id},
            ).fetchall()
        grouped: dict[str, list[sqlite3.Row]] = {row["id"]: [] for row in sweeps}
        for run in runs:
            grouped[run["sweep_id"]].append(run)
        alive: dict[tuple[Any, ...], bool] = {}  # one worker serves many runs: ask once
        return [_sweep_record(row, grouped[row["id"]], alive) for row in sweeps]

    def read_steps(self, run_ids: Sequence[str]) -> list[tuple[Any, ...]]:
        """(run_id, step, train_loss, lr, grad_norm, tokens, seconds) of these runs, ordered by run and step."""
        return self._read("SELECT * FROM steps", run_ids)

    def read_evals(self, run_ids: Sequence[str]) -> list[tuple[Any, ...]]:
        """(run_id, step, eval_loss, tokens) of these runs, ordered by run and step."""
        return self._read("SELECT * FROM evals", run_ids)

    def _read(self, select: str, run_ids: Sequence[str]) -> list[tuple[Any, ...]]:
        wanted = json.dumps([check_run_id(run_id) for run_id in run_ids])
        with transaction(self.path, write=False) as connection:
            rows = connection.execute(
                f"{select} WHERE run_id IN (SELECT value FROM json_each(?)) ORDER BY run_id, step", (wanted,)
            ).fetchall()
        return [tuple(math.nan if value is None else value for value in row) for row in rows]


def _insert_run(
    connection: sqlite3.Connection,
    config: Mapping[str, Any],
    sweep_id: str | None,
    prediction: Mapping[str, Any] | None,
    num_steps: int,
) -> str:
    run_id = new_id("r")
    connection.execute(
        "INSERT INTO runs (id, sweep_id, config, prediction, num_steps, created) VALUES (?, ?, ?, ?, ?, ?)",
        (
            run_id,
            sweep_id,
            json.dumps(config),
            None if prediction is None else json.dumps(prediction),
            num_steps,
            time.time(),
        ),
    )
    return run_id


def _require(connection: sqlite3.Connection, table: str, row_id: str) -> None:
    if connection.execute(f"SELECT 1 FROM {table} WHERE id = ?", (row_id,)).fetchone() is None:
        raise missing(table.removesuffix("s"), row_id)


def _refusal(connection: sqlite3.Connection, run_id: str, allowed: str) -> InputError:
    row = connection.execute("SELECT status FROM runs WHERE id = ?", (run_id,)).fetchone()
    if row is None:
        return missing("run", run_id)
    return InputError(f"run is {run_id!r}, which is {row['status']}; allowed: {allowed}.")


def _sweep_record(row: sqlite3.Row, runs: Sequence[sqlite3.Row], alive: dict[tuple[Any, ...], bool]) -> SweepRecord:
    def worker_lives(run: sqlite3.Row) -> bool | None:
        worker = (run["pid"], run["create_time"], run["identity"])
        if run["status"] != "queued" or run["pid"] is None:
            return None
        if worker not in alive:
            alive[worker] = is_alive(*worker)
        return alive[worker]

    return SweepRecord(
        id=row["id"],
        spec=json.loads(row["spec"]),
        created=iso(row["created"]) or "",
        created_seconds=row["created"],
        status=derive_sweep_status([_status_of(run) for run in runs], [worker_lives(run) for run in runs]),
        run_ids=tuple(run["id"] for run in runs),
    )


def _status_of(run: sqlite3.Row) -> str:
    """Its part in the sweep's status."""
    ending = json.loads(run["ending"]) if run["ending"] else None
    return "done" if was_dropped(run["status"], ending) else str(run["status"])


def _quoted(words: Sequence[str]) -> str:
    """For IN (...): our own constants, never anything from outside."""
    return ", ".join(f"'{word}'" for word in words)
