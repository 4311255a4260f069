"""Small tokenizers made on the spot, and the one that ships."""

import json
from pathlib import Path

import pytest
from data_tokenizers import CHATML, WORDS, MakeTokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from lora_engine.assets_path import asset_path
from lora_engine.data import TextTokenizer, load_tokenizer


@pytest.fixture(scope="session")
def embedded() -> TextTokenizer:
    return load_tokenizer(asset_path("base"))


@pytest.fixture
def make_tokenizer(tmp_path: Path) -> MakeTokenizer:
    """A byte-level tokenizer with ChatML's tokens, written as a model folder and loaded from there."""

    def make(
        template: str | None = CHATML, *, bos: bool = False, special: bool = True, file: bool = False
    ) -> TextTokenizer:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        names = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
        trainer = trainers.BpeTrainer(
            vocab_size=400,
            show_progress=False,
            special_tokens=names[:2],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
        tokenizer.train_from_iterator(WORDS, trainer)
        tokenizer.add_tokens([AddedToken(name, special=special, normalized=False) for name in names[2:]])
        if bos:
            tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        tokenizer.save(str(folder / "tokenizer.json"))
        config: dict[str, object] = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": None}
        if template is not None and file:
            (folder / "chat_template.jinja").write_text(template)
            config["chat_template"] = "{{ 'not this one' }}"
        elif template is not None:
            config["chat_template"] = template
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return load_tokenizer(folder)

    return make
