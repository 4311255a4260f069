"""Memory figures that others have published, beside ours: `python tests/calc/published.py` prints the table.

Nothing here is fitted. Rows where we are off stay, with what we know of the reason.
"""

from dataclasses import dataclass, field
from typing import Any

from lora_engine import calc
from lora_engine.calc.structure import ModelShape
from lora_engine.config import FullConfig, LoraConfig, MethodConfig
from lora_engine.text import table_text

GB, GIB = 10**9, 2**30
# What was read off: torch.cuda.max_memory_allocated, max_memory_reserved, active_bytes of memory_stats.
ALLOCATED, RESERVED, ACTIVE = "allocated", "reserved", "active"

# What is the same in all rows of one source, and not in our estimate.
LITGPT = (
    "LitGPT's own model and loss: the head is taken in chunks of 128 tokens, adapters are bfloat16, dropout on their "
    "inputs keeps a mask and the dropped copy, q, k and v are one map."
)
# bitsandbytes/autograd/_functions.py, MatMul4Bit.forward: ctx.tensors = (A, B) then, (None, B) since.
LITGPT_NF4 = (
    f"{LITGPT} bitsandbytes of that time kept the input of every quantised map until backward, which never reads it; "
    "the output head is quantised too, ours stays in 16 bits."
)
PHI = " transformers writes gelu_new out in Python, which keeps four tensors of the inner width; torch's own keeps one."
PEFT = (
    "Adapters in float32 see float32 copies of their inputs, which our layer does not make. 4 x 768 tokens is the "
    "longest batch that is possible, not a stated one. Reserved: the allocator's rounding is in it."
)
TOGETHER = (
    "Gradients are freed before each forward, so they take the place of activations; our point counts both, our low "
    "end lets them take turns."
)
TORCHTUNE = f"torchtune's own model. {TOGETHER}"


@dataclass(frozen=True)
class Published:
    """`meaning` is what was read off; `settings` are those of `calc.estimate_memory`."""

    model: str
    method: MethodConfig
    settings: dict[str, Any]
    value: float
    unit: int
    meaning: str
    source: str
    note: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def published_bytes(self) -> float:
        return self.value * self.unit

    def shape(self) -> ModelShape:
        return calc.shape_from_config(self.facts, self.model) if self.facts else calc.load_shape(self.model)

    def predicted(self) -> calc.MemoryEstimate:
        return calc.estimate_memory(self.shape(), self.method, **self.settings)

    def difference_percent(self) -> float:
        return 100.0 * (self.predicted().peak_bytes / self.published_bytes - 1.0)

    def within(self) -> bool:
        """Whether the published figure lies in our interval."""
        memory = self.predicted()
        return memory.low_bytes <= self.published_bytes <= memory.high_bytes


def _qv(r: int) -> LoraConfig:
    return LoraConfig(r=r, target_modules=("q_proj", "v_proj"))


def _step(precision: str, batch: int, length: int, **more: Any) -> dict[str, Any]:
    return {"precision": precision, "batch_size": batch, "seq_length": length, "adapter_dtype": "bf16"} | more


PHI_15 = {
    "model_type": "phi",
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "intermediate_size": 8192,
    "vocab_size": 51200,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "resid_pdrop": 0.0,
}
LLAMA_2, LLAMA_2_13B = "meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-13b-hf"
INSIGHTS = "Raschka, Finetuning LLMs with LoRA and QLoRA: Insights from Hundreds of Experiments (Lightning AI, 2023)"
TABLES = "LitGPT, tutorials/resource-tables.md (October 2023, A100 40 GB), Finetuning with LoRA on 1 GPU"
HUB = "LitGPT, config_hub/finetune/README.md and the YAML beside it (1 x A10G)"
MATH = "PEFT, method_comparison/MetaMathQA/results (June and October 2025, L40S)"
FLAGS = "torchtune, README.md, Optimization flags (A100)"
LONGEST = "Alpaca's longest example has 1304 tokens here (resource tables)."


def _table(
    model: str, method: LoraConfig, precision: str, batch: int, length: int, value: float, **more: Any
) -> Published:
    note = (LITGPT if precision == "bf16" else LITGPT_NF4) + (PHI if "phi-" in model else "")
    return Published(model, method, _step(precision, batch, length), value, GB, ALLOCATED, TABLES, note, **more)


def _hub(model: str, method: MethodConfig, precision: str, batch: int, value: float) -> Published:
    note = (LITGPT_NF4 if precision == "nf4" else LITGPT) + (PHI if model.endswith("phi-2") else "")
    if isinstance(method, FullConfig):
        note = f"LitGPT's own model and loss: the head is taken in chunks of 128 tokens. {TOGETHER}"
    return Published(model, method, _step(precision, batch, 512), value, GB, ALLOCATED, HUB, note)


def _peft(method: MethodConfig, value: float) -> Published:
    options = _step("bf16", 4, 768, adapter_dtype="fp32")
    return Published(
        "meta-llama/Llama-3.2-3B",
        method,
        options,
        value,
        1,
        RESERVED,
        MATH,
        TOGETHER if isinstance(method, FullConfig) else PEFT,
    )


