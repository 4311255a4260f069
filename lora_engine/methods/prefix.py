"""Prefix tuning (Li and Liang 2021): trained keys and values before the first token, in every layer.

    attention(Q, [P_K; K], [P_V; V])        P_K, P_V (prefix_length, kv_heads, head_dim), the same for every sequence

Every token sees the whole prefix. Keys are trained as attention uses them, behind the rotary embedding. In a causal
model the tokens come after the prefix, so the first has position `prefix_length` (as in the paper's code and in
PEFT) and the context is that much shorter; an encoder's tokens keep the positions it was pretrained with.

The prefix joins inside transformers' attention function, not in the key-value cache: so it works with and without a
cache, with padding masks, and under gradient checkpointing, which drops caches.
"""

import inspect
import math
import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from lora_engine import core
from lora_engine.config import PrefixConfig
from lora_engine.errors import NotMergeableError, TargetError
from lora_engine.methods.places import attention_modules, text_config, transformer_layers

STATE_KEY = "prompt_embeddings"  # PEFT's name for what it saves: (prefix_length, layers * 2 * kv_width)

# Small against the keys and values of real tokens (about 3 in our base): the start is close to the base model.
PLAIN_STD = 0.1
# A plain prefix is trained in this unit. Adam's steps have the size of the learning rate, and keys and values have a
# long way to go: without it the prefix wants 0.3, at which a task head trained beside it runs away.
UNIT = 32.0  # a power of two: dividing by it on loading loses no bit


class PrefixEncoder(nn.Module):
    """Gives the keys and values of all layers, (prefix_length, layers * 2 * kv_width): trained as they are, or by
    an MLP (section 4.3; laid out as PEFT's PrefixEncoder)."""

    def __init__(
        self, config: PrefixConfig, num_layers: int, kv_heads: int, head_dim: int, hidden_size: int, seed: int
    ):
        super().__init__()
        self.prefix_length, self.num_layers = config.prefix_length, num_layers
        self.kv_heads, self.head_dim = kv_heads, head_dim
        kv_width = kv_heads * head_dim
        wide = num_layers * 2 * kv_width
        self.transform: nn.Sequential | None = None
        if not config.reparametrize:
            self.embedding = nn.Parameter(_gaussian(config.prefix_length, wide, PLAIN_STD / UNIT, seed))
            return
        inner = config.encoder_hidden_size or hidden_size
        self.embedding = nn.Parameter(_gaussian(config.prefix_length, kv_width, 1.0, seed))
        self.transform = nn.Sequential(nn.Linear(kv_width, inner), nn.Tanh(), nn.Linear(inner, wide))
        with torch.no_grad():
            for name, layer in (("first", self.transform[0]), ("last", self.transform[2])):
                weight: Any = layer.weight
                weight.copy_(torch.from_numpy(core.init_A(*weight.shape, seed=seed, name=name)))
                layer.bias.zero_()  # type: ignore[operator]

    def prompt_embeddings(self) -> Tensor:
        prefix: Tensor = UNIT * self.embedding if self.transform is None else self.transform(self.embedding)
        return prefix

    def keys_and_values(self, layer: int) -> tuple[Tensor, Tensor]:
        """Of one layer, each (1, kv_heads, prefix_length, head_dim)."""
        kv_width = self.kv_heads * self.head_dim
        rows = slice(2 * layer * kv_width, 2 * (layer + 1) * kv_width)
        if self.transform is None:
            own = UNIT * self.embedding[:, rows]
        else:
            first, tanh, last = self.transform
            own = nn.functional.linear(tanh(first(self.embedding)), last.weight[rows], last.bias[rows])  # type: ignore[index]
        own = own.view(self.prefix_length, 2, self.kv_heads, self.head_dim).permute(1, 2, 0, 3)
        return own[:1], own[1:]

    @torch.no_grad()
    def set_plain(self, prompt_embeddings: Tensor) -> None:
        """Take the keys and values themselves; the MLP is dropped."""
        shape = (self.prefix_length, self.num_layers * 2 * self.kv_heads * self.head_dim)
        if tuple(prompt_embeddings.shape) != shape:
            raise KeyError(f"{STATE_KEY} of shape {tuple(prompt_embeddings.shape)}, not {shape}")
        if self.transform is not None:
            self.transform = None
            self.embedding = nn.Parameter(torch.empty(shape, device=self.embedding.device))
        self.embedding.copy_(prompt_embeddings / UNIT)


class _LayerPrefix:
    """What an attention module is given: its share of the encoder. No nn.Module, or every layer would own it."""

    def __init__(self, encoder: PrefixEncoder, layer: int, attention: str) -> None:
        self.encoder, self.layer, self.attention = encoder, layer, attention


def _gaussian(rows: int, columns: int, std: float, seed: int) -> Tensor:
    """N(0, std^2), (rows, columns), drawn as `core.init_A` draws."""
    if not rows:
        return torch.zeros(0, columns)
    return torch.from_numpy(core.init_A(rows, columns, seed=seed, name="prefix")) * (std * math.sqrt(columns))


