"""Decoders from Llama on."""

from typing import Any

from lora_engine.calc.catalog.spelling import rotary

_128K = 131072
_LLAMA_8B = (4096, 32, 32, 8, 14336, 128256)
_LLAMA_70B = (8192, 80, 64, 8, 28672, 128256)
_QWEN_7B = (3584, 28, 28, 4, 18944, 152064)
_QWEN_14B = (5120, 48, 40, 8, 13824, 152064)
_QWEN_32B = (5120, 64, 40, 8, 27648, 152064)
_PHI_MINI = (3072, 32, 32, 32, 8192, 32064)
_MISTRAL_7B = (4096, 32, 32, 8, 14336, 32000)


def _gemma3(sizes: tuple[int, int, int, int, int, int], head_dim: int) -> dict[str, Any]:
    """Reads images too; the language model is in `text_config`."""
    text = rotary("gemma3_text", sizes, _128K, True, head_dim=head_dim)
    return {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": text}


_LLAMA: dict[str, dict[str, Any]] = {
    "HuggingFaceTB/SmolLM2-135M": rotary("llama", (576, 30, 9, 3, 1536, 49152), 8192, True),
    "HuggingFaceTB/SmolLM2-360M": rotary("llama", (960, 32, 15, 5, 2560, 49152), 8192, True),
    "HuggingFaceTB/SmolLM2-1.7B": rotary("llama", (2048, 24, 32, 32, 8192, 49152), 8192, True),
    "HuggingFaceTB/SmolLM3-3B": rotary("smollm3", (2048, 36, 16, 4, 11008, 128256), 65536, True),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": rotary("llama", (2048, 22, 32, 4, 5632, 32000), 2048),
    "meta-llama/Llama-2-7b-hf": rotary("llama", (4096, 32, 32, 32, 11008, 32000), 4096),
    "meta-llama/Llama-2-13b-hf": rotary("llama", (5120, 40, 40, 40, 13824, 32000), 4096),
    "meta-llama/Llama-2-70b-hf": rotary("llama", (8192, 80, 64, 8, 28672, 32000), 4096),
    "meta-llama/Meta-Llama-3-8B": rotary("llama", _LLAMA_8B, 8192),
    "meta-llama/Meta-Llama-3-70B": rotary("llama", _LLAMA_70B, 8192),
    "meta-llama/Llama-3.1-8B": rotary("llama", _LLAMA_8B, _128K),
    "meta-llama/Llama-3.1-70B": rotary("llama", _LLAMA_70B, _128K),
    "meta-llama/Llama-3.1-405B": rotary("llama", (16384, 126, 128, 8, 53248, 128256), _128K),
    "meta-llama/Llama-3.2-1B": rotary("llama", (2048, 16, 32, 8, 8192, 128256), _128K, True, head_dim=64),
    "meta-llama/Llama-3.2-3B": rotary("llama", (3072, 28, 24, 8, 8192, 128256), _128K, True, head_dim=128),
    "meta-llama/Llama-3.3-70B-Instruct": rotary("llama", _LLAMA_70B, _128K, head_dim=128),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": rotary("llama", _LLAMA_8B, _128K),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-70B": rotary("llama", _LLAMA_70B, _128K),
    "tiiuae/Falcon3-7B-Base": rotary("llama", (3072, 28, 12, 4, 23040, 131072), 32768, head_dim=256),
}

_MISTRAL: dict[str, dict[str, Any]] = {
    "mistralai/Mistral-7B-v0.1": rotary("mistral", _MISTRAL_7B, 32768),
    "mistralai/Mistral-7B-v0.3": rotary("mistral", (*_MISTRAL_7B[:5], 32768), 32768),
    "mistralai/Ministral-8B-Instruct-2410": rotary("mistral", (4096, 36, 32, 8, 12288, 131072), 32768, head_dim=128),
    "mistralai/Mistral-Nemo-Instruct-2407": rotary("mistral", (5120, 40, 32, 8, 14336, 131072), _128K, head_dim=128),
    "mistralai/Mistral-Small-24B-Base-2501": rotary("mistral", (5120, 40, 32, 8, 32768, 131072), 32768, head_dim=128),
}

_QWEN: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2.5-0.5B": rotary("qwen2", (896, 24, 14, 2, 4864, 151936), 32768, True),
    "Qwen/Qwen2.5-1.5B": rotary("qwen2", (1536, 28, 12, 2, 8960, 151936), _128K, True),
    "Qwen/Qwen2.5-3B": rotary("qwen2", (2048, 36, 16, 2, 11008, 151936), 32768, True),
    "Qwen/Qwen2.5-7B": rotary("qwen2", _QWEN_7B, _128K),
    "Qwen/Qwen2.5-14B": rotary("qwen2", _QWEN_14B, _128K),
    "Qwen/Qwen2.5-32B": rotary("qwen2", _QWEN_32B, _128K),
    "Qwen/Qwen2.5-72B": rotary("qwen2", (8192, 80, 64, 8, 29568, 152064), _128K),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": rotary("qwen2", (1536, 28, 12, 2, 8960, 151936), _128K),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": rotary("qwen2", _QWEN_7B, _128K),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B": rotary("qwen2", _QWEN_14B, _128K),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B": rotary("qwen2", _QWEN_32B, _128K),
    "Qwen/Qwen3-0.6B": rotary("qwen3", (1024, 28, 16, 8, 3072, 151936), 40960, True, head_dim=128),
    "Qwen/Qwen3-1.7B": rotary("qwen3", (2048, 28, 16, 8, 6144, 151936), 40960, True, head_dim=128),
    "Qwen/Qwen3-4B": rotary("qwen3", (2560, 36, 32, 8, 9728, 151936), 40960, True, head_dim=128),
    "Qwen/Qwen3-8B": rotary("qwen3", (4096, 36, 32, 8, 12288, 151936), 40960, head_dim=128),
    "Qwen/Qwen3-14B": rotary("qwen3", (5120, 40, 40, 8, 17408, 151936), 40960, head_dim=128),
    "Qwen/Qwen3-32B": rotary("qwen3", (5120, 64, 64, 8, 25600, 151936), 40960, head_dim=128),
}

