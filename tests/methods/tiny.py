"""Small random models of each kind, and batches for them."""

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

VOCAB, HIDDEN, LAYERS, HEADS, INNER, CONTEXT, LABELS = 97, 32, 2, 4, 40, 64, 3


def llama(cls=LlamaForCausalLM, **more):
    """Grouped key-value heads, an untied head, rotary positions."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT,
        "pad_token_id": 0, "initializer_range": 0.2,
    }  # fmt: skip
    return cls(LlamaConfig(**settings | more)).eval()


def gpt2(cls=GPT2LMHeadModel, **more):
    """Conv1D, a tied head, learned positions."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": VOCAB, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_inner": INNER,
        "n_positions": CONTEXT, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.2,
    }  # fmt: skip
    return cls(GPT2Config(**settings | more)).eval()


def llama_classifier():
    return llama(LlamaForSequenceClassification, num_labels=LABELS)


def gpt2_classifier():
    return gpt2(GPT2ForSequenceClassification, num_labels=LABELS)


def bert_classifier():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, max_position_embeddings=CONTEXT, num_labels=LABELS, initializer_range=0.2,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


MODELS = {
    "llama": llama,
    "gpt2": gpt2,
    "llama-classifier": llama_classifier,
    "gpt2-classifier": gpt2_classifier,
    "bert-classifier": bert_classifier,
}


def token_ids(rows=4, length=9, seed=3):
    return torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
