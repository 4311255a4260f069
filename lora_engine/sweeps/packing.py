"""Which runs may share one pass over their frozen base, and why others may not. Pure: configs in, groups out.

The model has its say later (`methods.packed.refusal`), and how many rows a pack holds is measured
(`training.pack_size`)."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace

from lora_engine.config import LoraConfig, RunConfig, TrainConfig, to_dict

PACKED = ("auto", "always", "never")
# Ranks are padded with zeros to the largest of their pack; four times is where the padding's products still cost less
# than a pass of their own.
BAND = 4
ALONE = "no other run here differs from it only in what rows of a pack may differ in"


@dataclass(frozen=True)
class RunGroup:
    """Runs in the order given; `reason` says why they go one after another, None: they may be packed."""

    runs: tuple[tuple[str, RunConfig], ...]
    reason: str | None = None

    @property
    def run_ids(self) -> list[str]:
        return [run_id for run_id, _ in self.runs]


def pack_refusal(config: RunConfig) -> str | None:
    """Why a run cannot be a row of a pack, in words that name the setting; None where it can."""
    method, train = config.method, config.train
    if not isinstance(method, LoraConfig):
        return f"method {method.method} has no frozen base with low-rank branches to share"
    if method.lora_dropout:
        return f"lora_dropout {method.lora_dropout:g} draws masks of its own in every run"
    if method.use_dora:
        return "DoRA takes the norm of every run's whole weight"
    if method.target_parameters:
        return "target_parameters are adapted inside the weight, of which a pack has one"
    if train.precision in ("fp16", "mixed-fp16"):
        return f"precision {train.precision} scales its loss by what each run's own gradients allow"
    if train.optimizer != "adamw":
        return f"optimizer {train.optimizer} is none that packs know; they know adamw"
    return None


def group_runs(runs: Iterable[tuple[str, RunConfig]]) -> list[RunGroup]:
    """Groups of runs that may be packed, then what cannot be, each with its reason; none is lost, order is kept.

    Within a group runs differ only in r (at most BAND times the smallest), alpha and its scaling, learning rate and
    schedule, weight decay, clipping and seed."""
    alike: dict[str, list[tuple[str, RunConfig]]] = {}
    refused: dict[str, list[tuple[str, RunConfig]]] = {}
    for run_id, config in runs:
        reason = pack_refusal(config)
        place, key = (refused, reason) if reason else (alike, _shared(config))
        place.setdefault(key, []).append((run_id, config))
    groups = []
    for members in alike.values():
        bands = _bands({_rank(config) for _, config in members})
        for band in bands:
            rows = tuple((run_id, config) for run_id, config in members if _rank(config) in band)
            groups.append(RunGroup(rows, ALONE if len(rows) == 1 else None))
    return groups + [RunGroup(tuple(members), reason) for reason, members in refused.items()]


def _bands(ranks: set[int]) -> list[set[int]]:
    bands: list[set[int]] = []
    for r in sorted(ranks):
        if bands and r <= BAND * min(bands[-1]):
            bands[-1].add(r)
        else:
            bands.append({r})
    return bands


def _rank(config: RunConfig) -> int:
    assert isinstance(config.method, LoraConfig)  # pack_refusal let it through
    return config.method.r


def _shared(config: RunConfig) -> str:
    """Text that is equal for runs whose rows fit into one pack."""
    assert isinstance(config.method, LoraConfig)
    plain = TrainConfig()
    method = replace(config.method, r=1, lora_alpha=1.0, use_rslora=False)
    free = ("lr", "weight_decay", "seed", "schedule", "warmup_steps", "max_grad_norm")
    train = replace(config.train, **{name: getattr(plain, name) for name in free})
    return json.dumps(to_dict(replace(config, method=method, train=train)), sort_keys=True)
