"""MMCA as a function: the fast form against the literal one, and both against what is written by hand."""

import pytest
import torch

from modeling_visualchat import mmca_attention, mmca_attention_reference
from modeling_visualchat.attention_visualchat import mmca_mask, mmca_mask_function
from modeling_visualchat.kernels_visualchat import eager_kernel, sdpa_kernel


# Each pattern: one string a row of the batch, I image, T text, . padding.
PATTERNS = {
    "one image, one text": ["IT"],
    "interleaved": ["IITTIT"],
    "text first": ["TTIITITTI"],
    "text only": ["TTTTT"],
    "image only": ["IIII"],
    "padded left": ["..IITT", "IITTTT"],
    "padded right": ["IITT..", "TTIITT"],
    "padded in the middle": ["II.T.T", "T.IITT"],
    "unequal rows": ["IIIITTT", "TTTTTTT", "IIIIIII", "...TITT"],
    "odd": ["TIITTTIIIITIT" * 3],
}


def draw(rows, num_heads=4, num_key_heads=2, head_dim=8, num_queries=None, dtype=torch.float32, seed=0):
    """Random query, key, value and the ids of a pattern; gradients are on."""
    generator = torch.Generator().manual_seed(seed)
    num_keys = len(rows[0])
    shapes = [(num_heads, num_queries or num_keys), (num_key_heads, num_keys), (num_key_heads, num_keys)]
    tensors = [
        torch.randn(len(rows), heads, length, head_dim, generator=generator).to(dtype).requires_grad_()
        for heads, length in shapes
    ]
    mm_token_type_ids = torch.tensor([[int(kind == "I") for kind in row] for row in rows])
    attention_mask = torch.tensor([[int(kind != ".") for kind in row] for row in rows])
    return *tensors, mm_token_type_ids, attention_mask


def outputs_and_gradients(attention, query, key, value, *args, **kwargs):
    output = attention(query, key, value, *args, **kwargs)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(7)).to(output.dtype)
    gradients = torch.autograd.grad((output * weights).sum(), (query, key, value))
    return dict(zip(("output", "query", "key", "value"), (output, *gradients)))


def assert_errs_no_more_than_rounding(actual, expected):
    """Within four roundings of the dtype, measured against the largest of the tensors that belong together."""
    scale = max(tensor.double().norm() for tensor in expected.values())
    for name in expected:
        error = (actual[name].double() - expected[name].double()).norm() / scale
        assert error < 4 * torch.finfo(actual[name].dtype).eps, f"{name}: {error:.1e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rows", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (6, 1)], ids=lambda heads: f"{heads[0]} heads on {heads[1]}")
def test_equals_the_reference_in_value_and_gradient(rows, heads, dtype):
    inputs = draw(rows, *heads, dtype=dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs[:3]]
    expected = outputs_and_gradients(mmca_attention_reference, *exact, *inputs[3:])
    actual = outputs_and_gradients(mmca_attention, *inputs)
    assert_errs_no_more_than_rounding(actual, expected)


@pytest.mark.parametrize("num_queries", [1, 2, 5])
@pytest.mark.parametrize("rows", [["IITTIT"], ["..IITT", "IITTTI"], ["II.T.T", "TTTTTT"]], ids=" ".join)
def test_fewer_queries_than_keys_are_the_last_ones(rows, num_queries):
    query, key, value, ids, kept = draw(rows)
    last = query[:, :, -num_queries:].detach().requires_grad_()
    actual = outputs_and_gradients(mmca_attention, last, key, value, ids, kept)
    expected = outputs_and_gradients(mmca_attention_reference, last, key, value, ids, kept)
    whole = mmca_attention_reference(query, key, value, ids, kept)[:, :, -num_queries:]
    torch.testing.assert_close(expected["output"], whole)
    assert_errs_no_more_than_rounding(actual, expected)


def test_written_by_hand():
    """Keys of zeros make every softmax a mean, so each output is a mean that one can read off the drawing."""
    value = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0]).view(1, 1, 6, 1)
    zeros = torch.zeros(1, 1, 6, 1)
    ids = torch.tensor([[1, 1, 0, 0, 1, 0]])  # I I T T I T
    by_hand = torch.tensor([1, 2, 4 + 3 / 2, 12 / 2 + 3 / 2, 16, 44 / 3 + 19 / 3]).view(1, 1, 6, 1)
    for attention in (mmca_attention, mmca_attention_reference):
        torch.testing.assert_close(attention(zeros, zeros, value, ids), by_hand)


