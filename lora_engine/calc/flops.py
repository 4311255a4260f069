"""Floating-point operations of a training step: a multiply and an add are two."""

from lora_engine.calc.params import trained_lora_parameters
from lora_engine.calc.structure import ModelShape
from lora_engine.calc.targets import select_linears
from lora_engine.config import LoraConfig, MethodConfig
from lora_engine.errors import ConfigError


def estimate_step_flops(shape: ModelShape, method: MethodConfig, batch_size: int, seq_length: int) -> int:
    """FLOPs of forward and backward over `batch_size` x `seq_length` tokens.

    A map of N weights costs 2N a token forward, 2N for its input's gradient and, when it is trained, 2N for
    its own: 6N for full fine-tuning, 4N on a frozen base (Kaplan et al. 2020, section 2.1). LoRA adds 6 per
    trained parameter. Below the first adapted layer no gradient goes back. Attention counts whole score
    matrices, although a causal kernel skips half; every token passes the head, although our loop skips
    unlabelled ones. Raises ConfigError, TargetError."""
    for argument, size in (("batch_size", batch_size), ("seq_length", seq_length)):
        if size < 1:
            raise ConfigError(argument, size, "a whole number of at least 1")
    tokens = batch_size * seq_length
    inside = sum(x.in_features * x.out_features for x in shape.linears if x.per_layer)
    outside = sum(x.in_features * x.out_features for x in shape.linears if not x.per_layer)
    # q k^T and weights v: 2 * seq * width each; backward does each product twice.
    scores = 4 * seq_length * shape.query_width
    forward = shape.num_layers * (2 * inside + scores) + 2 * outside
    if isinstance(method, LoraConfig):
        selection = select_linears(shape, method)
        layers = shape.num_layers - selection.first_layer
        backward = layers * (2 * inside + 2 * scores) + 2 * outside
        return tokens * (forward + backward + 6 * trained_lora_parameters(selection, method))
    backward = shape.num_layers * (4 * inside + 2 * scores) + 4 * outside
    return tokens * (forward + backward)
