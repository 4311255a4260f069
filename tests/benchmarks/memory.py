"""How far memory predictions are off: the instant formula against the tracer, and both against steps that really ran.

run_formula: random combinations of architecture, method, precision, batch, length and switches; nothing is allocated.
predict, then run_measured: predictions are written down first (and committed), then the same steps are run."""

import gc
import json
import random
import statistics
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS, machine_facts
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig

from lora_engine import calc
from lora_engine.config import (
    BottleneckConfig,
    FullConfig,
    HeadConfig,
    IA3Config,
    LoraConfig,
    MethodConfig,
    PrefixConfig,
    TrainConfig,
    to_dict,
)
from lora_engine.training.trace import CATEGORIES, trace_step

PREDICTIONS = RESULTS / "memory_predictions.json"
TOKENS = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
NO_DROPOUT = {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "dropout": 0.0}
FAMILIES = ("llama", "gpt2", "phi3", "gemma", "gemma2", "qwen3", "gpt_neox", "opt", "mixtral", "qwen3_moe", "bert")
# hidden size, heads, key-value heads, intermediate size, vocabulary
SIZES = ((256, 8, 2, 688, 2000), (1024, 16, 4, 2816, 32000), (2048, 32, 8, 8192, 128256))
METHODS: tuple[MethodConfig, ...] = (
    LoraConfig(r=8),
    LoraConfig(r=64),
    LoraConfig(r=16, target_modules="attention"),
    LoraConfig(r=8, target_modules="mlp"),
    LoraConfig(r=8, use_dora=True),
    FullConfig(),
    FullConfig(),
    HeadConfig(),
    BottleneckConfig(),
    PrefixConfig(),
    IA3Config(),
)


@dataclass(frozen=True)
class Case:
    """One step to predict."""

    family: str
    size: tuple[int, int, int, int, int]
    layers: int
    method: MethodConfig
    train: TrainConfig
    attention: str = "sdpa"
    labelled_share: float = 1.0

    @property
    def settings(self) -> dict[str, Any]:
        """For `estimate_memory`."""
        return {
            "precision": self.train.precision,
            "batch_size": self.train.batch_size,
            "seq_length": self.train.max_length,
            "optimizer": self.train.optimizer,
            "checkpointing": self.train.checkpointing,
            "accumulation": self.train.accumulation,
            "attention": self.attention,
            "labelled_share": self.labelled_share,
        }

    def to_row(self) -> dict[str, Any]:
        method = {key: value for key, value in to_dict(self.method).items() if value not in (None, [], {}, False, 0.0)}
        return {"family": self.family, "size": self.size, "layers": self.layers, "method": method} | self.settings