def test_the_drawing():
    ids = torch.tensor([[1, 1, 0, 0, 1, 0]])
    function = mmca_mask_function(ids)
    mask = mmca_mask(1, 6, 6, mask_function=lambda b, h, q, kv: (kv <= q) & function(b, h, q, kv))
    text, image = mask[0].int()
    drawing = ["I......", "I......", "T221...", "T2211..", "I......", "T221121"]
    for row, line in enumerate(drawing):
        for column, mark in enumerate(line[1:]):
            own = line[0] == "I" and row == column
            assert text[row, column] == (mark == "1"), (row, column)
            assert image[row, column] == (mark == "2" or own), (row, column)


@pytest.mark.parametrize("attention", [mmca_attention, mmca_attention_reference])
def test_an_image_token_is_its_own_value(attention):
    query, key, value, ids, kept = draw(["TIITI"], num_heads=2, num_key_heads=2)
    output = attention(query, key, value, ids, kept)
    image = ids[0].bool()
    assert torch.equal(output[:, :, image], value[:, :, image])


@pytest.mark.parametrize("attention", [mmca_attention, mmca_attention_reference])
def test_padding_is_zero_and_unread(attention):
    query, key, value, ids, kept = draw(["..IT.T"])
    output = attention(query, key, value, ids, kept)
    assert torch.equal(output[:, :, kept[0] == 0], torch.zeros_like(output[:, :, kept[0] == 0]))
    loud = value.detach().masked_fill((kept == 0)[:, None, :, None], 1e4)
    assert torch.equal(attention(query, key, loud, ids, kept), output)


@pytest.mark.parametrize("position", range(1, 9))
def test_the_future_changes_no_bit(position):
    query, key, value, ids, kept = draw(["TTIITITTI"])
    before = mmca_attention(query, key, value, ids, kept)[:, :, :position]
    noise = [torch.cat([t[:, :, :position], torch.randn_like(t[:, :, position:])], dim=2) for t in (query, key, value)]
    flipped = torch.cat([ids[:, :position], 1 - ids[:, position:]], dim=1)
    assert torch.equal(mmca_attention(*noise, flipped, kept)[:, :, :position], before)


def test_scaling_is_applied():
    query, key, value, ids, kept = draw(["IITTIT"])
    expected = mmca_attention_reference(query, key, value, ids, kept, scaling=0.7)
    torch.testing.assert_close(
        mmca_attention(query, key, value, ids, kept, scaling=0.7), expected, rtol=1e-5, atol=1e-6
    )
    assert not torch.allclose(mmca_attention(query, key, value, ids, kept), expected, atol=1e-3)


@pytest.mark.parametrize("kernel", [sdpa_kernel, eager_kernel])
def test_a_row_without_keys_is_zero_with_zero_gradient(kernel):
    query, key, value, *_ = draw(["TTT"], num_heads=2, num_key_heads=1)
    output, _ = kernel(query, key, value, torch.zeros(1, 1, 3, 3, dtype=torch.bool), None)
    gradients = torch.autograd.grad(output.sum(), (query, key, value))
    assert all(not tensor.any() for tensor in (output, *gradients))


def test_kernels_agree():
    query, key, value, *_ = draw(["TTTTT"])
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    torch.testing.assert_close(
        sdpa_kernel(query, key, value, mask, 0.3)[0], eager_kernel(query, key, value, mask, 0.3)[0]
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v, t: (q, k, v[:, :, :-1], t), "do not fit together"),
        (lambda q, k, v, t: (q, k[:, :1].repeat(1, 3, 1, 1), v[:, :1].repeat(1, 3, 1, 1), t), "do not divide"),
        (lambda q, k, v, t: (q, k[:, :, :3], v[:, :, :3], t[:, :3]), "more than the 3 positions"),
        (lambda q, k, v, t: (q, k, v, t[:, :-1]), r"mm_token_type_ids must have shape \(1, 6\), got \(1, 5\)"),
    ],
)
def test_wrong_shapes_are_named(change, message):
    query, key, value, ids, _ = draw(["IITTIT"])
    for attention in (mmca_attention, mmca_attention_reference):
        with pytest.raises(ValueError, match=message):
            attention(*change(query, key, value, ids))
