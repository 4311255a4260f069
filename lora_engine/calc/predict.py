"""What a run is expected to cost, written down before it starts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_engine.calc.classifier import as_classifier
from lora_engine.calc.devices import kernels_of
from lora_engine.calc.memory import estimate_memory
from lora_engine.calc.params import TASK_HEADS, adapter_file_bytes, count_parameters
from lora_engine.calc.shapes import load_shape
from lora_engine.calc.structure import ModelShape
from lora_engine.config import RunConfig
from lora_engine.errors import ConfigError


@dataclass(frozen=True)
class RowFacts:
    """What memory needs to know of a dataset: tokens of its longest row, trained tokens of a row on average, and of
    texts with labels the number of classes."""

    longest_tokens: int
    trained_tokens: float
    num_classes: int = 0


def row_facts(report: Mapping[str, Any]) -> RowFacts:
    """The facts in a dataset report's dict (`longest_tokens, trained_tokens, examples, classes`)."""
    trained = report["trained_tokens"] / report["examples"]
    return RowFacts(report["longest_tokens"], trained, len(report["classes"]))


def shape_to_train(shape: ModelShape, num_classes: int = 0) -> ModelShape:
    """The model that a run trains: a classifier of `num_classes`, or without classes the language model itself. A base
    without any head, as encoders are shared, can only become a classifier; of two classes where nothing says more."""
    if num_classes:
        return as_classifier(shape, num_classes)
    headed = shape.output_head or any(linear.name.partition(".")[0] in TASK_HEADS for linear in shape.linears)
    return shape if headed else as_classifier(shape, 2)


def predict_run(config: RunConfig, rows: RowFacts | None = None) -> dict[str, Any]:
    """Counts and bytes for `config`: `trainable_parameters, total_parameters, peak_bytes, low_bytes,
    high_bytes, terms, adapter_bytes`. Without `rows`, every row fills max_length and is trained on. Bytes are those of
    the kernels that the run will use on this machine.

    With classes it is the classifier that is trained, its new head along with every method.

    Raises ModelConfigError, TargetError, and ConfigError for rows longer than the model's context."""
    shape = shape_to_train(load_shape(config.model), rows.num_classes if rows else 0)
    if shape.max_positions and config.train.max_length > shape.max_positions:
        allowed = f"at most {shape.max_positions}, the context of this model"
        raise ConfigError("max_length", config.train.max_length, allowed)
    longest = config.train.max_length
    if rows is not None:
        longest = min(longest, -(-rows.longest_tokens // 8) * 8)  # batches are padded to a multiple of 8
    count = count_parameters(shape, config.method)
    memory = estimate_memory(
        shape,
        config.method,
        precision=config.train.precision,
        batch_size=config.train.batch_size,
        seq_length=longest,
        optimizer=config.train.optimizer,
        checkpointing=config.train.checkpointing,
        accumulation=config.train.accumulation,
        labelled_share=1.0 if rows is None else min(1.0, rows.trained_tokens / longest),
        device=kernels_of(config.train.device),
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
