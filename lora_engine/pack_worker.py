"""A pack as the ledger sees it: every row's steps, cancels and ends, checkpoints, and what goes on after kill -9."""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from lora_engine.config import RunConfig, run_config_from_dict
from lora_engine.jobs import CHECKPOINT
from lora_engine.jobs_pack import (
    finish_row,
    heads_of,
    make_row,
    measure_alone,
    model_refusal,
    plan_size,
    texts_after,
    texts_before,
)
from lora_engine.pack_files import Entry, PackFiles, Saved, load_single, save_single
from lora_engine.runs import Ledger
from lora_engine.session import Loaded, Session
from lora_engine.training.loop import LoopState, StepReport
from lora_engine.training.memory_limits import is_out_of_memory
from lora_engine.training.pack import PackCallbacks, train_pack
from lora_engine.training.pack_step import PackRow
from lora_engine.worker import finish, stop


class PackWorker:
    """Packs of one sweep in one worker. `rows` are those that it holds; `over` is told how each run ended: done or
    cancelled."""

    def __init__(
        self, ledger: Ledger, sweep_id: str, session: Session, packed: str, over: Callable[[str, str], None]
    ) -> None:
        self.ledger, self.session, self.packed, self._over = ledger, session, packed, over
        self.files = PackFiles(ledger.pack_folder(sweep_id))
        self.rows: dict[str, PackRow] = {}
        self.alone: dict[tuple[str, int], LoopState | None] = {}
        self.before: dict[int, str] = {}
        self.heads: dict[int, Mapping[str, Tensor]] = {}

    def compose(
        self, runs: Sequence[tuple[str, RunConfig]], stage: int, until: int | None, mine: set[str]
    ) -> tuple[list[Entry], str | None]:
        """Packs of these runs: as planned where a plan is, else planned now. (packs, None), or ([], why they go one
        after another). Runs that reached `until` are left out."""
        run_ids = [run_id for run_id, _ in runs]
        loaded = self.session.open(runs[0][1], lambda text: self._note(run_ids, text), any_head=True)
        refused = model_refusal(loaded, runs[0][1])
        if refused:
            return [], refused
        new = heads_of(loaded, [config for _, config in runs if config.train.seed not in self.heads])
        self.before |= texts_before(loaded, new)
        self.heads |= new
        rows = [self._row(run_id, config) for run_id, config in runs]
        self.files.forget()
        left = {row.name: row for row in rows if until is None or row.state.step < until}
        kept = self._planned(left, stage, mine)
        placed = {run_id for entry in kept for run_id in entry.run_ids}
        fresh = [row for name, row in left.items() if name not in placed]
        if not fresh:
            return kept, None
        like = self._sized(loaded, fresh, stage)
        for row in fresh:
            row.pack = 0
        return kept + self.files.add(_even(fresh, like.size), like), None

    def _planned(self, left: dict[str, PackRow], stage: int, mine: set[str]) -> list[Entry]:
        """Entries of this stage of which all that is not over is this worker's to do."""
        kept = []
        for entry in self.files.entries():
            if entry.stage != stage or not left.keys() & set(entry.run_ids):
                continue
            unfinished = [run_id for run_id in entry.run_ids if run_id in mine or self._is_open(run_id)]
            if all(run_id in mine for run_id in unfinished):
                kept.append(entry)
        return kept

    def _is_open(self, run_id: str) -> bool:
        found = [record for record in self.ledger.find_runs([run_id]) if not record.is_final]
        return bool(found)

    def _sized(self, loaded: Loaded, rows: Sequence[PackRow], stage: int) -> Entry:
        """What an entry of these rows is like. A size is chosen once, in the first stage."""
        names = {row.name for row in rows}
        for entry in self.files.entries():
            if entry.stage < stage and names & set(entry.run_ids):
                return Entry("", (), stage, entry.size, entry.reason, entry.times_faster)
        self._note(sorted(names), "finding the size of packs")
        plan = plan_size(loaded, rows, self.packed)
        return Entry("", (), stage, plan.size, plan.reason, plan.times_faster)

    def _row(self, run_id: str, config: RunConfig) -> PackRow:
        if run_id not in self.rows:
            saved = self.saved(run_id)
            self.ledger.forget_after(run_id, saved.state.step if saved else -1)
            self.rows[run_id] = make_row(run_id, config, saved, self.heads)
        return self.rows[run_id]

    def saved(self, run_id: str) -> Saved | None:
        """Where the run goes on from: of its pack's checkpoint and its own the later one."""
        found = [self.files.load(run_id), load_single(self.ledger.run_folder(run_id) / CHECKPOINT)]
        known = [saved for saved in found if saved is not None]
        return max(known, key=lambda saved: saved.state.step, default=None)

    def let_go(self, run_id: str) -> None:
        """Write the run's own checkpoint, so that it can go on by itself."""
        row = self.rows.pop(run_id, None)
        if row is None:
            saved = self.files.load(run_id)
            path = self.ledger.run_folder(run_id) / CHECKPOINT
            single = load_single(path)
            if saved is None or (single is not None and single.state.step >= saved.state.step):
                return
            config = run_config_from_dict(self.ledger.get_run(run_id).config)
            row = make_row(run_id, config, saved, {})
        save_single(self.ledger.run_folder(run_id) / CHECKPOINT, row)

    def train(self, entry: Entry, until: int | None, pending: list[str]) -> None:
        """Bring a pack to `until` or its end. `pending`, its runs that are not over, loses those that are then."""
        rows = [self.rows[run_id] for run_id in entry.run_ids if run_id in self.rows]
        loaded = self.session.open(rows[0].config, any_head=True)
        for row in rows:
            self._measure(loaded, row)
        watch = _Watch(self, rows, pending)
        calls = PackCallbacks(
            on_step=watch.on_step,
            on_eval=watch.on_eval,
            should_stop=watch.should_stop,
            on_pack=watch.on_pack,
            on_halved=watch.on_halved,
        )
        loaded.model.train()
        try:
            train_pack(
                loaded.model,
                rows,
                loaded.train_rows,
                loaded.eval_rows,
                pad_id=loaded.tokenizer.pad_id,
                until_step=until,
                callbacks=calls,
                checkpoint=lambda all_rows: self.files.save(entry, all_rows),
            )
        finally:
            watch.flush()
        loaded.model.eval()
        watch.close_stopped()
        going_on = [row for row in rows if row.name in pending]
        # Before any row is over: should this worker be killed now, the others would form another pack.
        self.files.save(entry, going_on)
        done = [row for row in going_on if row.state.step >= row.config.train.steps]
        self._finish(loaded, entry, done, pending)
        self._note(pending, f"at step {until}, until all are compared")
        if until is None:
            self.files.drop(entry)

    def _finish(self, loaded: Loaded, entry: Entry, rows: Sequence[PackRow], pending: list[str]) -> None:
        if not rows:
            return
        self._note([row.name for row in rows], "writing a sample and the adapter")
        texts = texts_after(loaded, rows)
        for i, row in enumerate(rows):
            result = finish_row(
                loaded,
                row,
                self.ledger.run_folder(row.name),
                before=self.before.get(row.config.train.seed),
                after=texts[i] if texts else None,
                alone=self.alone.get(_rank_key(row)),
            )
            result["pack"] = result["pack"] | {"reason": entry.reason, "alone_step_seconds": _alone_step(row, entry)}
            finish(self.ledger, self.ledger.get_run(row.name), result)
            self.over(row.name, "done", pending)

    def tidy(self) -> None:
        """Keep of the plan what somebody may go on with: other runs have their results, or checkpoints of their own."""
        wanted = ("queued", "running", "interrupted", "failed")
        self.files.keep(lambda run_id: any(run.status in wanted for run in self.ledger.find_runs([run_id])))

    def over(self, run_id: str, outcome: str, pending: list[str]) -> None:
        """A run has ended, well or because it was told to."""
        pending.remove(run_id)
        self.rows.pop(run_id, None)
        self._over(run_id, outcome)

    def _measure(self, loaded: Loaded, row: PackRow) -> None:
        key = _rank_key(row)
        if key in self.alone:
            return
        self.ledger.note_progress(row.name, f"measuring one run of rank {row.method.r}")
        try:
            self.alone[key] = measure_alone(loaded, row.config)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self.alone[key] = None

    def _note(self, run_ids: Sequence[str], text: str) -> None:
        self.ledger.note_progress_of(run_ids, text)


