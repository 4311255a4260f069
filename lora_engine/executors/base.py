"""What an executor can do."""

from collections.abc import Sequence
from typing import Protocol


class Executor(Protocol):
    """Gets queued runs of one ledger done, somewhere."""

    def submit(self, run_ids: Sequence[str]) -> None:
        """Have these runs done, in this order. What becomes of them is in the ledger."""

    def cancel(self, run_id: str) -> None:
        """Ask for the run to stop; it keeps a checkpoint and can be resumed."""
