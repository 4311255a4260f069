"""What one more configuration in a pack costs in memory: measured, and as predicted before."""

from dataclasses import replace
from typing import Any

from benchmarks.workload import PAD_ID, Workload, model_shape

from lora_engine.calc.memory import Settings
from lora_engine.calc.pack import estimate_pack
from lora_engine.config import LoraConfig
from lora_engine.training.pack import train_pack
from lora_engine.training.pack_step import PackRow

SIZES = (1, 2, 4, 8)


def run_pack_memory(*, smoke: bool = False, repeats: int = 0) -> dict[str, Any]:  # noqa: ARG001
    """Peak of a packed step at N = 1, 2, 4, 8, ranks 8 and ranks 2 to 8 in turn, at 32, 128 and 512 tokens each."""
    cells = []
    for batch_size, length in ((1, 32), (2, 64), (4, 128)):
        for ranks in ((8,), (2, 8, 4)):
            work = Workload(steps=3, batch_size=batch_size, length=length)
            if smoke:
                work = replace(work, model="tiny Llama", batch_size=1, length=16)
            cells.append(cell(work, ranks))
    return {"cells": cells}


def cell(work: Workload, ranks: tuple[int, ...]) -> dict[str, Any]:
    base = work.load()
    sizes: list[dict[str, Any]] = []
    for size in SIZES:
        methods = [LoraConfig(r=ranks[i % len(ranks)]) for i in range(size)]
        rows = [
            PackRow(name=str(i), config=replace(work.configs[i % work.num_configs], method=method))
            for i, method in enumerate(methods)
        ]
        done = train_pack(base, rows, work.rows, [], pad_id=PAD_ID)
        measured = done[0].state.notes["pack"]["peak_bytes"]
        predicted = predict(work, methods)
        before = sizes[-1] if sizes else None
        step = size - before["size"] if before else 1
        sizes.append(
            {
                "size": size,
                "measured_bytes": measured,
                "predicted_bytes": predicted,
                "off_percent": 100 * (measured / predicted - 1),
                "measured_added_bytes": (measured - before["measured_bytes"]) / step if before else None,
                "predicted_added_bytes": (predicted - before["predicted_bytes"]) / step if before else None,
            }
        )
    return {"tokens": work.tokens, "ranks": list(ranks), "kind": done[0].state.peak_kind, "sizes": sizes}


def predict(work: Workload, methods: list[LoraConfig]) -> int:
    """The calculator's figure, before anything is trained."""
    settings = Settings(
        precision=work.precision,
        batch_size=work.batch_size,
        seq_length=work.length,
        labelled_share=(work.length - 1) / work.length,  # the first token of a row is nobody's next
    )
    padded = LoraConfig(r=max(method.r for method in methods))
    return estimate_pack(model_shape(work.model), padded, len(methods), settings).peak_bytes
