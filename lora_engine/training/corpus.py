"""The text a base model is pretrained on: read, split, tokenised."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lora_engine.errors import DataError

END, PAD, USER, ASSISTANT = "<|endoftext|>", "<|pad|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = [END, PAD, USER, ASSISTANT]


def read_corpus(folder: Path) -> list[tuple[str, str]]:
    """(file name, text) of every .txt in `folder`, sorted by name, README files left out.

    Raises DataError when the folder holds no text."""
    paths = [path for path in sorted(folder.glob("*.txt")) if not path.name.startswith("README")]
    if not paths:
        raise DataError(f"corpus is {str(folder)!r}; allowed: a folder with at least one .txt file.")
    documents = []
    for path in paths:
        try:
            documents.append((path.name, path.read_text(encoding="utf-8")))
        except UnicodeDecodeError as error:
            raise DataError(f"{path.name} is not UTF-8; save it as UTF-8 or take it out of the corpus.") from error
    if not any(text.strip() for _, text in documents):
        raise DataError(f"corpus is {str(folder)!r}; its .txt files are empty.")
    return documents


def split_corpus(
    documents: list[tuple[str, str]], share: float, seed: int, block_characters: int = 8192
) -> tuple[list[str], list[str]]:
    """Hold out whole blocks of text: (training texts, held-out texts).

    Blocks are cut at line ends, so no window of the held-out text was ever trained on."""
    rng = np.random.default_rng(seed)
    train: list[str] = []
    held_out: list[str] = []
    for _name, text in documents:
        run: list[str] = []
        for block in _blocks(text, block_characters):
            if rng.random() < share:
                held_out.append(block)
                if run:
                    train.append("".join(run))
                run = []
            else:
                run.append(block)
        if run:
            train.append("".join(run))
    return train, held_out


def _blocks(text: str, size: int) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = text.find("\n", start + size)
        end = len(text) if end < 0 else end + 1
        yield text[start:end]
        start = end


def code_and_digits() -> list[str]:
    """Python's own documentation, as shipped with the interpreter: digits, code and punctuation."""
    from pydoc_data.topics import topics

    return list(topics.values())


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE (Sennrich et al. 2016; GPT-2's byte alphabet), digits one by one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokenize(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """One stream of token ids (uint16), an end token after each text."""
    end = tokenizer.token_to_id(END)
    parts = []
    for encoding in tokenizer.encode_batch(texts):
        parts.append(np.asarray([*encoding.ids, end], dtype=np.uint16))
    return np.concatenate(parts)


def fingerprint(documents: list[tuple[str, str]]) -> str:
    """Names and texts in sixteen letters, so that a checkpoint knows its corpus."""
    digest = hashlib.sha256()
    for name, text in documents:
        digest.update(f"{name} {len(text)} ".encode() + text.encode())
    return digest.hexdigest()[:16]
