"""Well-known models by their hub id: what their config.json says. Facts only; counts follow from them.

Source: the config.json of each repository on the Hugging Face hub. Keys as spelled there; keys that neither
counts nor memory need are left out.
"""

import difflib
from typing import Any

from lora_engine.calc.catalog.decoders import DECODERS
from lora_engine.calc.catalog.encoders import ENCODERS_AND_T5
from lora_engine.calc.catalog.experts import WITH_EXPERTS
from lora_engine.calc.catalog.first_decoders import FIRST_DECODERS
from lora_engine.errors import NotFoundError

CATALOG: dict[str, dict[str, Any]] = {**FIRST_DECODERS, **DECODERS, **WITH_EXPERTS, **ENCODERS_AND_T5}


# Names that begin several ids and by which people mean one.
SHORT_NAMES = {
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
    "phi-3": "microsoft/Phi-3-mini-4k-instruct",
}


def find_model(name: str) -> str | None:
    """The hub id that `name` means, in any case: the id itself, its last part, one of SHORT_NAMES, or a beginning
    up to a "-" which only one model has ("TinyLlama"). None when nothing begins so.

    Raises NotFoundError when several models begin so."""
    wanted = name.strip().lower()
    short = {hub_id: hub_id.lower().rpartition("/")[2] for hub_id in CATALOG}
    for hub_id, last in short.items():
        if wanted in (hub_id.lower(), last):
            return hub_id
    if wanted in SHORT_NAMES:
        return SHORT_NAMES[wanted]
    if "/" in wanted or not wanted:
        return None
    begins = [hub_id for hub_id, last in short.items() if last.startswith(wanted + "-")]
    if len(begins) > 1:
        raise NotFoundError(f"model is {name!r}, which could be several; allowed: {', '.join(begins)}.")
    return begins[0] if begins else None


def near_matches(name: str) -> list[str]:
    """Up to five hub ids that look like `name`, most alike first."""
    wanted = name.strip().lower().rpartition("/")[2]
    last_to_id = {hub_id.lower().rpartition("/")[2]: hub_id for hub_id in CATALOG}
    holding = [hub_id for last, hub_id in last_to_id.items() if len(wanted) >= 3 and wanted in last]
    alike = [last_to_id[last] for last in difflib.get_close_matches(wanted, last_to_id, n=5, cutoff=0.5)]
    return list(dict.fromkeys(holding + alike))[:5]
