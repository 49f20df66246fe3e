"""The whole cascade in a minute: the tiny page made smaller still, trained once for all tests here."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from experiments import build
from experiments.config import Config, load
from experiments.demo import train_all

MICRO = """
extends: tiny
runs: {runs}
clip:
  model:
    {{embedding_width: 16, image_size: 16, patch_size: 8, vision_width: 32, vision_layers: 1, text_width: 32,
      text_layers: 1, head_width: 16}}
  trainer: &t
    {{max_steps: 4, batch_size: 2, workers: 0, log_every: 1, sample_every: 100, checkpoint_every: 2, validate_every: 2,
      preview: 1, validate: 2, precision: 32-true}}
prior: {{model: {{width: 32, depth: 1, head_width: 16}}, trainer: *t}}
decoder:
  size: 16
  unet: {{width: 16, multiples: [1, 2], attention: [2], head_width: 16, dropout: 0.1, learned_variance: true}}
  trainer: *t
sr_low: {{size: 32, crop: 16, unet: {{width: 16, multiples: [1, 2]}}, trainer: *t}}
sr_high: {{size: 64, crop: 16, unet: {{width: 16, multiples: [1, 2]}}, trainer: *t}}
decoder_video: {{frames: 9, trainer: *t}}
sr_low_video: {{frames: 4, trainer: *t}}
sr_high_video: {{frames: 2, trainer: *t}}
interpolation: {{frames: 9, trainer: *t}}
cascade:
  prior: {{steps: 2}}
  decoder: {{steps: 2}}
  interpolation: {{steps: 2}}
  sr_low: {{steps: 2}}
  sr_high: {{steps: 2}}
evaluate: {{samples: 3, batch_size: 2}}
"""


def micro(folder: Path) -> Config:
    """The micro page with its run folders in `folder`."""
    page = folder / "micro.yaml"
    page.write_text(MICRO.format(runs=folder / "runs"))
    return load(str(page))


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A micro cascade with all its stages trained, by one thread: more of them sum in an order that depends on them."""
    config = micro(tmp_path_factory.mktemp("cascade"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train_all(config)
    torch.set_num_threads(threads)
    return config


@pytest.fixture
def fresh(tmp_path: Path) -> Config:
    """A micro cascade of which nothing is trained."""
    return micro(tmp_path)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Networks this small only lose by more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A micro page whose stages have weights, though nobody trained them: for what films are, not what they show."""
    folder = tmp_path_factory.mktemp("untrained")
    config = micro(folder)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    for stage in build.wanted(config):
        weights = build.network(config, stage).state_dict()
        for key, value in weights.items():
            if "conv_out" in key and value.ndim == 4:  # begins at zero
                weights[key] = torch.randn_like(value) * 0.05
        path = build.run_folder(config, stage)
        path.mkdir(parents=True)
        save_file({key: value.contiguous() for key, value in weights.items()}, path / "weights.safetensors")
    torch.set_rng_state(state)
    return folder / "micro.yaml"