MLP = ("gate_proj", "up_proj", "down_proj")
EVERY = ("q_proj", "k_proj", "v_proj", "o_proj", *MLP, "lm_head")
PHI_EVERY = ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2", "lm_head")
PHI_3_EVERY = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head")

PUBLISHED: tuple[Published, ...] = (
    Published(
        LLAMA_2,
        _qv(8),
        _step("bf16", 1, 512),
        21.33,
        GB,
        ALLOCATED,
        INSIGHTS,
        f"Asked for at 512 tokens, but {LONGEST} The same figure at that length is the next row. {LITGPT}",
    ),
    Published(LLAMA_2, _qv(8), _step("bf16", 1, 1304), 21.33, GB, ALLOCATED, INSIGHTS, f"{LONGEST} {LITGPT}"),
    Published(LLAMA_2, _qv(8), _step("nf4", 1, 1304), 14.18, GB, ALLOCATED, INSIGHTS, f"{LONGEST} {LITGPT_NF4}"),
    _table(LLAMA_2, _qv(8), "bf16", 1, 1304, 21.30),
    _table(LLAMA_2, _qv(8), "nf4", 1, 1304, 14.14),
    _table(LLAMA_2, _qv(8), "nf4-dq", 1, 1304, 13.84),
    _table(LLAMA_2, _qv(8), "bf16", 2, 1304, 29.07),
    _table(LLAMA_2_13B, _qv(8), "bf16", 1, 1304, 38.12),
    _table(LLAMA_2_13B, _qv(8), "nf4", 1, 1304, 23.14),
    _table(LLAMA_2_13B, _qv(8), "nf4-dq", 1, 1304, 22.55),
    _table("microsoft/phi-1_5", _qv(8), "bf16", 1, 1044, 4.82, facts=PHI_15),
    _table("microsoft/phi-1_5", _qv(8), "bf16", 2, 1044, 6.76, facts=PHI_15),
    _table("microsoft/phi-1_5", _qv(8), "bf16", 4, 1044, 10.68, facts=PHI_15),
    _table("microsoft/phi-1_5", _qv(8), "nf4", 1, 1044, 3.78, facts=PHI_15),
    _hub(LLAMA_2, _qv(32), "bf16", 2, 19.77),
    _hub(LLAMA_2, _qv(32), "nf4", 2, 13.68),
    _hub("meta-llama/Llama-3.1-8B", _qv(32), "bf16", 1, 19.73),
    _hub("meta-llama/Llama-3.1-8B", _qv(32), "nf4", 2, 17.41),
    _hub("mistralai/Mistral-7B-v0.1", _qv(32), "bf16", 2, 20.66),
    _hub("mistralai/Mistral-7B-v0.1", _qv(32), "nf4", 2, 14.29),
    _hub("TinyLlama/TinyLlama-1.1B-Chat-v1.0", FullConfig(), "bf16", 4, 14.10),
    _hub("TinyLlama/TinyLlama-1.1B-Chat-v1.0", LoraConfig(r=32, target_modules=EVERY), "bf16", 8, 13.50),
    _hub("microsoft/phi-2", LoraConfig(r=8, target_modules=PHI_EVERY), "bf16", 4, 13.98),
    _hub("microsoft/Phi-3-mini-4k-instruct", LoraConfig(r=8, target_modules=PHI_3_EVERY), "bf16", 4, 19.75),
    _peft(_qv(32), 22273851392),
    _peft(LoraConfig(r=10, target_modules=MLP), 24712839168),
    _peft(FullConfig(), 37241225216),
    Published("meta-llama/Llama-3.2-3B", FullConfig(), _step("bf16", 2, 4096), 60.0, GIB, ACTIVE, FLAGS, TORCHTUNE),
    Published(
        "meta-llama/Llama-3.2-3B",
        FullConfig(),
        _step("bf16", 2, 4096, checkpointing=True),
        24.9,
        GIB,
        ACTIVE,
        FLAGS,
        f"{TORCHTUNE} Compiled, and cross-entropy over eight chunks of the logits; we count them whole, in float32 "
        "(12.6 GB of ours).",
    ),
)


def rows() -> list[list[str]]:
    """Model, method, precision, batch x tokens, what was read off, published, ours, difference, in our interval."""
    table = []
    for row in PUBLISHED:
        method = row.method
        name = "full"
        if isinstance(method, LoraConfig):
            name = f"LoRA r={method.r} " + ",".join(t.removesuffix("_proj") for t in method.target_modules)
        options = row.settings
        unit, scale = ("GiB", GIB) if row.unit == GIB else ("GB", GB)
        table.append(
            [
                row.model.rpartition("/")[2],
                name,
                options["precision"] + (" ckpt" if options.get("checkpointing") else ""),
                f"{options['batch_size']} x {options['seq_length']}",
                row.meaning,
                f"{row.published_bytes / scale:.2f} {unit}",
                f"{row.predicted().peak_bytes / scale:.2f} {unit}",
                f"{row.difference_percent():+.1f} %",
                "yes" if row.within() else "no",
                row.source.partition(",")[0],
            ]
        )
    return table


def text() -> str:
    headings = [
        "model",
        "method",
        "precision",
        "batch",
        "read",
        "published",
        "ours",
        "difference",
        "in interval",
        "source",
    ]
    return table_text(headings, rows())


if __name__ == "__main__":
    print(text())
