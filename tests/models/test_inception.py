"""The FID's Inception-v3: parameters, features, and what TensorFlow's pools do otherwise than torchvision's."""

import pytest
import torch
import torch.nn.functional as F
from torchvision.models import Inception3

from models.inception import Inception, random_inception


@pytest.fixture(scope="module")
def net():
    return random_inception()


def test_entries_are_torchvisions(net):
    with torch.device("meta"):
        theirs = Inception3(1008, aux_logits=False, init_weights=False)
    expected = {key: value.shape for key, value in theirs.state_dict().items() if not key.startswith("fc.")}
    assert {key: value.shape for key, value in net.state_dict().items()} == expected
    assert sum(p.numel() for p in net.parameters()) == 21_785_568  # Inception-v3 without classifiers


def test_features(net):
    x = torch.rand(2, 3, 299, 299, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        features = net(x)
        torch.testing.assert_close(net(x[1:]), features[1:], rtol=1e-4, atol=1e-4)
    assert features.shape == (2, 2048) and features.isfinite().all() and (features >= 0).all()


def test_pools_are_tensorflows(net):
    """Padding is not counted in averages; the last block takes the maximum."""
    with torch.no_grad():
        for name, c_in, width in (("Mixed_5b", 192, 32), ("Mixed_6b", 768, 192), ("Mixed_7b", 1280, 192)):
            block, ones = net.get_submodule(name), torch.ones(1, c_in, 9, 9)
            pooled = block(ones)[:, -width:]
            expected = block.branch_pool(ones)
            torch.testing.assert_close(pooled, expected)  # ones stay ones, at the border too
        x = torch.randn(1, 2048, 8, 8, generator=torch.Generator().manual_seed(0))
        block = net.Mixed_7c
        torch.testing.assert_close(block(x)[:, -192:], block.branch_pool(F.max_pool2d(x, 3, 1, 1)))


def test_the_random_network_is_the_seed(net):
    state = torch.get_rng_state()
    again = random_inception()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), net.parameters(), strict=True))


def test_other_shapes_are_refused():
    with torch.device("meta"):
        net = Inception()
    with pytest.raises(ValueError, match=r"shape \(n, 3, 299, 299\)"):
        net(torch.zeros(1, 3, 224, 224))
