"""Executors: they get runs done by worker processes, and are seen through the ledger only. Torch-free."""

from lora_engine.executors.base import Executor
from lora_engine.executors.local import InlineExecutor, LocalExecutor

__all__ = ["Executor", "InlineExecutor", "LocalExecutor"]
