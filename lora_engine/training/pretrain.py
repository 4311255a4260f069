"""Pretrain the embedded base model: tokenizer, packed token stream, Muon + AdamW, model folder.

The recipe is that of small speedrun trainers (Muon for matrices, AdamW for the rest, constant then
linear decay; Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"). The
order of the data is a function of (seed, step), so a run resumes from its last checkpoint exactly.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lora_engine.errors import ConfigError, DataError
from lora_engine.training.checkpoint import load_tensors, optimizer_tensors, restore_optimizer, save_tensors
from lora_engine.training.corpus import (
    ASSISTANT,
    END,
    PAD,
    USER,
    code_and_digits,
    fingerprint,
    read_corpus,
    split_corpus,
    tokenize,
    train_tokenizer,
)

CHECKPOINT = "checkpoint.safetensors"


CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|assistant|>{{ message['content'] }}<|endoftext|>"
    "{% else %}<|user|>{{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Everything that decides the resulting weights, beside the corpus itself."""

    vocab_size: int = 4096
    hidden_size: int = 192
    intermediate_size: int = 512
    num_layers: int = 6
    num_heads: int = 6
    num_kv_heads: int = 2
    context: int = 256
    tokens: int = 36_000_000
    tokens_per_step: int = 4096
    muon_lr: float = 0.02
    adamw_lr: float = 4e-3
    optimizer: str = "muon"
    decay_share: float = 0.6
    long_share: float = 0.25
    held_out_share: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        if self.optimizer not in ("muon", "adamw"):
            raise ConfigError("optimizer", self.optimizer, "muon or adamw")
        for argument in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"):
            value = getattr(self, argument)
            if value < 1:
                raise ConfigError(argument, value, "a whole number of at least 1")
        if self.seed < 0:
            raise ConfigError("seed", self.seed, "a whole number of at least 0")
        if self.tokens < self.tokens_per_step:
            raise ConfigError("tokens", self.tokens, f"at least tokens_per_step ({self.tokens_per_step})")
        if self.tokens_per_step % self.context:
            raise ConfigError("tokens_per_step", self.tokens_per_step, f"a multiple of context ({self.context})")
        if self.hidden_size % self.num_heads:
            raise ConfigError("hidden_size", self.hidden_size, f"a multiple of num_heads ({self.num_heads})")

    @property
    def num_steps(self) -> int:
        return self.tokens // self.tokens_per_step

    def sequence_length(self, step: int) -> int:
        """Half the context first, all of it for the last `long_share` of the steps."""
        return self.context if step >= self.num_steps * (1 - self.long_share) else self.context // 2

    def lr_factor(self, step: int) -> float:
        """Constant, then linear to zero over the last `decay_share` of the steps; 50 steps of warm-up."""
        left = (self.num_steps - step) / max(1.0, self.num_steps * self.decay_share)
        return min(1.0, (step + 1) / 50, left)


# ---------------------------------------------------------------------------------------------- data


def batch_at(stream: np.ndarray, config: PretrainConfig, step: int) -> torch.Tensor:
    """Step `step`'s windows, (sequences, length + 1): a function of (seed, step) alone.

    Each epoch shifts the windows by a random offset and visits all of them once, shuffled."""
    length = config.sequence_length(step)
    num = config.tokens_per_step // length
    per_epoch = (len(stream) - length - 1) // length
    if per_epoch < num:
        raise DataError(f"corpus has {len(stream)} tokens; allowed: at least {config.tokens_per_step + length}.")
    steps_per_epoch = per_epoch // num
    epoch, position = divmod(step, steps_per_epoch)
    rng = np.random.default_rng((config.seed, epoch, length))
    offset = int(rng.integers(length))
    order = rng.permutation(per_epoch - 1)[position * num : (position + 1) * num]
    return torch.from_numpy(
        np.stack([stream[offset + i * length : offset + (i + 1) * length + 1] for i in order]).astype(np.int64)
    )


