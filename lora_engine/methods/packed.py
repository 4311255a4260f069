"""Packed LoRA: N adapters on one frozen base in one pass, a layout and not a method.

What N separate runs keep in thousands of small tensors lies in one buffer (N, P): row i is adapter i, all its factors
one after another, padded to the largest rank R of each module. A (N, R, in) and B (N, out, R) are views of it.

    h_i = x_i W0^T + bias + s_i (x_i A_i^T) B_i^T        x (N, n, in) -> h (N, n, out)

W0's product is one GEMM over the tokens of all; the low-rank part is batched over N. Padded rows of A and columns of B
are zero, so their gradients are products with zeros and AdamW leaves them at zero without a mask.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_engine import core
from lora_engine.config import LoraConfig
from lora_engine.errors import ConfigError
from lora_engine.methods.lora import as_peft_reads, target_names
from lora_engine.methods.packed_head import PackedAffine, pack_task_head, unpackable_head
from lora_engine.methods.packed_layout import Slot, aligned
from lora_engine.methods.packed_linear import packed_linear
from lora_engine.methods.places import replace_module, task_head_names, task_head_parameters
from lora_engine.methods.quantized import QuantizedLinear, device_of, features_of


class PackedLayer(nn.Module):
    """`base_layer` with N low-rank branches; stands where the base layer stood. The adapters are float32 (float64 on a
    float64 base); products run in the dtype of the activations, as in LoraLayer."""

    def __init__(self, base_layer: nn.Module, name: str, configs: Sequence[LoraConfig]) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = features_of(base_layer)
        at = [config.at(name) for config in configs]
        self.ranks = [config.r for config in at]
        self.size, self.r = len(at), max(self.ranks)
        self.enabled = True
        scalings = [core.scaling_factor(c.r, c.lora_alpha, use_rslora=c.use_rslora) for c in at]
        self.scaling = torch.tensor(scalings, dtype=torch.float64).view(-1, 1, 1)  # (N, 1, 1)
        self.lora_A: nn.Parameter
        self.lora_B: nn.Parameter
        self.train(base_layer.training)

    def slots(self, name: str, start: int) -> list[Slot]:
        a = Slot(name, "lora_A.weight", start, (self.r, self.in_features), padded=True)
        b = (self.r, self.out_features)
        return [a, Slot(name, "lora_B.weight", aligned(a.stop), b, padded=True, transposed=True)]

    def take(self, tensors: Sequence[nn.Parameter]) -> None:
        """Views of the pack's buffers: A (N, R, in), B (N, out, R), their gradients in `.grad`."""
        self.lora_A, self.lora_B = tensors
        self.scaling = self.scaling.to(self.lora_A.dtype).to(self.lora_A.device)

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            base: Tensor = self.base_layer(x)
            return base
        if x.shape[0] % self.size:
            raise ValueError(f"x is {tuple(x.shape)}; allowed: the sequences of {self.size} configs, one after another")
        return packed_linear(x, self.base_layer, self.lora_A, self.lora_B, self.scaling)


