"""What is trained: a model, rows of real text and LoRA configurations, the same for everybody who is compared."""

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from lora_engine import calc
from lora_engine.assets_path import asset_path
from lora_engine.config import DataConfig, LoraConfig, RunConfig, TrainConfig
from lora_engine.data import IGNORED, Encoded, encode_text, load_tokenizer
from lora_engine.training.base import load_base, prepare_model, resolve_model, weight_dtype

TEXT = asset_path("datasets/short_stories.txt")
RANKS, ALPHAS, LRS, DECAYS = (1, 2, 4, 8, 16, 32), (8.0, 16.0, 24.0), (1e-3, 3e-3, 2e-3, 5e-3), (0.0, 0.01)
PAD_ID = 1
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
ENDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": PAD_ID}

# Built from these with random weights, so nothing is downloaded: (model_type, config.json).
FROM_CONFIG: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny Llama": (
        "llama",
        {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "vocab_size": 4096,
            "max_position_embeddings": 256,
        },
    ),
    "GPT-2 125M": ("gpt2", NO_DROPOUT),
    "Llama 1B": (
        "llama",
        {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "vocab_size": 128256,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        },
    ),
}


@dataclass(frozen=True, kw_only=True)
class Workload:
    """`num_configs` LoRA configurations, each `steps` steps of `batch_size` rows of `length` tokens, of which the
    first `masked` are not trained on."""

    model: str = "embedded"
    num_configs: int = 16
    steps: int = 20
    batch_size: int = 2
    length: int = 64
    masked: int = 0
    precision: str = "fp32"
    device: str = "cpu"

    @property
    def tokens(self) -> int:
        """Of one step of one configuration."""
        return self.batch_size * self.length

    @property
    def label(self) -> str:
        return f"{self.model}, {self.num_configs} x {self.tokens} tokens"

    @cached_property
    def rows(self) -> list[Encoded]:
        """Blocks of the bundled stories. The models without a tokenizer of their own read the same numbers."""
        ids = _story_ids()
        starts = range(0, len(ids) - self.length, self.length)
        return [
            Encoded(i, block, [IGNORED] * self.masked + block[self.masked :], truncated=False)
            for i, block in enumerate(ids[start : start + self.length] for start in starts)
        ]

    @cached_property
    def configs(self) -> list[RunConfig]:
        """Ranks 1 to 32, and other alpha, learning rate, weight decay and seed for each."""
        return [
            RunConfig(
                model=self.model,
                data=DataConfig(path=str(TEXT)),
                method=LoraConfig(r=RANKS[i % len(RANKS)], lora_alpha=ALPHAS[i // len(RANKS) % len(ALPHAS)]),
                train=replace(self.train, lr=LRS[i % len(LRS)], weight_decay=DECAYS[i % len(DECAYS)], seed=i),
            )
            for i in range(self.num_configs)
        ]

    @property
    def train(self) -> TrainConfig:
        return TrainConfig(
            steps=self.steps,
            batch_size=self.batch_size,
            max_length=self.length,
            precision=self.precision,
            device=self.device,
            eval_every=self.steps,
            checkpoint_every=1_000_000,
        )

    @property
    def flops(self) -> int:
        """Matrix products of all steps of all configurations, one after another."""
        shape = model_shape(self.model)
        return sum(
            c.train.steps * calc.estimate_step_flops(shape, c.method, self.batch_size, self.length)
            for c in self.configs
        )

    def load(self) -> Any:
        """A fresh base model on the device, in evaluation of nothing: as the loop takes it."""
        device = torch.device(self.device)
        if self.model not in FROM_CONFIG:
            return load_base(resolve_model(self.model), self.train, device)
        torch.manual_seed(0)
        with device:
            model = AutoModelForCausalLM.from_config(
                _config_of(self.model), dtype=weight_dtype(self.train, device), attn_implementation="sdpa"
            )
        prepare_model(model, self.train)
        return model


def model_shape(model: str) -> calc.ModelShape:
    if model not in FROM_CONFIG:
        return calc.load_shape(model)
    return calc.shape_from_config(_config_of(model).to_dict(), model)


def _config_of(model: str) -> Any:
    model_type, facts = FROM_CONFIG[model]
    return CONFIG_MAPPING[model_type](**facts, **ENDS)


@lru_cache
def _story_ids() -> list[int]:
    tokenizer = load_tokenizer(resolve_model("embedded"))
    return encode_text(TEXT.read_text(encoding="utf-8"), tokenizer, 1_000_000)[0]
