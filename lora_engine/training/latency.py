"""Seconds a token at inference, paired: all models in one process, their turns interleaved."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BASE, BASE_AGAIN = "base", "base again"


@dataclass(frozen=True)
class Timing:
    """Median seconds a token; the median of its ratio to the base within a round, and that ratio's 5 % and 95 %."""

    seconds_per_token: float
    ratio: float
    ratio_low: float
    ratio_high: float


@torch.no_grad()
def time_generation(model: Any, prompt_ids: Tensor, num_tokens: int) -> float:
    """Seconds for each of `num_tokens` tokens written after `prompt_ids` (1, n), greedily and with a cache.

    Reading the prompt is not counted; the end token does not stop it."""
    past, ids = None, prompt_ids
    began = 0.0
    for i in range(num_tokens + 1):
        if i == 1:
            began = _now(prompt_ids.device)
        result = model(input_ids=ids, past_key_values=past, use_cache=True, logits_to_keep=1)
        past, ids = result.past_key_values, result.logits[:, -1].argmax(-1, keepdim=True)
    return (_now(prompt_ids.device) - began) / num_tokens


@torch.no_grad()
def time_reading(model: Any, prompt_ids: Tensor, num_times: int) -> float:
    """Seconds a token to read `prompt_ids` (1, n), for models that write none; mean of `num_times`."""
    mask = torch.ones_like(prompt_ids)
    began = _now(prompt_ids.device)
    for _ in range(num_times):
        model(input_ids=prompt_ids, attention_mask=mask)
    return (_now(prompt_ids.device) - began) / (num_times * prompt_ids.shape[1])


def compare_latency(turns: Mapping[str, Callable[[], float]], *, rounds: int, warmup: int = 1) -> dict[str, Timing]:
    """Time every turn once a round, in an order that moves on by one each round, after `warmup` rounds.

    A turn gives seconds a token; BASE is among them. Ratios are taken within a round, so that what slows the whole
    machine for a while cancels out."""
    names = list(turns)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(warmup + rounds):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            value = turns[name]()
            if i >= warmup:
                seconds[name].append(value)
    timings = {}
    for name in names:
        ratios = [a / b for a, b in zip(seconds[name], seconds[BASE], strict=True)]
        timings[name] = Timing(
            statistics.median(seconds[name]), statistics.median(ratios), quantile(ratios, 0.05), quantile(ratios, 0.95)
        )
    return timings


def quantile(values: Sequence[float], share: float) -> float:
    """Linear between the two nearest, as numpy's."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
