"""C3D (arXiv 1412.0767), trained on Sports-1M and fine-tuned on UCF-101: the classifier of the video inception score.

As in pfnet-research/tgan2: eight convolutions, five max-pools, three fully connected layers, 78,409,573 parameters.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FRAMES, SIDE, CLASSES = 16, 112, 101
CUBE = (3, 16, 128, 171)  # the mean clip of Sports-1M: channels (blue first), frames, height, width

# Convolutions by name with their output channels, and the pools between them.
LAYERS: tuple[tuple[str, int] | tuple[int, int, int], ...] = (
    ("conv1a", 64),
    (1, 2, 2),
    ("conv2a", 128),
    (2, 2, 2),
    ("conv3a", 256),
    ("conv3b", 256),
    (2, 2, 2),
    ("conv4a", 512),
    ("conv4b", 512),
    (2, 2, 2),
    ("conv5a", 512),
    ("conv5b", 512),
    (2, 2, 2),
)


class C3D(nn.Module):
    """Clips (b, 3, 16, 112, 112), float, as `prepare` makes them, to logits (b, 101) of UCF-101's classes.

    Evaluation only: tgan2's dropout does nothing there. Raises ValueError for another shape.
    """

    def __init__(self) -> None:
        super().__init__()
        c_in = 3
        for layer in LAYERS:
            if isinstance(layer[0], str):
                self.add_module(layer[0], nn.Conv3d(c_in, layer[1], 3, padding=1))
                c_in = layer[1]
        self.fc6 = nn.Linear(512 * 4 * 4, 4096)
        self.fc7 = nn.Linear(4096, 4096)
        self.fc8 = nn.Linear(4096, CLASSES)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 5 or x.shape[1:] != (3, FRAMES, SIDE, SIDE):
            raise ValueError(f"C3D takes clips of shape (b, 3, {FRAMES}, {SIDE}, {SIDE}), not {tuple(x.shape)}.")
        for layer in LAYERS:
            if isinstance(layer[0], str):
                x = F.relu(self.get_submodule(layer[0])(x), inplace=True)
            else:  # only the last pool has an odd side, 7, which ceil_mode makes 4
                x = F.max_pool3d(x, layer, ceil_mode=True)  # type: ignore[arg-type]
        x = F.relu(self.fc6(x.flatten(1)))
        return self.fc8(F.relu(self.fc7(x)))


def prepare(videos: Tensor, mean: Tensor | None = None) -> Tensor:
    """uint8 (b, 3, 16, h, w) to C3D's input (b, 3, 16, 112, 112).

    128 times the clip in [-1, 1], blue first, each frame bilinear to 112 x 112 with aligned corners (Chainer's
    `resize_images`), plus 128 minus the middle of the `mean` cube (3, 16, 128, 171), or of a cube of 128.
    """
    b, _, f, _, _ = videos.shape
    frames = videos.flip(1).transpose(1, 2).flatten(0, 1).float() * (256 / 255) - 128
    frames = F.interpolate(frames, size=(SIDE, SIDE), mode="bilinear", align_corners=True)
    clips = frames.unflatten(0, (b, f)).transpose(1, 2)
    return clips if mean is None else clips + 128 - mean[:, :, 8 : 8 + SIDE, 8 : 8 + SIDE]


def convert_keys(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Chainer's keys (`conv1a/W`, `fc6/b`) to this class's (`conv1a.weight`, `fc6.bias`)."""
    return {key.replace("/W", ".weight").replace("/b", ".bias"): value for key, value in weights.items()}


def random_c3d(seed: int = 0) -> C3D:
    """C3D with random weights that depend on `seed` alone; the global generator is left as it was.

    He's initialisation keeps the scale of the input, 128, which the last layer takes away: else each clip would be
    of one class with certainty.
    """
    with torch.device("meta"):
        net = C3D()
    net.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in net.children():
            assert isinstance(module, nn.Conv3d | nn.Linear) and module.bias is not None
            std = math.sqrt(2 / module.weight[0].numel())
            module.weight.normal_(0.0, std, generator=generator)
            module.bias.zero_()
        net.fc8.weight /= 128
    return net
