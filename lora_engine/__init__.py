"""LoRA Explorer's engine. Importing it never imports torch.

    from lora_engine import LoraConfig, count_parameters, estimate_memory, load_shape

    shape = load_shape("meta-llama/Llama-3.1-8B")
    count_parameters(shape, LoraConfig(r=8)).trainable_parameters

Training runs in worker processes: `lora_engine.runs.Ledger` and `lora_engine.executors.LocalExecutor`."""

from typing import TYPE_CHECKING, Any

from lora_engine.config import DataConfig, FullConfig, LoraConfig, RunConfig, TrainConfig
from lora_engine.errors import LoraExplorerError

if TYPE_CHECKING:
    from lora_engine.calc import count_parameters, estimate_memory, load_shape, select_modules

__version__ = "0.1.0"

__all__ = [
    "DataConfig",
    "FullConfig",
    "LoraConfig",
    "LoraExplorerError",
    "RunConfig",
    "TrainConfig",
    "__version__",
    "count_parameters",
    "estimate_memory",
    "load_shape",
    "select_modules",
]


def __getattr__(name: str) -> Any:
    """The calculator's functions, imported when they are asked for: the server and the workers start without them."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lora_engine import calc

    return getattr(calc, name)
