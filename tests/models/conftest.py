"""Random weights, and a CLIP small enough for a test."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from models.clip import Clip, ClipConfig, build_clip

SMALL_CLIP = ClipConfig(
    embedding_width=16,
    image_size=16,
    patch_size=8,
    context_length=12,
    vision_width=16,
    vision_layers=1,
    text_width=16,
    text_layers=1,
    head_width=8,
)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Networks this small only lose by more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def randomise() -> Callable[..., nn.Module]:
    """randomise(net, but=keys): weights drawn anew, none of them zero or one, activations of ordinary size."""

    def do(net: nn.Module, but: frozenset[str] | set[str] = frozenset()) -> nn.Module:
        with torch.no_grad():
            for key, p in net.named_parameters():
                if key in but:
                    continue
                noise = torch.randn_like(p)
                if p.ndim > 1:
                    p.copy_(noise / p[0].numel() ** 0.5)
                else:
                    p.copy_(noise * 0.3 + (1 if "norm" in key and key.endswith("weight") else 0))
        return net

    return do


@pytest.fixture(scope="session")
def clip() -> Clip:
    generator_state = torch.get_rng_state()
    torch.manual_seed(1)
    small = Clip(build_clip(SMALL_CLIP), "small")
    torch.set_rng_state(generator_state)
    return small
