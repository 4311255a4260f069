"""One function a command: parsed arguments -> (JSON payload, text for people). No torch until a command needs it."""

from lora_engine.commands.calculator import count, data, memory
from lora_engine.commands.history import runs
from lora_engine.commands.serve import app
from lora_engine.commands.work import generate, pretrain, sweep, train

__all__ = ["app", "count", "data", "generate", "memory", "pretrain", "runs", "sweep", "train"]
