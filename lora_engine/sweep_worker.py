"""A grid's runs in one worker: packed where they can be, and halved at the rungs of early exit where that was asked.

Without early exit there is one stage, from the start to the end. With it there are three: to each rung, where the
worse half of the cells is dropped, and to the end. Killed at any point, the next worker goes on from the checkpoints
and, since a decision follows from recorded losses alone, decides as this one would have."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from lora_engine.config import RunConfig, run_config_from_dict
from lora_engine.errors import NotFoundError
from lora_engine.runs import Ledger, RunRecord, this_process
from lora_engine.sweeps.halving import Cell, judge, rung_steps
from lora_engine.sweeps.packing import ALONE, RunGroup, group_runs
from lora_engine.sweeps.spec import SweepSpec
from lora_engine.worker import Held, checkpoint_step, early_exit_of, guarded, stop, train_one

if TYPE_CHECKING:
    from lora_engine.pack_files import Entry
    from lora_engine.pack_worker import PackWorker


def work_on_sweep(ledger: Ledger, run_ids: Sequence[str], held: Held) -> list[str]:
    """Do these runs of one sweep; what became of each: done, cancelled, dropped, failed or skipped."""
    # Closing the last connection writes the log back to disk: once a sweep, not once a step.
    with ledger.kept_open():
        return list(_SweepWork(ledger, run_ids, held).go().values())


class _SweepWork:
    """`outcomes` of the runs that are over; `mine` are claimed and go on."""

    def __init__(self, ledger: Ledger, run_ids: Sequence[str], held: Held) -> None:
        self.ledger, self.run_ids, self.held = ledger, list(run_ids), held
        sweep_id = ledger.get_run(self.run_ids[0]).sweep_id
        assert sweep_id is not None
        self.sweep_id = sweep_id
        self.spec = SweepSpec.from_dict(ledger.get_sweep(sweep_id).spec)
        self.rungs = rung_steps(self.spec.base.train) if self.spec.early_exit else ()
        self.mine: set[str] = set()
        self.outcomes: dict[str, str] = {}
        self._pack_worker: PackWorker | None = None

    def go(self) -> dict[str, str]:
        for stage, until in enumerate((*self.rungs, None)):
            self._train_stage(stage, until)
            if until is not None:
                self._drop_at(until)
        if self.ledger.pack_folder(self.sweep_id).exists():
            self._packs().tidy()
        return self.outcomes

    def _train_stage(self, stage: int, until: int | None) -> None:
        """Bring every run that is not over to step `until`, or to its end."""
        for group in self._groups(until):
            runs = [(run_id, config) for run_id, config in group.runs if self._take(run_id)]
            reason = group.reason
            if len(runs) > 1 and reason is None:
                reason = self._train_packed(runs, stage, until)
            elif reason is None:
                reason = ALONE
            if reason is not None:
                for run_id, _ in runs:
                    self._train_alone(run_id, until, reason)

    def _train_packed(self, runs: Sequence[tuple[str, RunConfig]], stage: int, until: int | None) -> str | None:
        """Train the runs in packs, or say why they have to go one after another."""
        run_ids = [run_id for run_id, _ in runs]
        self.ledger.note_progress_of(run_ids, "starting torch" if self._pack_worker is None else "starting")
        packs = self._packs()
        answer: list[tuple[list[Entry], str | None]] = []
        if not self._guarded(run_ids, lambda: answer.append(packs.compose(runs, stage, until, self.mine))):
            return None
        entries, reason = answer[0]
        for entry in entries:
            pending = [run_id for run_id in entry.run_ids if run_id in self.mine]
            if len(entry.run_ids) == 1:
                for run_id in pending:
                    self._train_alone(run_id, until, entry.reason if entry.size == 1 else ALONE)
                if until is None:
                    packs.files.drop(entry)
            elif pending:
                self._guarded(pending, partial(packs.train, entry, until, pending))
        return reason

    def _guarded(self, run_ids: list[str], work: Callable[[], None]) -> bool:
        """Whether `work` went well; else those of `run_ids` that are left have failed and say why."""

        def answering() -> str:
            work()
            return "ok"

        if guarded(self.ledger, run_ids, answering) == "ok":
            return True
        self.held.session().forget()
        for run_id in run_ids:
            self._over(run_id, "failed")
        return False

    def _packs(self) -> "PackWorker":
        if self._pack_worker is None:
            from lora_engine.pack_worker import PackWorker

            session = self.held.session()
            self._pack_worker = PackWorker(self.ledger, self.sweep_id, session, self.spec.packed, self._over)
        return self._pack_worker

    def _groups(self, until: int | None) -> list[RunGroup]:
        left = [run_id for run_id in self.run_ids if run_id not in self.outcomes and self._races(run_id, until)]
        configs = {run_id: config for run_id in left if (config := self._config(run_id)) is not None}
        if self.spec.packed == "never":
            return [RunGroup(tuple(configs.items()), "packed is never")]
        return group_runs(configs.items())

    def _config(self, run_id: str) -> RunConfig | None:
        try:
            return run_config_from_dict(self.ledger.get_run(run_id).config)
        except NotFoundError:  # deleted meanwhile
            self.outcomes[run_id] = "skipped"
            return None

    def _take(self, run_id: str) -> bool:
        """Claim a run, or see that it is still wanted."""
        if run_id not in self.mine:
            if not self.ledger.claim_run(run_id, *this_process()):
                self.outcomes[run_id] = "skipped"
                return False
            self.mine.add(run_id)
        elif self.ledger.cancel_requested(run_id):
            self._over(run_id, stop(self.ledger, self.ledger.get_run(run_id)))
            return False
        return True

    def _over(self, run_id: str, outcome: str) -> None:
        self.mine.discard(run_id)
        self.outcomes[run_id] = outcome

    def _races(self, run_id: str, until: int | None) -> bool:
        """A run that early exit dropped before was resumed to be trained to its end."""
        return until is None or not any(map(early_exit_of, self.ledger.find_runs([run_id])))

    def _step(self, run_id: str) -> int:
        from lora_engine.jobs import CHECKPOINT

        row = self._pack_worker.rows.get(run_id) if self._pack_worker else None
        return row.state.step if row else checkpoint_step(self.ledger.run_folder(run_id) / CHECKPOINT)

    def _train_alone(self, run_id: str, until: int | None, reason: str) -> None:
        more = {"pack": {"size": 1, "reason": reason}}

        def work() -> str:
            if self.ledger.pack_folder(self.sweep_id).exists():
                self._packs().let_go(run_id)
            if until is not None and self._step(run_id) >= until:
                return "waiting"
            return train_one(self.ledger, run_id, self.held.session(), until=until, more=more)

        outcome = guarded(self.ledger, [run_id], work)
        if outcome == "waiting":
            self.ledger.note_progress(run_id, f"at step {until}, until all are compared")
        else:
            self._over(run_id, outcome)

    def _drop_at(self, step: int) -> None:
        """Of all cells of the sweep that came to `step`, end the worse half."""
        records = {record.id: record for record in self.ledger.list_runs(sweep_id=self.sweep_id)}
        candidates = [run_id for run_id, record in records.items() if _was_in(record, step)]
        losses = {run_id: loss for run_id, at, loss, _ in self.ledger.read_evals(candidates) if at == step}
        by_cell: dict[Cell, list[float]] = {}
        for run_id, loss in losses.items():
            by_cell.setdefault(_cell(records[run_id]), []).append(loss)
        standings = judge(by_cell)
        for run_id in sorted(self.mine & losses.keys(), key=self.run_ids.index):
            standing = standings[_cell(records[run_id])]
            if standing.kept or early_exit_of(records[run_id]) or self._step(run_id) != step:
                continue
            facts = {
                "step": step,
                "steps": records[run_id].num_steps,
                "eval_loss": losses[run_id],
                "rank": standing.rank,
                "of": standing.of,
            }
            if self._pack_worker:
                self._pack_worker.let_go(run_id)
            self.ledger.finish_run(run_id, "cancelled", result={"early_exit": facts}, error=None)
            self._over(run_id, "dropped")


def _was_in(record: RunRecord, step: int) -> bool:
    """Whether the run was still in the race at `step`: not dropped at an earlier rung."""
    dropped_at = (early_exit_of(record).get("early_exit") or {}).get("step")
    return record.status != "failed" and (dropped_at is None or dropped_at >= step)


def _cell(record: RunRecord) -> Cell:
    method, train = record.config["method"], record.config["train"]
    return int(method["r"]), float(method["lora_alpha"]), float(train["lr"])