def prefixed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Any:
    """transformers' attention function with the module's prefix before its keys and values.

    query (batch, heads, n, d), key and value (batch, kv_heads, past + n, d), mask (batch or 1, 1, n, past + n)."""
    prefix: Any = module.prefix
    keys, values = prefix.encoder.keys_and_values(prefix.layer)
    batch = (key.shape[0], -1, -1, -1)
    key = torch.cat((keys.to(key.dtype).expand(batch), key), dim=2)
    value = torch.cat((values.to(value.dtype).expand(batch), value), dim=2)
    if attention_mask is not None:
        seen = True if attention_mask.dtype == torch.bool else 0.0
        attention_mask = nn.functional.pad(attention_mask, (prefix.encoder.prefix_length, 0), value=seen)
    else:
        kwargs["is_causal"] = False  # `_mask` leaves the mask out only where everything is seen
    attend: Any = sdpa_attention_forward
    if prefix.attention == "eager":  # each model has its own, beside its attention class
        attend = sys.modules[type(module).__module__].eager_attention_forward
    return attend(module, query, key, value, attention_mask, **kwargs)


def _mask(base: Any, *args: Any, **kwargs: Any) -> Tensor | None:
    """A causal mask is always written out: torch's is_causal flag would hide the prefix."""
    mask: Tensor | None = base(*args, **kwargs | {"allow_is_causal_skip": False})
    return mask


_MASKS = {"sdpa": sdpa_mask, "eager": eager_mask}
for _name, _base in _MASKS.items():
    AttentionInterface.register(f"prefix_{_name}", prefixed_attention)
    AttentionMaskInterface.register(f"prefix_{_name}", partial(_mask, _base))


def inject(model: Any, config: PrefixConfig, *, seed: int = 0) -> nn.Module:
    """Freeze `model` and give every layer its prefix, in place. A prefix of length 0 changes nothing.

    Raises TargetError where the attention takes no prefix, or the context has no room for it."""
    attentions = attention_modules(model)
    text = text_config(model)
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    kind = model.config._attn_implementation
    if kind not in _MASKS:
        raise TargetError(f"attention is {kind!r}; allowed with a prefix: {', '.join(_MASKS)}.")
    causal = bool(getattr(attentions[0], "is_causal", True))
    context = getattr(text, "max_position_embeddings", None)
    if causal and context is not None:
        if config.prefix_length >= context:
            raise TargetError(
                f"prefix_length is {config.prefix_length}; allowed: less than {context}, the context of this model."
            )
        text.max_position_embeddings = context - config.prefix_length
    model.requires_grad_(False)
    encoder = PrefixEncoder(config, len(attentions), kv_heads, head_dim, text.hidden_size, seed)
    # Inside the pretrained part: what stands beside it in a classifier is its task head.
    model.base_model.prefix_encoder = encoder.to(next(model.parameters()).device)
    if config.prefix_length:
        for layer, attention in enumerate(attentions):
            attention.prefix = _LayerPrefix(encoder, layer, kind)  # type: ignore[assignment]
        model.set_attn_implementation(f"prefix_{kind}")
        if causal:
            # The module around the layers: OPT's language model calls its decoder, past its base model.
            around = model.get_submodule(transformer_layers(model)[0][0].rsplit(".", 2)[0])
            around.register_forward_pre_hook(partial(_shift_positions, config.prefix_length), with_kwargs=True)
    injected: nn.Module = model
    return injected


def _shift_positions(num: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The tokens' positions count from the end of the prefix."""
    signature = inspect.signature(module.forward)
    if "position_ids" not in signature.parameters:  # relative distances only: nothing to shift
        return None
    given = signature.bind_partial(*args, **kwargs).arguments
    given |= given.pop("kwargs", {})
    positions = given.get("position_ids")
    if positions is None:
        past = given.get("past_key_values")
        inputs = given.get("input_ids")
        inputs = given["inputs_embeds"] if inputs is None else inputs
        first = past.get_seq_length() if past is not None else 0
        positions = torch.arange(first, first + inputs.shape[1], device=inputs.device)[None]
    return (), given | {"position_ids": positions + num}


def _encoder(model: Any) -> PrefixEncoder:
    encoder: PrefixEncoder = model.base_model.prefix_encoder
    return encoder


def state_dict(model: nn.Module) -> dict[str, Tensor]:
    """`prompt_embeddings` as PEFT saves it: the keys and values themselves, without the MLP."""
    return {STATE_KEY: _encoder(model).prompt_embeddings().detach()}


def load_state_dict(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Take the prefix in `state`; a reparametrisation is dropped. Raises KeyError when it does not fit."""
    _encoder(model).set_plain(state[STATE_KEY])


def merge(model: nn.Module) -> None:  # noqa: ARG001
    """Raises NotMergeableError: no weight holds keys and values."""
    raise NotMergeableError("A prefix cannot be merged: no weight of the base model holds keys and values.")


unmerge = merge
