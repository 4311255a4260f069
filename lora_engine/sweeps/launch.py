"""Starting, resuming and cancelling sweeps.

This package does not know the ledger's or the executors' classes, only what it needs of them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from lora_engine.config import to_dict
from lora_engine.sweeps.spec import Predict, SweepSpec, expand_grid


class RunView(Protocol):
    """What is read of a run."""

    @property
    def id(self) -> str: ...
    @property
    def status(self) -> str: ...
    @property
    def dropped(self) -> bool: ...
    @property
    def waits_for_worker(self) -> bool: ...


class SweepLedger(Protocol):
    """What is asked of a ledger."""

    def create_sweep(
        self, spec: Mapping[str, Any], runs: Iterable[tuple[Mapping[str, Any], Mapping[str, Any] | None]]
    ) -> tuple[str, list[str]]: ...
    def get_sweep(self, sweep_id: str) -> Any: ...
    def list_runs(self, *, sweep_id: str | None = None) -> Sequence[RunView]: ...
    def requeue(self, run_id: str) -> bool: ...
    def request_cancel(self, run_id: str) -> None: ...


class Submitter(Protocol):
    """What is asked of an executor."""

    def submit(self, run_ids: Sequence[str]) -> None: ...


def start_sweep(ledger: SweepLedger, spec: SweepSpec, executor: Submitter, predict: Predict | None = None) -> str:
    """Write the sweep and its runs down, hand them to the executor, return the sweep's id.

    `predict` gives each run's expected cost before it begins; when it raises, nothing was written."""
    runs = [(to_dict(config), predict(config) if predict else None) for config in expand_grid(spec)]
    sweep_id, run_ids = ledger.create_sweep(spec.to_dict(), runs)
    executor.submit(run_ids)
    return sweep_id


def resume_sweep(
    ledger: SweepLedger,
    sweep_id: str,
    executor: Submitter,
    *,
    failed: bool = False,
    cancelled: bool = False,
    dropped: bool | None = None,
) -> list[str]:
    """Submit again what is left of a sweep; the run ids submitted, in grid order.

    Left are interrupted runs and queued ones that no living worker will come to; with `failed` and
    `cancelled` those too; `dropped` (None: as `cancelled`) says it of runs that early exit ended, which are then
    trained to the end of the full grid. Done and running runs are never touched, and a claim is atomic, so no
    cell is trained twice however often this is called. Raises NotFoundError."""
    ledger.get_sweep(sweep_id)
    wanted = {"interrupted", *(["failed"] if failed else []), *(["cancelled"] if cancelled else [])}
    dropped = cancelled if dropped is None else dropped
    resubmitted = []
    for run in reversed(ledger.list_runs(sweep_id=sweep_id)):
        stranded = run.status == "queued" and not run.waits_for_worker
        left = dropped if run.dropped else run.status in wanted
        if stranded or (left and ledger.requeue(run.id)):
            resubmitted.append(run.id)
    if resubmitted:
        executor.submit(resubmitted)
    return resubmitted


def cancel_sweep(ledger: SweepLedger, sweep_id: str) -> list[str]:
    """Cancel what is not over: queued runs at once, the running one after its step. Their ids, in grid order."""
    ledger.get_sweep(sweep_id)
    active = [
        run.id
        for run in reversed(ledger.list_runs(sweep_id=sweep_id))
        if run.status in ("queued", "running", "interrupted")
    ]
    # The last first: a worker that ends its run meanwhile finds nothing more to take.
    for run_id in reversed(active):
        ledger.request_cancel(run_id)
    return active
