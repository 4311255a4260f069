"""Where (IA)^3 puts its scales, by the names of the maps inside a layer; the first that fits."""

from lora_engine.calc.structure import LinearShape, ModelShape
from lora_engine.errors import TargetError

KEYS_AND_VALUES = (
    ("self_attn.k_proj", "self_attn.v_proj"), ("attention.self.key", "attention.self.value"),
    ("attention.k_lin", "attention.v_lin"), ("attention.attn.k", "attention.attn.v"),
    ("attn.k_proj", "attn.v_proj"), ("attn.attention.k_proj", "attn.attention.v_proj"),
    ("attn.c_attn",), ("attention.query_key_value",), ("self_attention.query_key_value",), ("self_attn.qkv_proj",),
    ("attn.Wqkv",),
)  # fmt: skip
MLP_OUTPUTS = (
    "mlp.down_proj", "mlp.c_proj", "mlp.dense_4h_to_h", "mlp.fc2", "mlp.fc_out", "fc2", "output.dense", "ffn.lin2",
    "mlp.Wo",
)  # fmt: skip


def scaled_maps(shape: ModelShape) -> tuple[list[LinearShape], list[LinearShape]]:
    """(maps whose outputs are scaled: keys and values; maps whose inputs are: the MLP's last).

    Raises TargetError where not every layer has them."""
    inside = {x.name: x for x in shape.linears if x.per_layer and len(shape.layers_of(x)) == shape.num_layers}
    keys = next((names for names in KEYS_AND_VALUES if inside.keys() >= set(names)), None)
    output = next((name for name in MLP_OUTPUTS if name in inside), None)
    if keys is None or output is None:
        raise TargetError(
            f"model is a {shape.architecture}, in which {'keys and values' if keys is None else 'MLP outputs'} "
            f"of every layer were not found; allowed: models with maps such as {', '.join(KEYS_AND_VALUES[0])} "
            f"and {MLP_OUTPUTS[0]}."
        )
    return [inside[name] for name in keys], [inside[output]]
