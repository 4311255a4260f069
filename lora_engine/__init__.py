"""LoRA Explorer's engine. Importing it never imports torch.

    from lora_engine import LoraConfig, count_parameters, estimate_memory, load_shape

    shape = load_shape("meta-llama/Llama-3.1-8B")
    count_parameters(shape, LoraConfig(r=8)).trainable_parameters

Training runs in worker processes: `lora_engine.runs.Ledger` and `lora_engine.executors.LocalExecutor`."""

from lora_engine.calc import count_parameters, estimate_memory, load_shape, select_modules
from lora_engine.config import DataConfig, FullConfig, LoraConfig, RunConfig, TrainConfig
from lora_engine.errors import LoraExplorerError

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
