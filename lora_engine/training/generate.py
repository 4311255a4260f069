"""Short continuations, for the text before and after."""

from typing import Any

import torch

from lora_engine.data import TextTokenizer


@torch.no_grad()
def generate_text(
    model: Any,
    tokenizer: TextTokenizer,
    prompt_ids: list[int],
    *,
    max_new_tokens: int = 48,
    temperature: float = 0.0,
    seed: int = 0,
) -> str:
    """What `model` says after `prompt_ids`: greedy at temperature 0, else sampled from `seed`.

    Stops at the end token, after `max_new_tokens`, or where the model's context is full."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    context = getattr(model.config, "max_position_embeddings", None) or 1 << 30
    kept = prompt_ids[-(context - 1) :] or [tokenizer.eos_id or 0]
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor([kept], device=device)
    out: list[int] = []
    past = None
    for _ in range(min(max_new_tokens, context - len(kept))):
        result = model(input_ids=ids, past_key_values=past, use_cache=True, logits_to_keep=1)
        # A diverged adapter gives NaN: the most likely token is then as good as any.
        logits = result.logits[0, -1].float().cpu().nan_to_num()
        if temperature > 0:
            token = int(torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator))
        else:
            token = int(logits.argmax())
        if token == tokenizer.eos_id:
            break
        out.append(token)
        past, ids = result.past_key_values, torch.tensor([[token]], device=device)
    model.train(was_training)
    return tokenizer.decode(out, skip_special=True)


@torch.no_grad()
def generate_texts(
    model: Any, tokenizer: TextTokenizer, prompt_ids: list[int], size: int, *, max_new_tokens: int = 48
) -> list[str]:
    """What each of the `size` adapters packed in `model` says after the one prompt, greedily: `generate_text` of all
    at once."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    context = getattr(model.config, "max_position_embeddings", None) or 1 << 30
    kept = prompt_ids[-(context - 1) :] or [tokenizer.eos_id or 0]
    ids = torch.tensor([kept] * size, device=device)  # (size, length)
    out: list[list[int]] = [[] for _ in range(size)]
    over = [False] * size
    past = None
    for _ in range(min(max_new_tokens, context - len(kept))):
        result = model(input_ids=ids, past_key_values=past, use_cache=True, logits_to_keep=1)
        tokens = result.logits[:, -1].float().cpu().nan_to_num().argmax(-1).tolist()
        for i, token in enumerate(tokens):
            over[i] = over[i] or token == tokenizer.eos_id
            if not over[i]:
                out[i].append(token)
        if all(over):
            break
        past, ids = result.past_key_values, torch.tensor(tokens, device=device).unsqueeze(1)
    model.train(was_training)
    return [tokenizer.decode(row, skip_special=True) for row in out]
