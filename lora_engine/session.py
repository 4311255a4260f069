"""What runs on one base have in common, loaded once: tokenizer, encoded rows, model, and its text before training."""

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_engine.config import DataConfig, LoraConfig, RunConfig, to_dict
from lora_engine.data import (
    IGNORED,
    Dataset,
    Encoded,
    TextTokenizer,
    class_names,
    encode_classes,
    encode_examples,
    encode_prompt,
    encode_text,
    load_tokenizer,
    read_dataset,
    split_examples,
)
from lora_engine.errors import DataError
from lora_engine.methods import lora
from lora_engine.methods.places import replace_module, task_head_names
from lora_engine.methods.quantized import num_parameters
from lora_engine.training.base import load_base, resolve_device, resolve_model
from lora_engine.training.generate import generate_text
from lora_engine.training.threads import use_all_cores

SAMPLE_TOKENS = 48
Note = Callable[[str], None]


@dataclass
class Loaded:
    """One base model, as it was before any training, and the rows it is trained on."""

    base_folder: Path
    device: torch.device
    tokenizer: TextTokenizer
    dataset: Dataset
    train_rows: list[Encoded]
    eval_rows: list[Encoded]
    classes: tuple[str, ...]
    prompt_ids: list[int]
    model: Any
    num_parameters: int
    before: str
    heads: dict[str, nn.Module]

    def answer(self) -> str:
        """What the model, as it is now, makes of the prompt: a continuation, or a class."""
        if self.classes:
            return classify(self.model, self.prompt_ids, self.classes)
        return generate_text(self.model, self.tokenizer, self.prompt_ids, max_new_tokens=SAMPLE_TOKENS)


class Session:
    """Keeps what it loaded for the next run of the same base, data, precision and device; else it loads anew.

    `close` after a run says what that run did to the model: LoRA is taken out again, which leaves the base's bits as
    they were; anything else makes the next run load."""

    def __init__(self) -> None:
        use_all_cores()
        self._key, self._seed = "", 0
        self._loaded: Loaded | None = None
        self.num_loads = 0  # of a model

    def open(self, config: RunConfig, note: Note = lambda _text: None, *, any_head: bool = False) -> Loaded:
        """What `config` is trained on. A classifier's head is new and drawn from the run's seed while loading, so that
        another seed is another model, unless `any_head` will do. Raises InputError for what the config got wrong."""
        train = config.train
        device = resolve_device(train.device)
        data_key = _text(config.model, to_dict(config.data), config.prompt, train.max_length)
        model_key = _text(data_key, str(device), train.precision, train.checkpointing)
        found = self._loaded
        same_head = found is not None and (any_head or not found.classes or self._seed == train.seed)
        if found is not None and self._key == model_key and same_head:
            return found
        self._loaded = found = None
        note("reading the data")
        base_folder = resolve_model(config.model)
        tokenizer = load_tokenizer(base_folder)
        dataset, train_rows, eval_rows = load_rows(config.data, tokenizer, train.max_length)
        classes = class_names(dataset)
        prompt_ids = sample_prompt(config, dataset, eval_rows, tokenizer)
        note("loading the base model")
        model = load_base(base_folder, train, device, classes=classes, pad_id=tokenizer.pad_id)
        self.num_loads += 1
        loaded = Loaded(
            base_folder=base_folder,
            device=device,
            tokenizer=tokenizer,
            dataset=dataset,
            train_rows=train_rows,
            eval_rows=eval_rows,
            classes=classes,
            prompt_ids=prompt_ids,
            model=model,
            num_parameters=num_parameters(model),
            before="",
            heads={name: copy.deepcopy(model.get_submodule(name)) for name in task_head_names(model)},
        )
        loaded.before = loaded.answer()
        self._key, self._seed, self._loaded = model_key, train.seed, loaded
        return loaded

    def close(self, config: RunConfig) -> None:
        """The run of `config` is over, well or badly: make the model a base again, or forget it."""
        loaded = self._loaded
        if loaded is None:
            return
        if not isinstance(config.method, LoraConfig):
            self._loaded = None
            return
        lora.eject(loaded.model)
        restore_heads(loaded.model, loaded.heads)
        loaded.model.eval()

    def forget(self) -> None:
        """Let the model go, whose state nobody knows."""
        self._loaded = None


def restore_heads(model: nn.Module, heads: dict[str, nn.Module]) -> None:
    """Put copies of `heads` in the place of what was trained."""
    for name, head in heads.items():
        replace_module(model, name, copy.deepcopy(head))


def load_rows(
    data: DataConfig, tokenizer: TextTokenizer, max_length: int
) -> tuple[Dataset, list[Encoded], list[Encoded]]:
    """(dataset, train rows, evaluation rows). Raises DataError when a side trains on nothing."""
    dataset = read_dataset(data.path, task=data.task, columns=data.columns, encoding=data.encoding)
    sides = split_examples(dataset.examples, data.eval_share, data.split_seed)
    classes = class_names(dataset)
    train_rows, eval_rows = (
        encode_classes(side, classes, tokenizer, max_length)
        if classes
        else encode_examples(side, tokenizer, max_length)
        for side in sides
    )
    if not train_rows or not eval_rows:
        raise DataError(
            f"max_length is {max_length}; no row keeps a trained token within it: "
            "shorten the prompts or raise max_length."
        )
    return dataset, train_rows, eval_rows


def sample_prompt(config: RunConfig, dataset: Dataset, eval_rows: list[Encoded], tokenizer: TextTokenizer) -> list[int]:
    """Token ids that the before/after sample continues, or labels."""
    row = eval_rows[0]
    if row.label is not None:
        return encode_text(config.prompt, tokenizer, config.train.max_length)[0] if config.prompt else row.input_ids
    if config.prompt:
        return encode_prompt(config.prompt, tokenizer, dataset.task)
    first = next(i for i, label in enumerate(row.labels) if label != IGNORED)
    return row.input_ids[: first or min(24, len(row.input_ids) // 2)]


@torch.no_grad()
def classify(model: Any, ids: list[int], classes: Sequence[str]) -> str:
    """The class that `model` gives the text `ids`."""
    was_training = model.training
    model.eval()
    logits = model(input_ids=torch.tensor([ids], device=next(model.parameters()).device)).logits
    model.train(was_training)
    return classes[int(logits[0].argmax())]


def _text(*values: Any) -> str:
    return json.dumps(values, sort_keys=True)
