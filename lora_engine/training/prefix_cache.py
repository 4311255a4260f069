"""The frozen layers below the first trained one give the same for a row every time: done once a row, then skipped.

Each row goes through them alone, padded to its own length, so that what is kept depends on the row and on nothing else,
and a resumed run keeps the bits of the interrupted one.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_engine.config import TrainConfig
from lora_engine.data import Encoded
from lora_engine.errors import TargetError
from lora_engine.methods.places import text_config, transformer_layers
from lora_engine.training.batches import Batch, make_batch
from lora_engine.training.graphs import random_state
from lora_engine.training.loss import labelled_loss_sum
from lora_engine.training.steps import Trained

# A fixed number and not a share of what is free, so that a resumed run decides as the interrupted one did.
CAPACITY_BYTES = 512 * 2**20


class PrefixCache:
    """`loss_sum(model, batch)` in the place of `labelled_loss_sum`: skips the first `depth` layers of `model`.

    Their `forward` is replaced until `remove`; everything but `loss_sum` still goes through them."""

    def __init__(self, model: Any, depth: int, pad_id: int) -> None:
        self.depth, self.pad_id = depth, pad_id
        self.device = next(model.parameters()).device
        self.as_tuple = False  # whether layers return (hidden states, None, ...)
        self._rows: dict[int, Tensor] = {}
        self._given: Tensor | None = None  # what the skipped layers return for the batch at hand
        self._layers: list[nn.Module] = [layer for _, layer in transformer_layers(model)[:depth]]
        for i, layer in enumerate(self._layers):
            self._replace(layer, last=i == depth - 1)

    def _replace(self, layer: Any, *, last: bool) -> None:
        original = layer.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._given is None:
                return original(*args, **kwargs)
            hidden = self._given if last else (args[0] if args else kwargs["hidden_states"])
            return (hidden,) if self.as_tuple else hidden

        layer.forward = forward

    def remove(self) -> None:
        """The model is as it was, and nothing is kept."""
        for layer in self._layers:
            del layer.forward
        self._layers, self._rows = [], {}

    @property
    def num_bytes(self) -> int:
        return sum(value.nbytes for value in self._rows.values())

    def loss_sum(self, model: Any, batch: Batch) -> Tensor:
        if batch.rows is None:
            return labelled_loss_sum(model, batch)
        values = [self.row(model, row) for row in batch.rows]
        given = values[0].new_zeros(*batch.input_ids.shape, values[0].shape[-1])
        for i, value in enumerate(values):
            given[i, : len(value)] = value
        self._given = given
        try:
            return labelled_loss_sum(model, batch)
        finally:
            self._given = None

    def row(self, model: Any, row: Encoded) -> Tensor:
        """(length, width): `row` behind the skipped layers."""
        kept = self._rows.get(id(row))
        if kept is None:
            with torch.no_grad():
                output = self.run(model, make_batch([row], self.pad_id).to(self.device))
            kept = self._rows[id(row)] = _hidden_states(output)[0, : len(row.input_ids)].clone()
        return kept

    def run(self, model: Any, batch: Batch) -> Any:
        """What the last skipped layer returns for `batch`; the layers above are not run."""
        reached: list[Any] = []

        def stop(_module: nn.Module, _inputs: Any, output: Any) -> None:
            reached.append(output)
            raise _ReachedError

        handle = self._layers[-1].register_forward_hook(stop)
        try:
            labelled_loss_sum(model, batch)
        except _ReachedError:
            pass
        finally:
            handle.remove()
        return reached[0]


class _ReachedError(Exception):
    """The layers that were wanted are done."""


def _hidden_states(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


@contextlib.contextmanager
def cached_prefix(
    trained: Trained, train_rows: Sequence[Encoded], eval_rows: Sequence[Encoded], pad_id: int
) -> Iterator[PrefixCache | str]:
    """`trained.loss_sum` skips frozen layers inside, where that pays and changes nothing; else the reason why not."""
    eval_rows = eval_rows[: trained.config.eval_examples]
    depth = first_trained_layer(trained.model)
    reason = prefix_refusal(trained, depth, train_rows, eval_rows)
    if reason is not None:
        yield reason
        return
    cache = PrefixCache(trained.model, depth, pad_id)
    try:
        reason = _difference(cache, trained, train_rows[: trained.config.batch_size])
        if reason is None:
            trained.loss_sum = cache.loss_sum
        yield cache if reason is None else reason
    finally:
        trained.loss_sum = labelled_loss_sum
        cache.remove()


def first_trained_layer(model: Any) -> int:
    """Index of the lowest layer that trains something; the number of layers if none does, 0 if there are no layers."""
    try:
        layers = transformer_layers(model)
    except TargetError:
        return 0
    trained = (i for i, (_, layer) in enumerate(layers) if any(p.requires_grad for p in layer.parameters()))
    return next(trained, len(layers))


def prefix_refusal(
    trained: Trained, depth: int, train_rows: Sequence[Encoded], eval_rows: Sequence[Encoded]
) -> str | None:
    """Why nothing is kept, as far as can be said without running the model."""
    config, text = trained.config, text_config(trained.model)
    num_tokens = sum(len(row.input_ids) for row in [*train_rows, *eval_rows])
    size = num_tokens * getattr(text, "hidden_size", 0) * torch.finfo(trained.model.dtype).bits // 8
    rotary = str(getattr(text, "rope_parameters", None))
    reasons = {
        "only on the CPU": trained.device.type != "cpu",
        "the first layer is trained": depth == 0,
        "most rows are seen once": _num_uses(config, len(eval_rows)) < 2 * (len(train_rows) + len(eval_rows)),
        f"the rows would take {size} bytes, more than {CAPACITY_BYTES}": size > CAPACITY_BYTES,
        "gradient checkpointing": config.checkpointing,
        "positions depend on the longest row": "'dynamic'" in rotary or "'longrope'" in rotary,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _num_uses(config: TrainConfig, num_eval_rows: int) -> int:
    """How many rows go through the model in a whole run."""
    evaluations = 2 + (config.steps - 1) // (config.eval_every or max(1, config.steps // 10))
    return config.steps * config.accumulation * config.batch_size + evaluations * num_eval_rows


def _is_half(trained: Trained) -> bool:
    model: Any = trained.model
    return model.dtype in (torch.float16, torch.bfloat16) or trained.config.precision.startswith("mixed")


def _difference(cache: PrefixCache, trained: Trained, rows: Sequence[Encoded]) -> str | None:
    """Why the forward with `cache` is not the ordinary one; None when it is. The model's mode and the random numbers
    are left as they were."""
    model, batch = trained.model, make_batch(rows, cache.pad_id).to(trained.device)
    was_training, before = model.training, random_state(trained.device)
    try:
        with trained.autocast:
            model.train()
            output = cache.run(model, batch)
            if not torch.equal(before, random_state(trained.device)):
                return "dropout in the frozen layers"
            if _hidden_states(output).requires_grad:
                return "something below them is trained"
            cache.as_tuple = isinstance(output, tuple)
            if isinstance(output, tuple) and any(value is not None for value in output[1:]):
                return "layers that return more than hidden states"
            model.eval()
            with torch.no_grad():
                expected, found = labelled_loss_sum(model, batch), cache.loss_sum(model, batch)
    except Exception as error:
        return f"skipping them failed: {' '.join(str(error).split())[:200] or type(error).__name__}"
    finally:
        torch.set_rng_state(before)
        model.train(was_training)
    tolerance = 2e-2 if _is_half(trained) else 1e-5
    if not torch.allclose(expected, found, rtol=tolerance, atol=0.0):
        return f"the loss without them is {float(found)} and not {float(expected)}"
    return None
