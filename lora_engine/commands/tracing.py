"""trace: a step's memory and counts from the real model, run on fake tensors."""

import argparse
import os
import sys
import time

from lora_engine.commands.requests import Output, method_of
from lora_engine.config import TrainConfig
from lora_engine.text import bytes_text, table_text


def trace(arguments: argparse.Namespace) -> Output:
    """Trace one training step of MODEL; nothing is downloaded, read or allocated but its config."""
    method = method_of(arguments)
    train = TrainConfig(
        precision=arguments.precision,
        batch_size=arguments.batch,
        max_length=arguments.seq,
        optimizer=arguments.optimizer,
        checkpointing=arguments.checkpointing,
        accumulation=arguments.accumulation,
        device=arguments.device,
    )
    # What libraries say while they trace is nobody's answer.
    os.environ.setdefault("TORCH_LOGS", "-all")
    from lora_engine.training.trace import load_config, trace_memory

    began = time.perf_counter()
    config = load_config(arguments.model)
    print("Tracing a step on tensors without contents ...", file=sys.stderr)
    traced = trace_memory(config, method, train, attention=arguments.attention)
    seconds = time.perf_counter() - began
    note = "Traced on fake tensors with the CPU's kernels"
    note += "." if arguments.device == "cpu" else "; dropout and attention as CUDA has them."
    payload = {
        "model": arguments.model,
        "total_parameters": traced.total_parameters,
        "trainable_parameters": traced.trainable_parameters,
        "terms": traced.terms,
        "peak_bytes": traced.peak_bytes,
        "peak_phase": traced.peak_phase,
        "phases": {phase: sum(terms.values()) for phase, terms in traced.phases.items()},
        "seconds": seconds,
        "notes": [note],
    }
    lines = [
        f"{arguments.model}: {bytes_text(traced.peak_bytes)} at the peak ({traced.peak_phase}; traced in "
        f"{seconds:.1f} s); {traced.trainable_parameters:,} of {traced.total_parameters:,} parameters are trained.",
        table_text(["term", "memory"], [[name, bytes_text(value)] for name, value in traced.terms.items()]),
    ]
    return payload, "\n\n".join(lines)
