"""Integers in, integers out: shapes, parameter counts, memory, FLOPs. No torch, no transformers."""

from lora_engine.calc.catalog import CATALOG
from lora_engine.calc.flops import estimate_step_flops
from lora_engine.calc.gpus import GPUS, Gpu, GpuFit, fit_gpus
from lora_engine.calc.memory import MemoryEstimate, estimate_memory, rank_table
from lora_engine.calc.params import ModuleCount, ParameterCount, adapter_file_bytes, count_parameters
from lora_engine.calc.shapes import LinearShape, ModelShape, load_shape, shape_from_config
from lora_engine.calc.targets import parse_targets, select_modules
from lora_engine.config import PRECISIONS

__all__ = [
    "CATALOG",
    "GPUS",
    "PRECISIONS",
    "Gpu",
    "GpuFit",
    "LinearShape",
    "MemoryEstimate",
    "ModelShape",
    "ModuleCount",
    "ParameterCount",
    "adapter_file_bytes",
    "count_parameters",
    "estimate_memory",
    "estimate_step_flops",
    "fit_gpus",
    "load_shape",
    "parse_targets",
    "rank_table",
    "select_modules",
    "shape_from_config",
]
