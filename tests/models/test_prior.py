"""The prior: causal, blind to padding, and without text when the text is dropped."""

from dataclasses import replace

import pytest
import torch

from models.prior import Prior, PriorConfig

CONFIG = PriorConfig(width=32, depth=2, head_width=16, embedding_width=12, context_length=8, vocabulary=50)
END = 49  # the largest id, as in open_clip
TOKENS = torch.tensor([[48, 3, 9, 12, END, 0, 0, 0], [48, 7, END, 0, 0, 0, 0, 0]])


@pytest.fixture
def net(randomise):
    return randomise(Prior(CONFIG)).eval()


@pytest.fixture
def inputs():
    return dict(z=torch.randn(2, 12), t=torch.tensor([5, 800]), tokens=TOKENS.clone(), text=torch.randn(2, 12))


def hidden(net, inputs):
    """What leaves the last block at every position."""
    seen = []
    hook = net.blocks[-1].register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        net(**inputs)
    hook.remove()
    return seen[0]


def changed(inputs, name):
    values = inputs[name].clone()
    if name.startswith("token"):
        values[:, 1] = 30
        return {**inputs, name: values}
    return {**inputs, name: values + 1}


@pytest.mark.parametrize("name, position", [("tokens", 1), ("text", 8), ("t", 9), ("z", 10)])
def test_nothing_looks_ahead(net, inputs, name, position):
    """In unCLIP's order: tokens, text embedding, time, noised embedding, query."""
    difference = (hidden(net, inputs) - hidden(net, changed(inputs, name))).abs().amax(dim=(0, 2))
    assert len(difference) == 12
    assert not difference[:position].any()
    assert (difference[position:] > 1e-4).all()


@pytest.mark.parametrize("name", ["z", "t", "tokens", "text"])
@torch.no_grad()
def test_the_prediction_hears_everything(net, inputs, name):
    assert ((net(**inputs) - net(**changed(inputs, name))).abs().amax(1) > 1e-3).all()


@torch.no_grad()
def test_the_order_of_words_matters(net, inputs):
    other = {**inputs, "tokens": inputs["tokens"][:, [0, 2, 1, 3, 4, 5, 6, 7]]}
    assert (net(**inputs) - net(**other))[0].abs().max() > 1e-3


@torch.no_grad()
def test_padding_is_ignored(net, inputs):
    other = inputs["tokens"].clone()
    other[0, 5:], other[1, 3:] = 17, 21
    assert torch.equal(net(**inputs), net(**{**inputs, "tokens": other}))
    other[1, 1] = 21
    assert not torch.equal(net(**inputs), net(**{**inputs, "tokens": other}))


@torch.no_grad()
def test_drop_takes_the_text_away(net, inputs):
    drop = torch.tensor([True, False])
    other = changed(changed(inputs, "text"), "tokens")
    a, b = net(**inputs, drop=drop), net(**other, drop=drop)
    assert torch.equal(a[0], b[0]) and not torch.allclose(a[1], b[1], atol=1e-3)
    assert not torch.allclose(a[0], net(**inputs)[0], atol=1e-3)
    moved = {**inputs, "z": inputs["z"] + 1}
    assert not torch.allclose(net(**moved, drop=drop)[0], a[0], atol=1e-3)


def test_recomputed_activations_change_nothing(net, inputs):
    grads = []
    for on in (False, True):
        net.config = replace(CONFIG, checkpoint_activations=on)
        net.zero_grad()
        net(**inputs).square().sum().backward()
        grads.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) > 20
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_the_head_width_must_divide():
    with pytest.raises(ValueError, match="32 .* 12"):
        Prior(replace(CONFIG, head_width=12))
