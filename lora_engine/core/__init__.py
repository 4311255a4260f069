"""The maths of LoRA in numpy: the one definition the torch layers take their values from."""

from lora_engine.core.lora import (
    backward,
    delta_W,
    forward,
    forward_dora,
    init_A,
    init_B,
    merge,
    merge_dora,
    row_norms,
    scaling_factor,
    unmerge,
)
from lora_engine.core.spectrum import (
    best_rank_r,
    effective_rank,
    energy_rank,
    singular_values,
    subspace_similarity,
)

__all__ = [
    "backward",
    "best_rank_r",
    "delta_W",
    "effective_rank",
    "energy_rank",
    "forward",
    "forward_dora",
    "init_A",
    "init_B",
    "merge",
    "merge_dora",
    "row_norms",
    "scaling_factor",
    "singular_values",
    "subspace_similarity",
    "unmerge",
]