_PHI: dict[str, dict[str, Any]] = {
    "microsoft/phi-1_5": rotary("phi", (2048, 24, 32, 32, 8192, 51200), 2048),
    "microsoft/phi-2": rotary("phi", (2560, 32, 32, 32, 10240, 51200), 2048, resid_pdrop=0.1),
    "microsoft/Phi-3-mini-4k-instruct": rotary("phi3", _PHI_MINI, 4096),
    "microsoft/Phi-3-medium-4k-instruct": rotary("phi3", (5120, 40, 40, 10, 17920, 32064), 4096),
    "microsoft/Phi-3.5-mini-instruct": rotary("phi3", _PHI_MINI, _128K),
    "microsoft/phi-4": rotary("phi3", (5120, 40, 40, 10, 17920, 100352), 16384),
    "microsoft/Phi-4-mini-instruct": rotary(
        "phi3", (3072, 32, 24, 8, 8192, 200064), _128K, True, partial_rotary_factor=0.75
    ),
}

_GEMMA: dict[str, dict[str, Any]] = {
    "google/gemma-2b": rotary("gemma", (2048, 18, 8, 1, 16384, 256000), 8192, True, head_dim=256),
    "google/gemma-7b": rotary("gemma", (3072, 28, 16, 16, 24576, 256000), 8192, True, head_dim=256),
    "google/gemma-2-2b": rotary("gemma2", (2304, 26, 8, 4, 9216, 256000), 8192, True, head_dim=256),
    "google/gemma-2-9b": rotary("gemma2", (3584, 42, 16, 8, 14336, 256000), 8192, True, head_dim=256),
    "google/gemma-2-27b": rotary("gemma2", (4608, 46, 32, 16, 36864, 256000), 8192, True, head_dim=128),
    "google/gemma-3-270m": rotary("gemma3_text", (640, 18, 4, 1, 2048, 262144), 32768, True, head_dim=256),
    "google/gemma-3-1b-it": rotary("gemma3_text", (1152, 26, 4, 1, 6912, 262144), 32768, True, head_dim=256),
    "google/gemma-3-4b-it": _gemma3((2560, 34, 8, 4, 10240, 262208), 256),
    "google/gemma-3-12b-it": _gemma3((3840, 48, 16, 8, 15360, 262208), 256),
    "google/gemma-3-27b-it": _gemma3((5376, 62, 32, 16, 21504, 262208), 128),
}

_MORE: dict[str, dict[str, Any]] = {
    "allenai/OLMo-2-0425-1B": rotary("olmo2", (2048, 16, 16, 16, 8192, 100352), 4096),
    "allenai/OLMo-2-1124-7B": rotary("olmo2", (4096, 32, 32, 32, 11008, 100352), 4096),
    "allenai/OLMo-2-1124-13B": rotary("olmo2", (5120, 40, 40, 40, 13824, 100352), 4096),
    "stabilityai/stablelm-3b-4e1t": rotary("stablelm", (2560, 32, 32, 32, 6912, 50304), 4096),
    "stabilityai/stablelm-2-1_6b": rotary("stablelm", (2048, 24, 32, 32, 5632, 100352), 4096, use_qkv_bias=True),
    "ibm-granite/granite-3.3-2b-instruct": rotary("granite", (2048, 40, 32, 8, 8192, 49159), _128K, True),
    "ibm-granite/granite-3.3-8b-instruct": rotary("granite", (4096, 40, 32, 8, 12800, 49159), _128K, True),
    "CohereLabs/c4ai-command-r-v01": rotary("cohere", (8192, 40, 64, 64, 22528, 256000), 8192, True),
    "bigcode/starcoder2-3b": rotary("starcoder2", (3072, 30, 24, 2, 12288, 49152), 16384, True),
    "bigcode/starcoder2-7b": rotary("starcoder2", (4608, 32, 36, 4, 18432, 49152), 16384, True),
}

DECODERS: dict[str, dict[str, Any]] = {**_LLAMA, **_MISTRAL, **_QWEN, **_PHI, **_GEMMA, **_MORE}
