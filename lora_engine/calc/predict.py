"""What a run is expected to cost, written down before it starts."""

from typing import Any

from lora_engine.calc.memory import estimate_memory
from lora_engine.calc.params import adapter_file_bytes, count_parameters
from lora_engine.calc.shapes import load_shape
from lora_engine.config import RunConfig


def predict_run(config: RunConfig, *, labelled_share: float = 1.0) -> dict[str, Any]:
    """Counts and bytes for `config`: `trainable_parameters, total_parameters, peak_bytes, low_bytes,
    high_bytes, terms, adapter_bytes`. Raises ModelConfigError, TargetError.

    `labelled_share` is the share of tokens that are trained on; logits are taken on those alone."""
    shape = load_shape(config.model)
    count = count_parameters(shape, config.method)
    memory = estimate_memory(
        shape,
        config.method,
        precision=config.train.precision,
        batch_size=config.train.batch_size,
        seq_length=config.train.max_length,
        optimizer=config.train.optimizer,
        checkpointing=config.train.checkpointing,
        labelled_share=labelled_share,
    )
    return {
        "trainable_parameters": count.trainable_parameters,
        "total_parameters": count.total_parameters,
        "peak_bytes": memory.peak_bytes,
        "low_bytes": memory.low_bytes,
        "high_bytes": memory.high_bytes,
        "terms": dict(memory.terms),
        "adapter_bytes": adapter_file_bytes(shape, config.method),
    }
