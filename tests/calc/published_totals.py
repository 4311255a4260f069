"""Total parameters that others have published, and where; what such a figure has beside the model's own.

Sources, by their short names:
  hub       the hub's model API, `safetensors.total` (what a model card shows as "Model size"); as of September 2026
  mirror    the same, of a mirror or a fine-tune of the same shape, named behind it
  card      a table in the repository's model card (README.md)
  keras-hub keras_hub/src/models/<family>/<family>_presets.py, "params"
  count     sum(p.numel()) or num_parameters() of the loaded model, as printed in the project named behind it
A whole number is exact; a text like "41.87B" is rounded to its own digits.
"""

from collections.abc import Callable

from lora_engine.calc.structure import ModelShape

PUBLISHED_TOTALS: dict[str, tuple[int | str, str]] = {
    "openai-community/gpt2": (124_439_808, "keras-hub"),
    "openai-community/gpt2-medium": (354_823_168, "keras-hub"),
    "openai-community/gpt2-large": (774_030_080, "keras-hub"),
    "openai-community/gpt2-xl": (1_557_611_200, "keras-hub"),
    "EleutherAI/gpt-neo-1.3B": (1_315_575_808, "count (HiQ, print_model)"),
    "EleutherAI/gpt-neo-2.7B": (2_651_307_520, "count (a benchmark's log)"),
    "EleutherAI/gpt-j-6b": (6_050_882_784, "count (a LoRA project's README; 117,440,540 buffer values apart)"),
    "EleutherAI/pythia-70m": (70_426_624, "card"),
    "EleutherAI/pythia-160m": (162_322_944, "card"),
    "EleutherAI/pythia-410m": (405_334_016, "card"),
    "EleutherAI/pythia-1b": (1_011_781_632, "card"),
    "EleutherAI/pythia-1.4b": (1_414_647_808, "card"),
    "EleutherAI/pythia-2.8b": (2_775_208_960, "card"),
    "EleutherAI/pythia-6.9b": (6_857_302_016, "card"),
    "EleutherAI/pythia-12b": (11_846_072_320, "card"),
    "EleutherAI/gpt-neox-20b": (20_554_567_680, "card"),
    "facebook/opt-125m": (125_237_760, "keras-hub"),
    "facebook/opt-1.3b": (1_315_753_984, "keras-hub"),
    "facebook/opt-6.7b": (6_658_473_984, "PEFT's int8 notebook: 6,666,862,592 with 8,388,608 of LoRA"),
    "bigscience/bloom-560m": (559_214_592, "hub, as huggingface_hub's own tests read it"),
    "bigscience/bloom-7b1": (7_069_016_064, "count (mGPT's evaluation)"),
    "tiiuae/falcon-7b": (7_217_189_760, "count (a training service's table)"),
    "tiiuae/falcon-40b": (41_835_970_560, "hub"),
    "tiiuae/falcon-180B": (179_522_565_120, "hub"),
    "HuggingFaceTB/SmolLM2-135M": (134_515_008, "mirror: HuggingFaceTB/SmolLM2-135M-Instruct"),
    "HuggingFaceTB/SmolLM2-360M": (361_821_120, "mirror: HuggingFaceTB/SmolLM2-360M-Instruct"),
    "HuggingFaceTB/SmolLM2-1.7B": (1_711_376_384, "mirror: HuggingFaceTB/SmolLM2-1.7B-Instruct"),
    "HuggingFaceTB/SmolLM3-3B": (3_075_098_624, "hub"),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": (1_100_048_384, "hub"),
    "meta-llama/Llama-2-7b-hf": (6_738_417_664, "hub"),
    "meta-llama/Llama-2-13b-hf": (13_015_866_880, "hub"),
    "meta-llama/Llama-2-70b-hf": (68_976_653_312, "hub"),
    "meta-llama/Meta-Llama-3-8B": (8_030_261_248, "keras-hub"),
    "meta-llama/Meta-Llama-3-70B": (70_553_706_496, "mirror: NousResearch/Meta-Llama-3-70B"),
    "meta-llama/Llama-3.1-8B": (8_030_261_248, "hub"),
    "meta-llama/Llama-3.1-70B": (70_553_706_496, "hub"),
    "meta-llama/Llama-3.1-405B": (405_853_388_800, "hub"),
    "meta-llama/Llama-3.2-1B": (1_235_814_400, "mirror: meta-llama/Llama-3.2-1B-Instruct"),
    "meta-llama/Llama-3.2-3B": (3_212_749_824, "mirror: meta-llama/Llama-3.2-3B-Instruct"),
    "meta-llama/Llama-3.3-70B-Instruct": (70_553_706_496, "hub"),
    "mistralai/Mistral-7B-v0.1": (7_241_732_096, "hub"),
    "mistralai/Mistral-7B-v0.3": (7_248_023_552, "hub"),
    "mistralai/Ministral-8B-Instruct-2410": (8_019_808_256, "hub"),
    "mistralai/Mistral-Nemo-Instruct-2407": (12_247_782_400, "hub"),
    "mistralai/Mistral-Small-24B-Base-2501": (23_572_403_200, "keras-hub (Devstral Small and Magistral Small)"),
    "Qwen/Qwen2.5-0.5B": (494_032_768, "mirror: Qwen/Qwen2.5-0.5B-Instruct"),
    "Qwen/Qwen2.5-1.5B": (1_543_714_304, "mirror: Qwen/Qwen2.5-1.5B-Instruct"),
    "Qwen/Qwen2.5-3B": (3_085_938_688, "mirror: Qwen/Qwen2.5-3B-Instruct"),
    "Qwen/Qwen2.5-7B": (7_615_616_512, "mirror: Qwen/Qwen2.5-7B-Instruct"),
    "Qwen/Qwen2.5-14B": (14_770_033_664, "count (a memory calculator's table)"),
    "Qwen/Qwen2.5-32B": (32_763_876_352, "keras-hub"),
    "Qwen/Qwen2.5-72B": (72_706_203_648, "mirror: Qwen/Qwen2.5-72B-Instruct"),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": (1_777_088_000, "count (a pruning project's script)"),
    "Qwen/Qwen3-0.6B": (751_632_384, "hub"),
    "Qwen/Qwen3-1.7B": (2_031_739_904, "hub"),
    "Qwen/Qwen3-4B": (4_022_468_096, "hub"),
    "Qwen/Qwen3-8B": (8_190_735_360, "hub"),
    "Qwen/Qwen3-14B": (14_768_307_200, "keras-hub"),
    "Qwen/Qwen3-32B": (32_762_123_264, "hub"),
    "microsoft/phi-1_5": (1_418_270_720, "hub"),
    "microsoft/phi-2": (2_779_683_840, "hub"),
    "microsoft/Phi-3-mini-4k-instruct": (3_821_079_552, "hub"),
    "microsoft/Phi-3-medium-4k-instruct": (13_960_238_080, "count (a training service's table)"),
    "microsoft/Phi-3.5-mini-instruct": (3_821_079_552, "hub"),
    "microsoft/phi-4": (14_659_507_200, "hub"),
    "microsoft/Phi-4-mini-instruct": (3_836_021_760, "hub"),
    "google/gemma-2b": (2_506_172_416, "keras-hub"),
    "google/gemma-7b": (8_537_680_896, "keras-hub"),
    "google/gemma-2-2b": (2_614_341_888, "keras-hub"),
    "google/gemma-2-9b": (9_241_705_984, "keras-hub"),
    "google/gemma-2-27b": (27_227_128_320, "keras-hub"),
    "google/gemma-3-270m": (268_098_176, "keras-hub"),
    "google/gemma-3-1b-it": (999_885_952, "hub"),
    "google/gemma-3-4b-it": (4_300_079_472, "hub"),
    "google/gemma-3-12b-it": (12_187_325_040, "mirror: unsloth/gemma-3-12b-it"),
    "google/gemma-3-27b-it": (27_432_406_640, "mirror: unsloth/gemma-3-27b-it"),
    "allenai/OLMo-2-0425-1B": (1_484_916_736, "hub"),
    "allenai/OLMo-2-1124-7B": (7_298_617_344, "hub"),
    "allenai/OLMo-2-1124-13B": (13_716_198_400, "hub"),
    "stabilityai/stablelm-3b-4e1t": (2_795_443_200, "card"),
    "stabilityai/stablelm-2-1_6b": (1_644_515_328, "count (a comparison of its report with Danube's)"),
    "ibm-granite/granite-3.3-2b-instruct": (2_533_539_840, "hub"),
    "ibm-granite/granite-3.3-8b-instruct": (8_170_864_640, "hub"),
    "mistralai/Mixtral-8x7B-v0.1": (46_702_792_704, "keras-hub"),
    "mistralai/Mixtral-8x22B-v0.1": (140_620_634_112, "mirror: mistral-community/Mixtral-8x22B-v0.1"),
    "Qwen/Qwen1.5-MoE-A2.7B": (14_315_784_192, "keras-hub"),
    "Qwen/Qwen3-30B-A3B": (30_532_122_624, "hub"),
    "Qwen/Qwen3-235B-A22B": (235_093_634_560, "hub"),
    "meta-llama/Llama-4-Scout-17B-16E-Instruct": (108_641_793_536, "hub"),
    "meta-llama/Llama-4-Maverick-17B-128E-Instruct": (401_583_781_376, "hub"),
    "openai/gpt-oss-20b": (20_914_757_184, "hub"),
    "openai/gpt-oss-120b": (116_829_156_672, "hub"),
    "deepseek-ai/DeepSeek-V2-Lite": (15_706_484_224, "hub"),
    "deepseek-ai/DeepSeek-V2": (235_741_434_880, "hub"),
    "deepseek-ai/DeepSeek-V3": (
        671_026_419_200,
        "mirror: microsoft/MAI-DS-R1, of the same shape, in bf16 and without MTP",
    ),
    "deepseek-ai/DeepSeek-R1": (684_489_845_504, "hub"),
    "allenai/OLMoE-1B-7B-0924": (6_919_161_856, "hub"),
    "microsoft/Phi-3.5-MoE-instruct": ("41.87B", "hub"),
    "google-bert/bert-base-uncased": (110_106_428, "hub"),
    "google-bert/bert-large-uncased": (336_226_108, "hub"),
    "FacebookAI/roberta-base": (124_697_433, "hub"),
    "FacebookAI/roberta-large": (355_412_057, "hub"),
    "FacebookAI/xlm-roberta-base": (278_885_778, "hub"),
    "FacebookAI/xlm-roberta-large": (561_192_082, "hub"),
    "distilbert/distilbert-base-uncased": (66_985_530, "count (a comparison of DistilBERT with BERT)"),
    "microsoft/deberta-v3-xsmall": (70_682_112, "keras-hub"),
    "microsoft/deberta-v3-small": (141_304_320, "keras-hub"),
    "microsoft/deberta-v3-base": (183_831_552, "keras-hub"),
    "microsoft/deberta-v3-large": (434_012_160, "keras-hub"),
    "answerdotai/ModernBERT-base": (149_655_232, "hub"),
    "answerdotai/ModernBERT-large": (395_881_664, "hub"),
    "google-t5/t5-small": (60_506_880, "hub"),
    "google-t5/t5-base": (222_903_936, "hub"),
    "google-t5/t5-large": (737_668_608, "hub"),
    "google-t5/t5-3b": (2_851_599_360, "hub"),
    "google/flan-t5-small": (76_961_152, "count (a table of FLAN-T5 sizes)"),
    "google/flan-t5-base": (247_577_856, "keras-hub"),
    "google/flan-t5-large": (783_150_080, "count (a table of FLAN-T5 sizes)"),
    "google/flan-t5-xl": (2_849_757_184, "count (a table of FLAN-T5 sizes)"),
}

# Of these no exact figure was found; their facts follow the papers and the sources that convert their weights.
NO_TOTAL_FOUND = {
    "EleutherAI/gpt-neo-125m",
    "facebook/opt-350m",
    "facebook/opt-2.7b",
    "facebook/opt-13b",
    "facebook/opt-30b",
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
    "deepseek-ai/DeepSeek-R1-Distill-Llama-70B",
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B",
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B",
    "tiiuae/Falcon3-7B-Base",
    "CohereLabs/c4ai-command-r-v01",
    "bigcode/starcoder2-3b",
    "bigcode/starcoder2-7b",
}


def _embedding(shape: ModelShape) -> int:
    return shape.vocab_size * shape.hidden_size


def _layer(shape: ModelShape, index: int) -> int:
    parts = (*shape.linears, *shape.others, *shape.experts)
    return sum(part.num_parameters for part in parts if index in shape.layers_of(part))


def _correction(shape: ModelShape, num_layers: int) -> int:
    """DeepSeek-V3's routers keep a bias for each expert, which is no parameter in transformers: a buffer."""
    return num_layers * shape.moe.num_experts if shape.moe else 0


def _prediction_layer(shape: ModelShape) -> int:
    """DeepSeek-V3's layer for multi-token prediction (2024, section 2.2): a layer like the last, a map of two
    hidden states to one, three norms, and copies of embedding and head."""
    h = shape.hidden_size
    return _layer(shape, shape.num_layers - 1) + _correction(shape, 1) + 2 * h * h + 3 * h + 2 * _embedding(shape)


# What a published figure has beside the parameters of the class that transformers builds, computed, and why.
# Apart from these, the names' own figures differ: GPT-2's "117M" and "345M" are the paper's miscount of 124M and
# 355M; GPT-J's card says 6,053,381,344; "8x7B" is 46.7B, as the experts share everything but their MLPs.
_STORED_HEAD = (_embedding, "the checkpoint stores the head, which is tied to the embedding, once more")
_CROSS_BIAS = (
    lambda shape: 32 * shape.num_heads,
    "the checkpoint has a table of relative positions for cross-attention, which transformers ignores",
)
_INV_FREQ = (
    lambda shape: shape.num_layers * shape.head_dim // 2,
    "the checkpoint stores each layer's rotary frequencies, which are no parameters",
)
_NO_OFFSET = (lambda shape: -2 * shape.hidden_size, "KerasHub leaves out the two unused rows of OPT's positions")
_PRETRAINING = (
    lambda shape: shape.hidden_size**2 + shape.hidden_size + 2 * shape.hidden_size + 2,
    "the checkpoint is of BertForPreTraining: the pooler and next-sentence prediction beside the masked words",
)
_POOLER = (
    lambda shape: shape.hidden_size**2 + shape.hidden_size,
    "the checkpoint has a pooler, which this class has not",
)

EXTRA: dict[str, tuple[Callable[[ModelShape], int], str]] = {
    **dict.fromkeys(("tiiuae/falcon-7b", "tiiuae/falcon-40b", "tiiuae/falcon-180B"), _STORED_HEAD),
    **dict.fromkeys(("Qwen/Qwen3-0.6B", "Qwen/Qwen3-1.7B"), _STORED_HEAD),
    **{f"google/flan-t5-{size}": _STORED_HEAD for size in ("small", "base", "large", "xl")},
    **{f"google-t5/t5-{size}": _CROSS_BIAS for size in ("small", "base", "large", "3b")},
    **{f"meta-llama/Llama-2-{size}-hf": _INV_FREQ for size in ("7b", "13b", "70b")},
    **{f"facebook/opt-{size}": _NO_OFFSET for size in ("125m", "1.3b")},
    **{f"google-bert/bert-{size}-uncased": _PRETRAINING for size in ("base", "large")},
    **{f"FacebookAI/xlm-roberta-{size}": _POOLER for size in ("base", "large")},
    "deepseek-ai/DeepSeek-V3": (
        lambda shape: _correction(shape, 58),
        "the routers' biases; the 685B of the hub are these weights with the prediction layer and FP8's scales",
    ),
    "deepseek-ai/DeepSeek-R1": (
        lambda shape: _correction(shape, 58) + _prediction_layer(shape),
        "the routers' biases and the layer for multi-token prediction, which transformers does not build",
    ),
}

# What the hub's config.json says of the part that reads images; the figures above include it.
VISION: dict[str, dict[str, int | bool]] = {
    "Gemma3ForConditionalGeneration": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "image_size": 896,
        "patch_size": 14,
        "vision_use_head": False,
    },
    "Llama4ForConditionalGeneration": {
        "hidden_size": 1408,
        "intermediate_size": 5632,
        "num_attention_heads": 16,
        "num_hidden_layers": 34,
        "image_size": 336,
        "patch_size": 14,
        "projector_input_dim": 4096,
        "projector_output_dim": 4096,
        "vision_output_dim": 4096,
    },
}

# Parameters that a token meets, as the cards and papers round them; with the embedding counted, or without it.
PUBLISHED_ACTIVE: dict[str, tuple[str, bool]] = {
    "mistralai/Mixtral-8x7B-v0.1": ("12.9B", True),
    "mistralai/Mixtral-8x22B-v0.1": ("39B", True),
    "Qwen/Qwen1.5-MoE-A2.7B": ("2.7B", True),
    "Qwen/Qwen3-235B-A22B": ("22B", True),
    "meta-llama/Llama-4-Scout-17B-16E-Instruct": ("17B", True),
    "meta-llama/Llama-4-Maverick-17B-128E-Instruct": ("17B", True),
    "openai/gpt-oss-20b": ("3.6B", False),
    "openai/gpt-oss-120b": ("5.1B", False),
    "deepseek-ai/DeepSeek-V2": ("21B", True),
    "deepseek-ai/DeepSeek-V3": ("37B", False),
    "allenai/OLMoE-1B-7B-0924": ("1.3B", True),
    "microsoft/Phi-3.5-MoE-instruct": ("6.6B", True),
}