# --------------------------------------------------------------------------------------------- model


def build_model(config: PretrainConfig) -> LlamaForCausalLM:
    """A Llama with a tied head, initialised from `config.seed`."""
    torch.manual_seed(config.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.hidden_size // config.num_heads,
            max_position_embeddings=config.context,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=1,
        )
    )


def build_optimizers(model: nn.Module, config: PretrainConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings and norms (or AdamW for all)."""
    named = dict(model.named_parameters())
    matrices = [p for n, p in named.items() if p.ndim == 2 and "embed" not in n and "lm_head" not in n]
    chosen = {id(p) for p in matrices} if config.optimizer == "muon" else set()
    rest = [p for p in named.values() if id(p) not in chosen]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=config.adamw_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    ]
    if chosen:
        optimizers.append(torch.optim.Muon(matrices, lr=config.muon_lr, momentum=0.95, weight_decay=0.01))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def next_token_loss(model: Any, windows: torch.Tensor, *, half: bool) -> torch.Tensor:
    """Mean cross-entropy in nats per token over windows (sequences, length + 1)."""
    with torch.autocast(windows.device.type, torch.bfloat16, enabled=half):
        hidden = model.model(input_ids=windows[:, :-1], use_cache=False).last_hidden_state
        logits = model.lm_head(hidden)
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def bits_per_byte(
    model: Any, stream: np.ndarray, num_bytes: int, context: int, *, max_windows: int | None = None, half: bool = False
) -> float:
    """Held-out cross-entropy in bits per byte of text, over non-overlapping windows of `context`."""
    num = (len(stream) - 1) // context
    used = num if max_windows is None else min(num, max_windows)
    device = next(model.parameters()).device
    total = 0.0
    for start in range(0, used, 16):
        rows = range(start, min(start + 16, used))
        windows = np.stack([stream[i * context : (i + 1) * context + 1] for i in rows]).astype(np.int64)
        loss = next_token_loss(model, torch.from_numpy(windows).to(device), half=half)
        total += float(loss) * len(windows) * context
    return total / (used * context) * len(stream) / num_bytes / math.log(2)


# ---------------------------------------------------------------------------------------------- loop


def pretrain(
    corpus: Path,
    out: Path,
    config: PretrainConfig,
    *,
    device: str = "cpu",
    half: bool = True,
    compile_model: bool = False,
    checkpoint_every: int = 250,
    on_step: Callable[[int, int, float, float], None] | None = None,
) -> dict[str, Any]:
    """Train and write a model folder; resumes when `out` holds a checkpoint of the same plan.

    A resumed run may change `tokens` (and with it the decay); everything else must stay as it was.

    `on_step(step, num_steps, loss, tokens_per_second)` is called after each step. Returns
    `parameters, tokens, eval_bits_per_byte, seconds, curve`. Raises DataError, ConfigError."""
    out.mkdir(parents=True, exist_ok=True)
    documents = read_corpus(corpus)
    train_texts, held_out_texts = split_corpus(documents, config.held_out_share, config.seed)
    if not held_out_texts:
        held_out_texts = [train_texts.pop()] if len(train_texts) > 1 else train_texts[-1:]
    tokenizer_path = out / "tokenizer.json"
    if tokenizer_path.exists():
        tokenizer = Tokenizer.from_file(str(tokenizer_path))
    else:
        tokenizer = train_tokenizer(train_texts + code_and_digits(), config.vocab_size)
        tokenizer.save(str(tokenizer_path))
    stream, held_out = tokenize(tokenizer, train_texts), tokenize(tokenizer, held_out_texts)
    held_out_bytes = sum(len(text.encode()) for text in held_out_texts)

    model: Any = build_model(config)
    model.to(device)
    optimizers = build_optimizers(model, config)
    state_path = out / CHECKPOINT
    start, seconds = 0, 0.0
    curve: list[dict[str, float]] = []
    plan = asdict(config) | {"tokens": None, "corpus": fingerprint(documents)}
    if state_path.exists():
        start, curve, seconds = _restore(state_path, model, optimizers, plan)

    step_loss = torch.compile(next_token_loss, dynamic=False) if compile_model else next_token_loss
    began = time.perf_counter()
    losses: list[float] = []
    for step in range(start, config.num_steps):
        step_began = time.perf_counter()
        factor = config.lr_factor(step)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
        loss = step_loss(model, batch_at(stream, config, step).to(device), half=half)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if on_step:
            rate = config.tokens_per_step / (time.perf_counter() - step_began)
            on_step(step + 1, config.num_steps, losses[-1], rate)
        if (step + 1) % checkpoint_every == 0 or step + 1 == config.num_steps:
            quick = bits_per_byte(model, held_out, held_out_bytes, config.context, max_windows=128, half=half)
            curve.append(
                {
                    "step": step + 1,
                    "tokens": (step + 1) * config.tokens_per_step,
                    "train_loss": sum(losses) / len(losses),
                    "eval_bits_per_byte": quick,
                }
            )
            losses.clear()
            facts = {"plan": plan, "step": step + 1, "curve": curve, "seconds": seconds + time.perf_counter() - began}
            save_tensors(state_path, _state_tensors(model, optimizers), facts)

    half_weights = {
        name: value.detach().to("cpu", torch.float16).contiguous()
        for name, value in model.state_dict().items()
        if name != "lm_head.weight"
    }
    model.load_state_dict({name: value.float() for name, value in half_weights.items()}, strict=False)
    result = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": config.num_steps * config.tokens_per_step,
        "eval_bits_per_byte": bits_per_byte(model, held_out, held_out_bytes, config.context),
        "seconds": seconds + time.perf_counter() - began,
        "curve": curve,
        "train_tokens_available": len(stream),
        "held_out_bytes": held_out_bytes,
        "config": asdict(config),
    }
    save_folder(out, model, half_weights, result)
    return result


def save_folder(out: Path, model: Any, weights: dict[str, torch.Tensor], result: dict[str, Any]) -> None:
    """Write what transformers loads: config.json, model.safetensors, tokenizer files; and pretrain.json."""
    facts = model.config.to_diff_dict() | {"dtype": "float16", "architectures": ["LlamaForCausalLM"]}
    (out / "config.json").write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n")
    tokenizer_config = {
        "backend": "tokenizers",
        "tokenizer_class": "TokenizersBackend",
        "bos_token": END,
        "eos_token": END,
        "pad_token": PAD,
        "extra_special_tokens": [USER, ASSISTANT],
        "model_max_length": model.config.max_position_embeddings,
        "chat_template": CHAT_TEMPLATE,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=1) + "\n")
    save_tensors(out / "model.safetensors", weights, {"tokens": result["tokens"]})
    (out / "pretrain.json").write_text(json.dumps(result, indent=1) + "\n")


def _state_tensors(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {f"parameter.{name}": p for name, p in model.named_parameters()}
    for i, optimizer in enumerate(optimizers):
        tensors |= {f"{i}.{name}": value for name, value in optimizer_tensors(optimizer).items()}
    return tensors


@torch.no_grad()
def _restore(
    path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], plan: dict[str, Any]
) -> tuple[int, list[dict[str, float]], float]:
    tensors, facts = load_tensors(path)
    for key, value in plan.items():
        if facts["plan"].get(key) != value:
            raise ConfigError(key, value, f"{facts['plan'].get(key)!r}, as in the checkpoint {path}")
    for name, p in model.named_parameters():
        p.copy_(tensors[f"parameter.{name}"])
    for i, optimizer in enumerate(optimizers):
        own = {name.removeprefix(f"{i}."): value for name, value in tensors.items() if name.startswith(f"{i}.")}
        restore_optimizer(optimizer, own)
    return facts["step"], facts["curve"], facts["seconds"]