class Pack:
    """N adapters inside `model`. `parameters` and `gradients` (N, P); `rows[i]` is row i as the optimizer takes it,
    its `.grad` the row of `gradients`."""

    def __init__(
        self,
        model: nn.Module,
        configs: Sequence[LoraConfig],
        seeds: Sequence[int],
        modules: Mapping[str, "PackedLayer | PackedAffine"],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.model, self.configs, self.seeds, self.modules = model, tuple(configs), tuple(seeds), dict(modules)
        self.layers = {name: module for name, module in self.modules.items() if isinstance(module, PackedLayer)}
        self.size = len(self.configs)
        self.slots: list[Slot] = []
        self._restored: list[nn.Parameter] = []
        owned: list[tuple[PackedLayer | PackedAffine, list[Slot]]] = []
        stop = 0
        for name, module in self.modules.items():
            slots = module.slots(name, aligned(stop))
            owned.append((module, slots))
            self.slots += slots
            stop = slots[-1].stop
        self.num_parameters = aligned(stop)  # P
        self.parameters = torch.zeros(self.size, self.num_parameters, device=device, dtype=dtype)
        self.gradients = torch.zeros_like(self.parameters)
        for module, slots in owned:
            module.take([self._parameter(slot) for slot in slots])
        self.rows = [nn.Parameter(row) for row in self.parameters]
        for row, gradient in zip(self.rows, self.gradients, strict=True):
            row.grad = gradient

    def _parameter(self, slot: Slot) -> nn.Parameter:
        p = nn.Parameter(slot.of_pack(self.parameters))
        p.grad = slot.of_pack(self.gradients)
        return p

    def unpadded(self, row: Tensor, i: int) -> dict[str, Tensor]:
        """The tensors of a separate run out of `row` (P,), which is laid out as row i of `parameters`; views."""
        return {
            slot.name: slot.of_row(row, self.layers[slot.module].ranks[i] if slot.padded else 0) for slot in self.slots
        }

    def state_dict(self, i: int) -> dict[str, Tensor]:
        """What `methods.state_dict` gives of a separate run of config i."""
        return self.unpadded(self.parameters[i], i)

    @torch.no_grad()
    def load_state_dict(self, i: int, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state_dict`. Raises KeyError when a name is missing."""
        for name, value in self.state_dict(i).items():
            value.copy_(state[name])

    def set_enabled(self, enabled: bool) -> None:
        """Off: the base alone, whatever was trained."""
        for layer in self.layers.values():
            layer.enabled = enabled

    def zero_grad(self) -> None:
        self.gradients.zero_()

    def keep(self, indices: Sequence[int]) -> "Pack":
        """A new pack of these rows in the place of this one, padded to the largest rank that is left."""
        states = [{name: value.clone() for name, value in self.state_dict(i).items()} for i in indices]
        configs, seeds = [self.configs[i] for i in indices], [self.seeds[i] for i in indices]
        eject_pack(self.model)
        return inject_pack(self.model, configs, seeds=seeds, states=states)


def refusal(config: Any, model: nn.Module) -> str | None:
    """Why runs of `config` on `model` cannot share a pass, None when they can. Raises TargetError.

    Looks at one pass of `model` over a few tokens: a module that does not see every token of every sequence, such as
    an expert, cannot tell whose they are; and random numbers drawn in training could not be those of separate runs."""
    if not isinstance(config, LoraConfig):
        return f"method is {config.method!r}; only lora is packed"
    if config.use_dora:
        return "use_dora is True: the norms of DoRA belong to one adapter's weight"
    if config.lora_dropout:
        return f"lora_dropout is {config.lora_dropout:g}: separate runs draw their own masks"
    config = as_peft_reads(model, config)
    if config.target_parameters:
        return "target_parameters are adapted: their update is added to the weight itself"
    unknown = unpackable_head(model)
    if unknown:
        return f"the task head has a {unknown}, which holds parameters that are no linear map's and no norm's"
    names = _adapted(model, config)
    experts = [name for name in names if "experts" in name.split(".")]
    if experts:
        return f"target_modules matches {experts[0]!r}, an expert, which sees only some of the tokens"
    return _look(model, names)


@torch.no_grad()
def _look(model: Any, names: Sequence[str]) -> str | None:
    """What one pass in training mode shows. Prime sizes, so that no product of others is taken for them."""
    sequences, length = 3, 7
    wrong: list[str] = []

    def check(name: str) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            tokens = x.numel() // x.shape[-1]
            if x.shape[0] != sequences and tokens != sequences * length:
                wrong.append(name)

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(check(name)) for name in names]
    was_training = model.training
    embedding = model.get_input_embeddings().weight
    ids = torch.full((sequences, length), min(5, embedding.shape[0] - 1), device=embedding.device)
    cuda = embedding.device.type == "cuda"
    try:
        with torch.random.fork_rng(devices=[embedding.device] if cuda else []):
            before = torch.cuda.get_rng_state(embedding.device) if cuda else torch.get_rng_state()
            model.train()
            model(input_ids=ids, attention_mask=torch.ones_like(ids), **_without_cache(model))
            after = torch.cuda.get_rng_state(embedding.device) if cuda else torch.get_rng_state()
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    if wrong:
        return f"target_modules matches {wrong[0]!r}, which does not see every token of every sequence"
    if not torch.equal(before, after):
        return "the model has dropout of its own: separate runs draw their own masks"
    return None


def _without_cache(model: Any) -> dict[str, Any]:
    return {"use_cache": False} if getattr(model.config, "use_cache", None) is not None else {}


def _adapted(model: nn.Module, config: LoraConfig) -> list[str]:
    """As `methods.inject`, which leaves a classifier's task head whole."""
    heads = tuple(f"{name}." for name in task_head_names(model))
    names = target_names(model, as_peft_reads(model, config))
    return [name for name in names if not f"{name}.".startswith(heads or ("\0",))]


def inject_pack(
    model: nn.Module,
    configs: Sequence[LoraConfig],
    *,
    seeds: Sequence[int],
    heads: Sequence[Mapping[str, Tensor]] | None = None,
    states: Sequence[Mapping[str, Tensor] | None] | None = None,
) -> Pack:
    """Freeze `model` and put N adapters into it, in place, each as `methods.inject` begins it with its seed, or from
    its `states[i]` (as `Pack.state_dict` gives it). `heads[i]` holds row i's task head, whose first values depend on
    the seed at loading; without, all begin with the model's.

    Raises ConfigError when the configs adapt different modules or cannot be packed, TargetError."""
    names = _adapted(model, configs[0])
    for config in configs:
        if config.use_dora or config.lora_dropout or config.target_parameters:
            raise ConfigError("configs", config, "LoRA without DoRA, dropout and target_parameters")
        if config is not configs[0] and _adapted(model, config) != names:
            raise ConfigError("target_modules", config.target_modules, "what adapts the same modules in a whole pack")
    own = {name: p.detach() for name, p in task_head_parameters(model)}
    thawed = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)
    modules: dict[str, PackedLayer | PackedAffine] = {}
    device, dtype = device_of(model.get_submodule(names[0])), _state_dtype(model.get_submodule(names[0]))
    for name in names:
        modules[name] = PackedLayer(model.get_submodule(name), name, configs)
    modules |= pack_task_head(model, len(configs))
    order = [name for name, _ in model.named_modules() if name in modules]
    pack = Pack(model, configs, seeds, {name: modules[name] for name in order}, device, dtype)
    for name, module in modules.items():
        replace_module(model, name, module)
    pack._restored = thawed
    if states is None or any(state is None for state in states):
        _begin(pack, heads or [own] * len(configs))
    for i, state in enumerate(states or ()):
        if state is not None:
            pack.load_state_dict(i, state)
    model.__dict__["_pack"] = pack
    return pack


@torch.no_grad()
def _begin(pack: Pack, heads: Sequence[Mapping[str, Tensor]]) -> None:
    """A as LoraLayer draws it, B zero. A's rows are drawn one after another, so a smaller rank is the beginning of a
    larger one: each seed is drawn once."""
    views = [pack.state_dict(i) for i in range(pack.size)]
    for name, layer in pack.layers.items():
        for seed in set(pack.seeds):
            rows = [i for i in range(pack.size) if pack.seeds[i] == seed]
            A = torch.from_numpy(
                core.init_A(max(layer.ranks[i] for i in rows), layer.in_features, seed=seed, name=name)
            )
            for i in rows:
                views[i][f"{name}.lora_A.weight"].copy_(A[: layer.ranks[i]])
    for i, head in enumerate(heads):
        for name, value in head.items():
            views[i][name].copy_(value)


def pack_of(model: nn.Module) -> Pack | None:
    """The pack inside `model`."""
    pack: Pack | None = model.__dict__.get("_pack")
    return pack


def eject_pack(model: nn.Module) -> nn.Module:
    """Put the base's modules back, bit for bit as they were; without a pack, nothing."""
    pack = pack_of(model)
    if pack is None:
        return model
    for name, module in pack.modules.items():
        replace_module(model, name, module.base_layer)
    for p in pack._restored:
        p.requires_grad_(True)
    del model.__dict__["_pack"]
    return model


def _state_dtype(layer: nn.Module) -> torch.dtype:
    if isinstance(layer, QuantizedLinear):
        return torch.float32
    weight: Any = layer.weight
    return torch.float64 if weight.dtype == torch.float64 else torch.float32
