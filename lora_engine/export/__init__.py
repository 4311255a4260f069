"""Files that other tools load."""

from lora_engine.export.peft_format import ADAPTER_CONFIG, ADAPTER_WEIGHTS, load_adapter, save_adapter
from lora_engine.export.weights import METHOD_CONFIG, TRAINED_WEIGHTS, is_whole_model, load_trained, save_trained

__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_WEIGHTS",
    "METHOD_CONFIG",
    "TRAINED_WEIGHTS",
    "is_whole_model",
    "load_adapter",
    "load_trained",
    "save_adapter",
    "save_trained",
]
