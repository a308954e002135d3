"""Attention in blocks: against the formula, its gradient, and inside the model."""

import pytest
import torch
from conftest import BASE
from torch.nn.functional import scaled_dot_product_attention

from colintern.modeling import causal
from colintern.modeling.modeling_colintern import ColIntern3_5, attention_kernel


def drawn(length, heads=4, key_heads=2, width=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(length)
    return [
        torch.randn(3, length, n, width, generator=generator, dtype=torch.float64).to(dtype).transpose(1, 2)
        for n in (heads, key_heads, key_heads)
    ]


def test_by_hand():
    """Equal keys: each token takes the mean of the values so far."""
    value = torch.tensor([3.0, 5.0, 10.0])[None, None, :, None]
    found = causal.blocked_attention(torch.randn(1, 1, 3, 1), torch.ones(1, 1, 3, 1), value, 1.0)
    torch.testing.assert_close(found.flatten(), torch.tensor([3.0, 4.0, 6.0]))


@pytest.mark.parametrize("length", [1, 2, causal.ROWS - 1, causal.ROWS, causal.ROWS + 1, 2 * causal.ROWS + 37])
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 2), (3, 3), (4, 1)])
def test_it_is_attention_with_its_gradient(length, heads, key_heads):
    inputs = [x.requires_grad_() for x in drawn(length, heads, key_heads)]
    weights = torch.linspace(-1, 1, inputs[0].numel()).double().view_as(inputs[0])
    made = []
    for attention in (
        lambda q, k, v: causal.blocked_attention(q, k, v, 0.3),
        lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True),
    ):
        out = attention(*inputs)
        made.append([out, *torch.autograd.grad((out * weights).sum(), inputs)])
    for found, wanted in zip(*made, strict=True):
        # Keys' and values' gradients are summed in float32.
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(made[0][0], made[1][0], atol=1e-12, rtol=1e-12)


def test_bfloat16_is_as_near_to_float64_as_torchs_own():
    inputs = drawn(300, 16, 8, 128, torch.bfloat16)
    wanted = scaled_dot_product_attention(*(x.double() for x in inputs), is_causal=True, enable_gqa=True)
    own, theirs = (
        (found.double() - wanted).norm() / wanted.norm()
        for found in (
            causal.blocked_attention(*inputs, 128**-0.5),
            scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True),
        )
    )
    assert own < 3 * theirs < 0.01


def test_no_token_sees_a_later_one():
    query, key, value = drawn(200)
    before = causal.blocked_attention(query, key, value, 1.0)
    key[:, :, 150:], value[:, :, 150:] = 7.0, -9.0
    after = causal.blocked_attention(query, key, value, 1.0)
    assert (
        torch.equal(before[:, :, :150], after[:, :, :150]) and (after[:, :, 150:] - before[:, :, 150:]).abs().min() > 0
    )


def test_the_model_runs_on_it_and_its_tower_on_sdpa(processor, pages, monkeypatch):
    calls = []
    real = causal.blocked_attention
    monkeypatch.setattr(causal, "blocked_attention", lambda *args: calls.append(args[0].shape) or real(*args))
    batch = processor.process_images(pages)
    with torch.no_grad():
        sdpa = ColIntern3_5.from_pretrained(BASE, dtype=torch.float32, attn_implementation="sdpa")(**batch)
        assert not calls
        model = ColIntern3_5.from_pretrained(BASE, dtype=torch.float32, attn_implementation=causal.NAME)
        blocked = model(**batch)
    assert len(calls) == model.config.text_config.num_hidden_layers
    torch.testing.assert_close(blocked, sdpa, atol=1e-5, rtol=0)


def test_under_autocast_a_float32_model_has_the_gradient_of_sdpa(processor, pages):
    """Its norms return queries and keys in float32, beside values in bfloat16."""
    batch, gradients = processor.process_images(pages), []
    for attention in (causal.NAME, "sdpa"):
        model = ColIntern3_5.from_pretrained(BASE, dtype=torch.float32, attn_implementation=attention)
        with torch.autocast("cpu", torch.bfloat16):
            embeddings = model(**batch)
        embeddings.float().square()[..., ::2].sum().backward()
        gradients.append(model.language_model.layers[0].self_attn.k_proj.weight.grad)
    blocked, sdpa = gradients
    assert (blocked - sdpa).norm() < 0.1 * sdpa.norm()


def test_auto_takes_it_on_the_cpu_in_bfloat16():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert attention_kernel("auto", "bfloat16") == causal.NAME
    assert attention_kernel("auto", "float32") == attention_kernel("sdpa", "bfloat16") == "sdpa"
    assert attention_kernel("eager", "float32") == "eager"
