"""Prefix tuning: against PEFT with copied weights, with and without a cache, under masks."""

import peft
import pytest
import torch
from tiny import CONTEXT, bert_classifier, gpt2, gpt2_classifier, llama, llama_classifier, token_ids
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from lora_engine import methods
from lora_engine.config import PrefixConfig
from lora_engine.errors import TargetError
from lora_engine.methods import prefix
from lora_engine.training.batches import label_batch
from lora_engine.training.loss import labelled_loss_sum

LENGTH = 5


def neox():
    torch.manual_seed(0)
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(vocab_size=97, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4)
    ).eval()


def phi():
    torch.manual_seed(0)
    return PhiForCausalLM(
        PhiConfig(vocab_size=97, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4)
    ).eval()


def opt():
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=97, hidden_size=32, ffn_dim=40, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32
    )
    return OPTForCausalLM(config).eval()


def eager_llama():
    return llama(attn_implementation="eager")


LANGUAGE_MODELS = [llama, eager_llama, gpt2, neox, phi, opt]
CLASSIFIERS = [llama_classifier, gpt2_classifier, bert_classifier]


def left_padded():
    mask = torch.ones(4, 9, dtype=torch.long)
    mask[0, :3] = mask[2, :1] = 0
    return mask


def random_prefix(model, seed=2):
    width = prefix.state_dict(model)["prompt_embeddings"].shape[1]
    return torch.randn(LENGTH, width, generator=torch.Generator().manual_seed(seed))


def pair(make, **settings):
    """(ours, PEFT's), the same prefix in both."""
    ours = methods.inject(make(), PrefixConfig(prefix_length=LENGTH, **settings))
    values = random_prefix(ours)
    prefix.load_state_dict(ours, {"prompt_embeddings": values})
    kind = "SEQ_CLS" if make in CLASSIFIERS else "CAUSAL_LM"
    theirs = peft.get_peft_model(make(), peft.PrefixTuningConfig(task_type=kind, num_virtual_tokens=LENGTH)).eval()
    with torch.no_grad():
        theirs.prompt_encoder["default"].embedding.weight.copy_(values)
    return ours, theirs


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("make", LANGUAGE_MODELS + CLASSIFIERS)
def test_outputs_and_gradients_equal_peft(make, padded):
    if make is opt and padded:
        return  # OPT takes positions from the mask
    ours, theirs = pair(make)
    ids, more = token_ids(), {}
    if padded:
        more = {"attention_mask": left_padded()}
    # PEFT moves an encoder's positions too; ours keep those it was pretrained with.
    own = {"position_ids": torch.arange(LENGTH, LENGTH + 9)[None]} if make is bert_classifier else {}
    mine, reference = ours(input_ids=ids, **more, **own).logits, theirs(input_ids=ids, **more).logits
    if padded and make not in CLASSIFIERS:
        mine, reference = mine[:, 3:], reference[:, 3:]
    assert (mine - reference).detach().abs().max() <= 1e-5 * reference.detach().abs().max()
    mine.square().sum().backward()
    reference.square().sum().backward()
    grad = theirs.prompt_encoder["default"].embedding.weight.grad
    ours_grad = ours.base_model.prefix_encoder.embedding.grad / prefix.UNIT
    assert (ours_grad - grad).norm() <= 1e-4 * grad.norm()
    assert grad.norm() > 0


def test_reparametrisation_equals_pefts_and_is_dropped_in_what_is_saved():
    config = PrefixConfig(prefix_length=LENGTH, reparametrize=True, encoder_hidden_size=11)
    ours = methods.inject(llama(), config)
    theirs = peft.get_peft_model(
        llama(),
        peft.PrefixTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=LENGTH, prefix_projection=True, encoder_hidden_size=11
        ),
    ).eval()
    encoder, reference = ours.base_model.prefix_encoder, theirs.prompt_encoder["default"]
    with torch.no_grad():
        reference.embedding.weight.copy_(encoder.embedding)
        for mine, other in (
            (encoder.transform[0], reference.transform[0]),
            (encoder.transform[2], reference.transform[2]),
        ):
            mine.bias.normal_()
            other.weight.copy_(mine.weight)
            other.bias.copy_(mine.bias)
        assert sum(p.numel() for p in reference.parameters()) == sum(p.numel() for p in encoder.parameters())
        expected = theirs(input_ids=token_ids()).logits
        assert (ours(input_ids=token_ids()).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
        saved = methods.state_dict(ours, config)
        assert saved.keys() == {"prompt_embeddings"}
        torch.testing.assert_close(saved["prompt_embeddings"], theirs.get_prompt_embedding_to_save("default"))


@pytest.mark.parametrize("make", [llama, eager_llama, gpt2, neox, phi, opt])
def test_token_by_token_with_a_cache_equals_all_at_once(make):
    ours, _ = pair(make)
    ids = token_ids(rows=2)
    with torch.no_grad():
        whole = ours(input_ids=ids).logits
        past, pieces = None, []
        for start, end in ((0, 4), (4, 5), (5, 8), (8, 9)):
            out = ours(input_ids=ids[:, start:end], past_key_values=past, use_cache=True)
            past = out.past_key_values
            pieces.append(out.logits)
    assert past.get_seq_length() == ids.shape[1]  # of tokens; the prefix is not in it
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-5)


def test_transformers_generate_equals_greedy_without_a_cache():
    ours, _ = pair(llama)
    ids = token_ids(rows=1)
    generated = ours.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    grown = ids
    with torch.no_grad():
        for _ in range(6):
            grown = torch.cat((grown, ours(input_ids=grown).logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(generated, grown)


def test_padding_changes_nothing():
    for make in (llama, gpt2):
        ours, _ = pair(make)
        ids = token_ids(rows=1)
        longer = torch.nn.functional.pad(ids, (0, 3))
        mask = torch.nn.functional.pad(torch.ones_like(ids), (0, 3))
        with torch.no_grad():
            plain = ours(input_ids=ids).logits
            for padded in (ours(input_ids=longer, attention_mask=mask), ours(input_ids=longer)):
                torch.testing.assert_close(padded.logits[:, :9], plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [llama, gpt2, opt])
def test_the_loss_before_the_head_sees_the_prefix(make):
    ours, theirs = pair(make)
    ids = token_ids()
    expected = theirs(input_ids=ids, labels=ids).loss * ids[:, 1:].numel()
    loss = labelled_loss_sum(ours, label_batch(ids, ids, torch.device("cpu")))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_the_prefix_takes_its_places_of_a_causal_models_context():
    ours, _ = pair(gpt2)
    assert ours.config.max_position_embeddings == CONTEXT - LENGTH
    ours(input_ids=token_ids(length=CONTEXT - LENGTH))
    encoder, _ = pair(bert_classifier)
    assert encoder.config.max_position_embeddings == CONTEXT
    with pytest.raises(TargetError, match=f"prefix_length is {CONTEXT}; allowed: less than {CONTEXT}"):
        methods.inject(gpt2(), PrefixConfig(prefix_length=CONTEXT))


def test_a_model_with_an_attention_of_its_own_is_refused():
    model = FalconForCausalLM(FalconConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4))
    with pytest.raises(TargetError, match="FalconForCausalLM, whose attention takes no key-value prefix"):
        methods.inject(model, PrefixConfig())


def test_a_prefix_of_another_shape_is_refused():
    ours, _ = pair(llama)
    with pytest.raises(KeyError, match=r"prompt_embeddings of shape \(2, 3\)"):
        prefix.load_state_dict(ours, {"prompt_embeddings": torch.zeros(2, 3)})
