"""Integers in, integers out: shapes, parameter counts, memory, FLOPs. No torch, no transformers."""

from lora_engine.calc.catalog import CATALOG
from lora_engine.calc.compute import estimate_energy_watt_hours, estimate_step_seconds
from lora_engine.calc.fit import (
    Change,
    GpuFit,
    changes_until_it_fits,
    cheapest_changes,
    fit_gpus,
    max_batch,
    max_rank,
    max_seq_length,
)
from lora_engine.calc.flops import StepFlops, count_step_flops, estimate_step_flops
from lora_engine.calc.gpus import GPUS, Gpu, find_gpu
from lora_engine.calc.interval import Interval, calibrate, with_interval
from lora_engine.calc.memory import MemoryEstimate, estimate_memory, rank_table
from lora_engine.calc.params import ModuleCount, ParameterCount, adapter_file_bytes, count_parameters
from lora_engine.calc.shapes import LinearShape, ModelShape, load_shape, shape_from_config
from lora_engine.calc.targets import parse_targets, select_modules
from lora_engine.config import PRECISIONS

__all__ = [
    "CATALOG",
    "GPUS",
    "PRECISIONS",
    "Change",
    "Gpu",
    "GpuFit",
    "Interval",
    "LinearShape",
    "MemoryEstimate",
    "ModelShape",
    "ModuleCount",
    "ParameterCount",
    "StepFlops",
    "adapter_file_bytes",
    "calibrate",
    "changes_until_it_fits",
    "cheapest_changes",
    "count_parameters",
    "count_step_flops",
    "estimate_energy_watt_hours",
    "estimate_memory",
    "estimate_step_flops",
    "estimate_step_seconds",
    "find_gpu",
    "fit_gpus",
    "load_shape",
    "max_batch",
    "max_rank",
    "max_seq_length",
    "parse_targets",
    "rank_table",
    "select_modules",
    "shape_from_config",
    "with_interval",
]