class _Watch:
    """The ledger's side of one `train_pack`: steps of all rows in one transaction, one look for cancels a step."""

    def __init__(self, worker: PackWorker, rows: Sequence[PackRow], pending: list[str]) -> None:
        self.worker, self.rows, self.pending = worker, rows, pending
        self._together: list[str] = []
        self._cancelled: set[str] = set()
        self._steps: list[tuple[str, int, float, float, float, int, float]] = []

    def on_pack(self, rows: Sequence[PackRow]) -> None:
        self.close_stopped()
        self._together = [row.name for row in rows]
        others = len(rows) - 1
        self.worker._note(self._together, f"training with {others} others" if others else "training")

    def on_halved(self, rows: Sequence[PackRow]) -> None:
        self.worker._note([row.name for row in rows], "memory ran out: going on in two halves")

    def on_step(self, row: PackRow, report: StepReport) -> None:
        self._steps.append(
            (row.name, report.step, report.train_loss, report.lr, report.grad_norm, report.tokens, report.seconds)
        )
        if len(self._steps) >= len(self._together):
            self.flush()

    def on_eval(self, row: PackRow, step: int, loss: float) -> None:
        self.flush()
        self.worker.ledger.record_eval(row.name, step, eval_loss=loss, tokens=0)

    def should_stop(self, row: PackRow) -> bool:
        if row.name == self._together[0]:
            self._cancelled = self.worker.ledger.cancels_requested(self._together)
        return row.name in self._cancelled

    def flush(self) -> None:
        """Write the steps that were heard of."""
        if self._steps:
            self.worker.ledger.record_steps(self._steps)
            self._steps = []

    def close_stopped(self) -> None:
        """Rows that were told to stop have left the pack: each keeps a checkpoint of its own."""
        for row in self.rows:
            if row.state.stopped and row.name in self.pending:
                worker = self.worker
                worker.let_go(row.name)
                stop(worker.ledger, worker.ledger.get_run(row.name))
                worker.over(row.name, "cancelled", self.pending)


def _alone_step(row: PackRow, entry: Entry) -> float | None:
    """Seconds that a step of the row would have taken by itself: its share of the pack's, which were as slow as the
    machine was busy, times what sharing was found to gain."""
    if entry.times_faster is None or not row.state.step:
        return None
    return entry.times_faster * row.state.seconds / row.state.step


def _rank_key(row: PackRow) -> tuple[str, int]:
    """Runs of one key take the same memory; a pack's rows differ in nothing else that counts."""
    return row.config.model, row.method.r


def _even(rows: Sequence[PackRow], size: int) -> list[list[PackRow]]:
    """Packs of at most `size` rows, as even as can be, in order."""
    num_packs = -(-len(rows) // max(1, size))
    each, more = divmod(len(rows), num_packs)
    packs, start = [], 0
    for i in range(num_packs):
        stop_at = start + each + (i < more)
        packs.append(list(rows[start:stop_at]))
        start = stop_at
    return packs
