"""What MMCA promises of a whole model: images are independent, nothing reads the future or padding."""

import pytest
import torch
from conftest import IMAGE_SEQ_LENGTH, PAPER, TEXT_CONFIGS, make_model, pad_left, pixels, tokens
from transformers import AutoModelForCausalLM

from modeling_visualchat import mmca_attention_reference
from modeling_visualchat.attention_visualchat import MultiModalCausalAttention


DECODERS = list(TEXT_CONFIGS)


def hidden_states(model, input_ids, pixel_values=None, **kwargs):
    with torch.no_grad():
        return model.model(input_ids, pixel_values, output_hidden_states=True, **kwargs).hidden_states


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("decoder", DECODERS)
def test_text_alone_gives_the_logits_of_the_bare_decoder(decoder, kernel):
    model = make_model(decoder)
    model.set_attn_implementation(kernel)
    stock = AutoModelForCausalLM.from_config(TEXT_CONFIGS[decoder]()).eval()
    stock.model.load_state_dict(model.model.language_model.state_dict())
    stock.lm_head.load_state_dict(model.lm_head.state_dict())
    batch = pad_left([tokens(9), tokens(23, seed=1)])
    with torch.no_grad():
        actual, expected = model(**batch).logits, stock(**batch).logits
    kept = batch["attention_mask"].bool()
    torch.testing.assert_close(actual[kept], expected[kept], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("decoder", DECODERS)
def test_every_layer_computes_the_reference(decoder, monkeypatch):
    """Each call of the attention inside a decoder without windows in reach, against the literal form."""
    model = make_model(decoder)
    ids = tokens(3, "I", 2, "I", 1)
    is_image = (ids == model.config.image_token_id).long()
    errors = []
    compute = MultiModalCausalAttention.__call__

    def compare(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        output, weights = compute(self, module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        expected = mmca_attention_reference(
            query, key, value, is_image, None, scaling, model.config.merge, "self", model.config.image_scope
        ).transpose(1, 2)
        errors.append((output - expected).abs().max().item())
        return output, weights

    monkeypatch.setattr(MultiModalCausalAttention, "__call__", compare)
    hidden_states(model, ids, pixels(0, 1))
    assert len(errors) == 2 and max(errors) < 1e-5


@pytest.mark.parametrize("decoder", DECODERS)
def test_an_image_is_the_same_in_any_conversation_and_position(decoder):
    model = make_model(decoder)
    alone = hidden_states(model, tokens("I"), pixels(7))
    later = hidden_states(model, tokens(4, "I", 11, "I", 3), pixels(1, 7))
    start = 4 + IMAGE_SEQ_LENGTH + 11
    for layer_alone, layer_later in zip(alone, later):
        there = layer_later[:, start : start + IMAGE_SEQ_LENGTH]
        torch.testing.assert_close(layer_alone, there, rtol=1e-5, atol=1e-5)


def test_causal_attention_does_depend_on_the_position():
    """The control of the test above: with the decoder's own attention it has to fail."""
    model = make_model(attention_type="causal")
    alone = hidden_states(model, tokens("I"), pixels(7))[-1]
    later = hidden_states(model, tokens(4, "I"), pixels(7))[-1][:, 4:]
    assert (alone - later).abs().max() > 1e-2


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_later_image_or_text_changes_no_bit_before_it(decoder):
    model = make_model(decoder)
    ids = tokens(3, "I", 4, "I", 2, "I", 5)
    before = hidden_states(model, ids, pixels(0, 1, 2))[-1]
    cut = 3 + IMAGE_SEQ_LENGTH + 4
    other_image = hidden_states(model, ids, pixels(0, 8, 9))[-1]
    assert torch.equal(other_image[:, :cut], before[:, :cut])
    assert not torch.allclose(other_image[:, -5:], before[:, -5:], atol=1e-3)
    other_text = torch.cat([ids[:, :-5], tokens(5, seed=3)], dim=1)
    assert torch.equal(hidden_states(model, other_text, pixels(0, 1, 2))[-1][:, :-5], before[:, :-5])


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_text_token_reads_the_images_before_it(decoder):
    model = make_model(decoder)
    ids = tokens("I", 2, "I", 3)
    logits = [model(ids, pixels(*seeds)).logits[0, -1] for seeds in ((0, 1), (5, 1), (0, 5))]
    assert (logits[0] - logits[1]).abs().max() > 1e-3
    assert (logits[0] - logits[2]).abs().max() > 1e-3


@pytest.mark.parametrize("decoder", DECODERS)
def test_padding_left_changes_nothing(decoder):
    model = make_model(decoder)
    rows = [tokens(3, "I", 4), tokens(2, "I", 3, "I", 9, seed=1), tokens(6, seed=2)]
    batch = pad_left(rows)
    together = model(**batch, pixel_values=pixels(0, 1, 2)).logits
    alone = [model(rows[0], pixels(0)), model(rows[1], pixels(1, 2)), model(rows[2])]
    for row, output in enumerate(alone):
        length = output.logits.shape[1]
        torch.testing.assert_close(together[row, -length:], output.logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("decoder", DECODERS)
def test_kernels_switch_and_the_mathematics_stays(decoder):
    model = make_model(decoder)
    ids, images = tokens(3, "I", 4, "I", 8), pixels(0, 1)
    expected = model(ids, images).logits
    for kernel in ("eager", "sdpa", {"text_config": "eager"}):
        model.set_attn_implementation(kernel)
        assert model.model.language_model.config._attn_implementation.startswith("mmca_")
        torch.testing.assert_close(model(ids, images).logits, expected, rtol=1e-4, atol=1e-4)
    causal = make_model(decoder, attention_type="causal")
    assert not torch.allclose(causal(ids, images).logits, expected, atol=1e-2)


@pytest.mark.parametrize("decoder", DECODERS)
def test_gradient_checkpointing_changes_no_gradient(decoder):
    gradients = []
    for checkpointing in (False, True):
        model = make_model(decoder).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        ids = tokens(3, "I", 4, "I", 8)
        model(ids, pixels(0, 1), labels=ids.masked_fill(ids == model.config.image_token_id, -100)).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 20
    for name in gradients[0]:
        torch.testing.assert_close(gradients[1][name], gradients[0][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("options", "mass"), [({}, 1.0), (PAPER, 2.0)], ids=["joint", "sum"])
def test_weights_of_the_eager_kernel_show_one_softmax_or_two(options, mass):
    model = make_model(**options)
    model.set_attn_implementation("eager")
    weights = model(tokens(2, "I", 3), pixels(0), output_attentions=True).attentions
    assert len(weights) == 2
    sums = weights[0][0].sum(dim=-1)
    expected = torch.tensor([1.0] * 2 + [1.0] * IMAGE_SEQ_LENGTH + [mass] * 3)
    torch.testing.assert_close(sums, expected.expand_as(sums))


def test_conversations_packed_by_position_ids_do_not_meet():
    model = make_model()
    first, second = tokens(3, "I", 4), tokens(2, "I", 6, seed=1)
    positions = torch.cat([torch.arange(first.shape[1]), torch.arange(second.shape[1])])[None]
    packed = model(torch.cat([first, second], dim=1), pixels(0, 1), position_ids=positions).logits
    alone = torch.cat([model(first, pixels(0)).logits, model(second, pixels(1)).logits], dim=1)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)


def test_compiles_without_a_graph_break():
    model = make_model()
    ids, images = tokens(3, "I", 4), pixels(0)
    expected = model(ids, images).logits
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(input_ids=ids, pixel_values=images).logits, expected, rtol=1e-4, atol=1e-4)
