"""Reading single facts out of a config.json's mapping, each with its own clear error."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_engine.errors import ModelConfigError

# Generous, and still small enough that a hostile file cannot make a count slow.
MAX_LAYERS = 10_000
MAX_SIZE = 10_000_000
MAX_VOCAB = 100_000_000
MAX_EXPERTS = 100_000


@dataclass(frozen=True)
class Facts:
    """The values of one config.json; every getter raises ModelConfigError in one sentence."""

    values: Mapping[str, Any]
    name: str

    def size(self, *keys: str, default: int | None = None, high: int = MAX_SIZE) -> int:
        """The first of `keys` that is set, a whole number from 1 to `high`."""
        for key in keys:
            value = self.values.get(key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
                raise ModelConfigError(
                    f"{key} of {self.name} is {_short(value)}; allowed: a whole number from 1 to {high}."
                )
            return value
        if default is None:
            raise ModelConfigError(
                f"{keys[0]} of {self.name} is missing; allowed: a config.json that says it, "
                f"as a whole number from 1 to {high}."
            )
        return default

    def count(self, key: str, default: int, high: int = MAX_SIZE) -> int:
        """Like `size`, with 0 allowed: a number of things of which there may be none."""
        return (
            0
            if self.values.get(key) == 0 and self.values[key] is not False
            else self.size(key, default=default, high=high)
        )

    def layers(self, key: str, num_layers: int) -> tuple[int, ...] | None:
        """Indices of layers in their order, None when the config does not say."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(type(i) is int and 0 <= i < num_layers for i in value):
            raise ModelConfigError(
                f"{key} of {self.name} is {_short(value)}; allowed: a list of whole numbers from 0 to {num_layers - 1}."
            )
        return tuple(sorted(set(value)))

    def experts(self, *keys: str, default: int, chosen_default: int | None) -> tuple[int, int]:
        """(experts in a layer, how many of them a token is sent to)."""
        experts = self.size(*keys, default=default, high=MAX_EXPERTS)
        chosen = self.size("num_experts_per_tok", default=chosen_default)
        if chosen > experts:
            raise ModelConfigError(
                f"num_experts_per_tok of {self.name} is {chosen}; allowed: a whole number from 1 to "
                f"the {experts} experts of a layer."
            )
        return experts, chosen

    def nested(self, key: str) -> "Facts | None":
        """The facts of the config that `key` holds, None when the config has no such thing."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise ModelConfigError(f"{key} of {self.name} is {_short(value)}; allowed: a JSON object.")
        return Facts(value, f"{key} of {self.name}")

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ModelConfigError(f"{key} of {self.name} is {_short(value)}; allowed: true or false.")
        return value

    def text(self, *keys: str, default: str) -> str:
        for key in keys:
            value = self.values.get(key)
            if value is None:
                continue
            if not isinstance(value, str):
                raise ModelConfigError(f"{key} of {self.name} is {_short(value)}; allowed: a name.")
            return value
        return default

    def rate(self, key: str, default: float) -> float:
        """A dropout rate."""
        value = self.values.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise ModelConfigError(f"{key} of {self.name} is {_short(value)}; allowed: a number from 0 to 1.")
        return float(value)

    def kv_heads(self, key: str, heads: int, default: int | None = None) -> int:
        """Key-value heads: what the config says, or one per head; `default` stands for an absent key."""
        fallback = default if default is not None and key not in self.values else heads
        kv_heads = self.size(key, default=fallback)
        if heads % kv_heads:
            raise ModelConfigError(
                f"{key} of {self.name} is {kv_heads}; allowed: a divisor of the {heads} attention heads."
            )
        return kv_heads

    def derived_head_dim(self, hidden: int, heads: int) -> int:
        """hidden / heads, which must divide."""
        if hidden % heads:
            raise ModelConfigError(
                f"num_attention_heads of {self.name} is {heads}; allowed: a divisor of the hidden size, {hidden}."
            )
        return hidden // heads

    def head_dim(self, hidden: int, heads: int) -> int:
        """What the config says, or hidden / heads."""
        if self.values.get("head_dim") is not None:
            return self.size("head_dim")
        return self.derived_head_dim(hidden, heads)


def _short(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # a whole number of more digits than Python prints
        text = "a very long number"
    return text if len(text) <= 40 else text[:37] + "..."
