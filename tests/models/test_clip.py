"""CLIP behind two methods: unit norm, frozen, and in no checkpoint."""

import lightning as L
import pytest
import torch
from torch import nn

from models.clip import preprocess, scaled


def images(n=3, height=16, width=16):
    return torch.randint(256, (n, 3, height, width), dtype=torch.uint8)


def test_embeddings_have_unit_norm(clip):
    image = clip.encode_image(images())
    text = clip.encode_text(["a red fox", "a blue car"])
    for embedding, n in ((image, 3), (text, 2)):
        assert embedding.shape == (n, 16) and embedding.dtype == torch.float32 and not embedding.requires_grad
        torch.testing.assert_close(embedding.norm(dim=-1), torch.ones(n))
    assert text[0] @ text[1] < 0.9999 and image[0] @ image[1] < 0.9999


def test_texts_and_their_tokens_are_one(clip):
    texts = ["a red fox", "a blue car jumps over the lazy dog and then over the moon again"]
    tokens = clip.tokens(texts)
    assert tokens.shape == (2, 12) and tokens.dtype == torch.long
    assert torch.equal(clip.encode_text(texts), clip.encode_text(tokens))
    assert (tokens.max(dim=1).values == 49407).all()  # the end token survives the cut


def test_an_embedding_does_not_depend_on_its_batch(clip):
    batch = images()
    torch.testing.assert_close(clip.encode_image(batch)[1:2], clip.encode_image(batch[1:2]))


def test_scaled_embeddings_have_unit_variance_per_coordinate():
    unit = nn.functional.normalize(torch.randn(4000, 64), dim=-1)
    variance = scaled(unit).var(dim=0)
    assert (variance - 1).abs().max() < 0.12 and variance.mean() == pytest.approx(1, abs=0.002)
    torch.testing.assert_close(nn.functional.normalize(scaled(unit), dim=-1), unit)


def test_truncated(clip):
    """Of a context of 12, ten are left beside the start and end tokens."""
    assert not clip.truncated(" ".join(["cat"] * 10))
    assert clip.truncated(" ".join(["cat"] * 11))
    last = clip.tokens([" ".join(["cat"] * 10)])[0]
    assert (last != 0).all()


def test_the_centre_is_what_is_seen(clip):
    wide = images(2, 16, 40)
    assert torch.equal(clip.encode_image(wide), clip.encode_image(wide[..., 12:28]))
    large = images(1).repeat_interleave(4, -1).repeat_interleave(4, -2)
    assert clip.preprocess(large).shape == (1, 3, 16, 16)
    assert clip.encode_image(images(2, 37, 23)).shape == (2, 16)


def test_pixels_are_normalised(clip):
    mean, std = torch.tensor([0.5, 0.25, 0.0]), torch.tensor([0.5, 1.0, 2.0])
    white = torch.full((1, 3, 16, 16), 255, dtype=torch.uint8)
    got = preprocess(white, 16, mean, std)[0, :, 3, 5]
    torch.testing.assert_close(got, torch.tensor([1.0, 0.75, 0.5]))
    torch.testing.assert_close(clip.preprocess(white)[0, :, 0, 0], (1 - clip.mean) / clip.std)


def test_a_module_holds_it_without_taking_it_in(clip):
    assert not isinstance(clip, nn.Module)
    module = L.LightningModule()
    module.net, module.clip = nn.Linear(2, 2), clip
    assert set(module.state_dict()) == {"net.weight", "net.bias"}
    assert len(list(module.parameters())) == 2
    module.train()
    assert not clip.model.training and not any(p.requires_grad for p in clip.model.parameters())