def config_of(family: str, size: tuple[int, int, int, int, int], layers: int) -> PreTrainedConfig:
    """transformers' config of a model of these sizes, its dropout off."""
    hidden, heads, kv_heads, inner, vocab = size
    facts: dict[str, Any] = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "vocab_size": vocab,
        "max_position_embeddings": 8192,
        **TOKENS,
    }
    if family not in ("phi", "gpt_neox", "opt", "bert"):
        facts |= {"num_key_value_heads": kv_heads, "head_dim": hidden // heads}
    if family == "gpt2":
        facts = {"n_embd": hidden, "n_layer": layers, "n_head": heads, "vocab_size": vocab, "n_positions": 8192}
        facts |= NO_DROPOUT | {"bos_token_id": 0, "eos_token_id": 0}
    elif family == "opt":
        facts |= {"ffn_dim": facts.pop("intermediate_size")} | NO_DROPOUT
    elif family == "mixtral":
        facts |= {"num_local_experts": 8, "num_experts_per_tok": 2}
    elif family == "qwen3_moe":
        facts |= {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": inner // 4}
    elif family == "bert":
        facts |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "architectures": ["BertForMaskedLM"]}
    config: PreTrainedConfig = CONFIG_MAPPING[family](**facts)
    return config


def random_cases(count: int, seed: int = 0) -> Iterator[Case]:
    """`count` combinations that exist: what a method refuses is drawn again."""
    rng = random.Random(seed)
    made = 0
    while made < count:
        family, method = rng.choice(FAMILIES), rng.choice(METHODS)
        experts = family in ("mixtral", "qwen3_moe")
        adapted = isinstance(method, LoraConfig) and method.target_modules != "attention"
        if experts and ((adapted and method.use_dora) or getattr(method, "target_modules", "") == "mlp"):
            continue  # no Linear there
        if (experts or family == "bert") and method.method in ("bottleneck", "ia3", "head", "prefix"):
            continue
        precision = rng.choice(("fp32", "bf16", "fp16", "mixed-bf16"))
        if precision == "fp16" and method.method == "full":
            precision = "bf16"
        train = TrainConfig(
            precision=precision,
            batch_size=rng.choice((1, 2, 8)),
            max_length=rng.choice((32, 128, 512, 2048, 8192 if method.method != "prefix" else 4096)),
            checkpointing=rng.random() < 0.4,
            optimizer=rng.choice(("adamw", "adamw", "sgd")),
            accumulation=rng.choice((1, 1, 1, 2)),
        )
        attention = "eager" if family == "gemma2" else rng.choice(("sdpa", "sdpa", "eager"))
        yield Case(
            family, rng.choice(SIZES), rng.choice((2, 3, 4)), method, train, attention, rng.choice((1.0, 1.0, 0.3))
        )
        made += 1


def compare(case: Case) -> dict[str, Any]:
    """The traced and the predicted peak of `case`, term by term, and the difference in percent of the traced."""
    config = config_of(case.family, case.size, case.layers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = trace_step(
            config, case.method, case.train, attention=case.attention, labelled_share=case.labelled_share
        )
    shape = calc.shape_from_config(config.to_dict(), case.family)
    predicted = calc.estimate_memory(shape, case.method, **case.settings)
    return case.to_row() | {
        "traced_bytes": traced.peak_bytes,
        "predicted_bytes": predicted.peak_bytes,
        "difference_percent": 100.0 * (predicted.peak_bytes / traced.peak_bytes - 1.0),
        "traced_phase": traced.peak_phase,
        "predicted_moment": predicted.moment,
        "traced_terms": traced.terms,
        "predicted_terms": dict(predicted.terms),
    }


def spread(differences: list[float]) -> dict[str, float]:
    """Median, 95th percentile and worst of absolute differences in percent."""
    sizes = sorted(abs(value) for value in differences)
    return {
        "count": len(sizes),
        "median_percent": statistics.median(sizes),
        "p95_percent": sizes[round(0.95 * (len(sizes) - 1))],
        "worst_percent": sizes[-1],
    }


def exact_terms(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Per term in percent of the traced peak; temporaries go by what they are for, so the last three are one."""
    table = {}
    for name in CATEGORIES[:4]:
        off = [100.0 * (r["predicted_terms"][name] - r["traced_terms"][name]) / r["traced_bytes"] for r in rows]
        same = [value for value, r in zip(off, rows, strict=True) if _same_moment(r) or name != "gradients"]
        table[name] = spread(same)
    derived = CATEGORIES[4:]
    off = [
        100.0
        * (sum(r["predicted_terms"][n] for n in derived) - sum(r["traced_terms"][n] for n in derived))
        / r["traced_bytes"]
        for r in rows
        if _same_moment(r)
    ]
    return table | {"activations + logits + overhead": spread(off)}


def _same_moment(row: dict[str, Any]) -> bool:
    return row["predicted_moment"] == row["traced_phase"] == "loss"


def run_formula(count: int = 300) -> dict[str, Any]:
    """The formula against the tracer: spread over all, by family and by method, per-term table, and every row."""
    began = time.perf_counter()
    rows = [compare(case) for case in random_cases(count, seed=9)]

    def by(key: Any) -> dict[str, Any]:
        names = sorted({key(row) for row in rows})
        return {name: spread([r["difference_percent"] for r in rows if key(r) == name]) for name in names}

    return {
        "all": spread([row["difference_percent"] for row in rows]),
        "by_family": by(lambda row: row["family"]),
        "by_method": by(lambda row: row["method"]["method"]),
        "by_precision": by(lambda row: row["precision"]),
        "by_checkpointing": by(lambda row: str(row["checkpointing"])),
        "terms": exact_terms(rows),
        "seconds": time.perf_counter() - began,
        "rows": rows,
    }


MEDIUM = (768, 12, 4, 2048, 32000)
GPT2 = (768, 12, 12, 3072, 50257)
EXPERTS = (512, 8, 2, 1024, 8000)
BILLION = (2048, 32, 8, 5632, 32000)  # 22 layers: nearly TinyLlama


def _step(precision: str, batch_size: int, max_length: int, *, checkpointing: bool = False) -> TrainConfig:
    return TrainConfig(precision=precision, batch_size=batch_size, max_length=max_length, checkpointing=checkpointing)


_ATTENTION = LoraConfig(r=8, target_modules="attention")
MEASURED = [
    Case("llama", MEDIUM, 6, LoraConfig(r=8), _step("fp32", 2, 256)),
    Case("llama", MEDIUM, 6, LoraConfig(r=8), _step("bf16", 2, 256)),
    Case("llama", MEDIUM, 6, LoraConfig(r=64), _step("mixed-bf16", 2, 256)),
    Case("llama", MEDIUM, 6, FullConfig(), _step("fp32", 2, 128)),
    Case("llama", MEDIUM, 6, FullConfig(), _step("bf16", 2, 128)),
    Case("llama", MEDIUM, 6, FullConfig(), _step("bf16", 4, 512, checkpointing=True)),
    Case("llama", MEDIUM, 12, LoraConfig(r=8, use_dora=True), _step("bf16", 2, 256)),
    Case("llama", MEDIUM, 6, LoraConfig(r=8), _step("fp32", 1, 512), "eager"),
    Case("llama", MEDIUM, 6, LoraConfig(r=8), _step("bf16", 2, 256), "sdpa", 0.3),
    Case("llama", MEDIUM, 6, HeadConfig(), _step("fp32", 2, 256)),
    Case("llama", MEDIUM, 6, BottleneckConfig(), _step("fp32", 2, 256)),
    Case("llama", MEDIUM, 6, PrefixConfig(), _step("fp32", 2, 256)),
    Case("llama", MEDIUM, 6, IA3Config(), _step("fp32", 2, 256)),
    Case("gpt2", GPT2, 12, LoraConfig(r=8), _step("bf16", 2, 256)),
    Case("gpt2", GPT2, 12, FullConfig(), _step("fp32", 1, 256)),
    Case("phi3", MEDIUM, 6, LoraConfig(r=16), _step("bf16", 2, 256)),
    Case("gemma", (1024, 8, 1, 4096, 64000), 4, LoraConfig(r=8), _step("bf16", 1, 256)),
    Case("qwen3", MEDIUM, 6, LoraConfig(r=8), _step("fp32", 2, 256)),
    Case("gpt_neox", MEDIUM, 6, FullConfig(), _step("bf16", 2, 256)),
    Case("opt", MEDIUM, 6, LoraConfig(r=8), _step("fp32", 2, 256)),
    Case("mixtral", EXPERTS, 4, _ATTENTION, _step("bf16", 2, 128)),
    Case("mixtral", EXPERTS, 4, FullConfig(), _step("bf16", 2, 128)),
    Case("bert", MEDIUM, 6, LoraConfig(r=8), _step("fp32", 4, 128)),
    Case("llama", BILLION, 22, LoraConfig(r=8), _step("bf16", 1, 256)),
    Case("llama", BILLION, 22, LoraConfig(r=64), _step("bf16", 2, 256, checkpointing=True)),
    Case("llama", BILLION, 22, _ATTENTION, _step("fp32", 1, 128)),
]


def predict() -> Path:
    """Write down what the formula and the tracer say of MEASURED, before anything is run."""
    rows = [compare(case) for case in MEASURED]
    PREDICTIONS.write_text(json.dumps({"machine": machine_facts(), "rows": rows}, indent=1) + "\n")
    return PREDICTIONS


def run_measured() -> dict[str, Any]:
    """Run every step of MEASURED on the CPU and hold its tracked peak against the predictions written before."""
    said = json.loads(PREDICTIONS.read_text())["rows"]
    rows = []
    for case, row in zip(MEASURED, said, strict=True):
        measured = measure(case)
        rows.append(
            {key: row[key] for key in case.to_row()}
            | {
                "measured_bytes": measured,
                "traced_bytes": row["traced_bytes"],
                "predicted_bytes": row["predicted_bytes"],
                "traced_percent": 100.0 * (row["traced_bytes"] / measured - 1.0),
                "predicted_percent": 100.0 * (row["predicted_bytes"] / measured - 1.0),
            }
        )
    return {
        "tracer": spread([row["traced_percent"] for row in rows]),
        "formula": spread([row["predicted_percent"] for row in rows]),
        "rows": rows,
    }


def measure(case: Case) -> int:
    """Peak of the bytes of all live tensors in the second of two real steps on the CPU."""
    import torch
    from transformers import AutoModelForMaskedLM

    from lora_engine.methods import inject
    from lora_engine.training.base import autocast_of, prepare_model, weight_dtype
    from lora_engine.training.batches import label_batch
    from lora_engine.training.loop import build_optimizer
    from lora_engine.training.loss import labelled_loss_sum
    from lora_engine.training.measure import PeakMemory

    cpu = torch.device("cpu")
    config = config_of(case.family, case.size, case.layers)
    kind: Any = AutoModelForMaskedLM if case.family == "bert" else AutoModelForCausalLM
    torch.manual_seed(0)
    model = kind.from_config(config, dtype=weight_dtype(case.train, cpu), attn_implementation=case.attention)
    prepare_model(model, case.train)
    inject(model, case.method)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = build_optimizer(trained, case.train)
    ids = torch.randint(0, case.size[4], (case.train.batch_size, case.train.max_length))
    labels = ids.clone()
    labels[:, : round(case.train.max_length * (1 - case.labelled_share))] = -100
    batch = label_batch(ids, labels, cpu)
    memory = PeakMemory(model, optimizer, cpu)

    def step() -> None:
        with autocast_of(case.train, cpu):
            loss = labelled_loss_sum(model, batch) / batch.num_labels
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    gc.collect()
    with memory.watch():
        step()
    return memory.peak_bytes
