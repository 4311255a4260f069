"""Every error the engine raises on purpose.

    LoraExplorerError                 catch this to catch them all
    |-- InputError                    the request is wrong (CLI exit code 2)
    |   |-- ConfigError               an argument is outside its allowed values
    |   |-- ModelConfigError          a config.json cannot be understood
    |   |   `-- UnknownArchitectureError  its model_type is none that the formulas know
    |   |-- TargetError               target modules match nothing, or nothing that LoRA fits
    |   |-- DataError                 a file cannot be read or would train on nothing
    |   |-- ModelLoadError            a base model cannot be loaded safely
    |   `-- NotFoundError             a run, sweep or file that is not there
    |-- NotMergeableError             the method adds modules that no weight can absorb
    |-- RunFailedError                the work itself failed (CLI exit code 1)
    `-- LedgerError                   the ledger is from a newer version or damaged

Messages are one sentence that names the argument, the value received and what is allowed;
they are shown to people as they are.
"""


class LoraExplorerError(Exception):
    """Base of the tree."""


class InputError(LoraExplorerError):
    """The request is wrong; nothing was changed."""


class ConfigError(InputError, ValueError):
    """An argument is outside its allowed values."""

    def __init__(self, argument: str, value: object, allowed: str) -> None:
        self.argument, self.value, self.allowed = argument, value, allowed
        super().__init__(f"{argument} is {value!r}; allowed: {allowed}.")


class ModelConfigError(InputError, ValueError):
    """A model's config.json cannot be understood."""


class UnknownArchitectureError(ModelConfigError):
    """A model_type that the formulas do not know; the model itself may still be built and measured."""


class TargetError(InputError, ValueError):
    """Target modules match nothing, or nothing the method can adapt."""


class DataError(InputError, ValueError):
    """A dataset cannot be read, or would train on nothing."""


class ModelLoadError(InputError):
    """A base model cannot be loaded, or not safely."""


class NotFoundError(InputError, LookupError):
    """A run, sweep or file that does not exist."""


class NotMergeableError(LoraExplorerError):
    """The method adds modules that no existing weight can absorb."""


class RunFailedError(LoraExplorerError):
    """The work itself failed; the ledger says why."""


class LedgerError(LoraExplorerError):
    """The ledger is from a newer version, or damaged."""
