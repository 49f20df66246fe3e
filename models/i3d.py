"""I3D, the inflated Inception-v1 of Carreira and Zisserman (arXiv 1705.07750): the feature network of FVD.

Read top to bottom: TensorFlow's padding, the three kinds of layer, the network, the two key layouts in which
its weights are published. 57 convolutions with batch norm and one with a bias: 12,697,264 parameters, 344
entries.
"""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

SHORTEST_CLIP = 9  # frames: one fewer leaves a single time step, and the last pool needs two

# Widths of b0, b1a, b1b, b2a, b2b, b3b in each Inception block, and which blocks stand between the pools.
MIXED: dict[str, tuple[int, int, int, int, int, int]] = {
    "3b": (64, 96, 128, 16, 32, 32),
    "3c": (128, 128, 192, 32, 96, 64),
    "4b": (192, 96, 208, 16, 48, 64),
    "4c": (160, 112, 224, 24, 64, 64),
    "4d": (128, 128, 256, 24, 64, 64),
    "4e": (112, 144, 288, 32, 64, 64),
    "4f": (256, 160, 320, 32, 128, 128),
    "5b": (256, 160, 320, 32, 128, 128),
    "5c": (384, 192, 384, 48, 128, 128),
}


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """TensorFlow's "SAME" along one axis: (in front, behind); out = ceil(size / stride)."""
    total = max(kernel - (size % stride or stride), 0)
    return total // 2, total - total // 2


def pad_same(x: Tensor, kernel: Sequence[int], stride: Sequence[int]) -> tuple[Tensor, list[int]]:
    """Returns x and the symmetric padding (f, h, w) still to apply; lopsided padding is done here.

    Leaving symmetric padding to the layer saves a copy of x.
    """
    pads = [same_padding(n, k, s) for n, k, s in zip(x.shape[2:], kernel, stride, strict=True)]
    if all(front == behind for front, behind in pads):
        return x, [front for front, _ in pads]
    return F.pad(x, [p for pair in reversed(pads) for p in pair]), [0, 0, 0]


class Unit(nn.Module):
    """SAME convolution, batch norm, ReLU; the keys `conv3d` and `bn` are the published ones."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int = 1, eps: float = 1e-3):
        super().__init__()
        self.conv3d = nn.Conv3d(c_in, c_out, kernel, stride, bias=False)
        self.bn: nn.Module = nn.BatchNorm3d(c_out, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        x, padding = pad_same(x, self.conv3d.kernel_size, self.conv3d.stride)
        x = F.conv3d(x, self.conv3d.weight, self.conv3d.bias, self.conv3d.stride, padding)
        return F.relu(self.bn(x), inplace=True)


class MaxPool(nn.Module):
    """SAME max-pool of values that are not negative.

    The layer pads in front as much as behind, with -inf instead of zero: the same after a ReLU, as every window holds
    a value that is not negative. Where SAME pads one more behind, `ceil_mode` does, without a copy of x.
    """

    def __init__(self, kernel: tuple[int, int, int], stride: tuple[int, int, int]):
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        axes = zip(x.shape[2:], self.kernel, self.stride, strict=True)
        front = [same_padding(n, kernel, stride)[0] for n, kernel, stride in axes]
        return F.max_pool3d(x, self.kernel, self.stride, front, ceil_mode=True)


class Mixed(nn.Module):
    """Inception block: 1x1x1, two of 1x1x1 then 3x3x3, a pool then 1x1x1, side by side in the channels."""

    def __init__(self, c_in: int, widths: tuple[int, int, int, int, int, int], eps: float):
        super().__init__()
        b0, b1a, b1b, b2a, b2b, b3b = widths
        self.b0 = Unit(c_in, b0, 1, eps=eps)
        self.b1a, self.b1b = Unit(c_in, b1a, 1, eps=eps), Unit(b1a, b1b, 3, eps=eps)
        self.b2a, self.b2b = Unit(c_in, b2a, 1, eps=eps), Unit(b2a, b2b, 3, eps=eps)
        self.b3a, self.b3b = MaxPool((3, 3, 3), (1, 1, 1)), Unit(c_in, b3b, 1, eps=eps)
        self.c_out = b0 + b1b + b2b + b3b

    def forward(self, x: Tensor) -> Tensor:
        branches = [self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(self.b3a(x))]
        return torch.cat(branches, dim=1)


class Logits(nn.Module):
    """The last 1x1x1 convolution, with a bias and nothing after it; a module for the sake of its key."""

    def __init__(self, c_in: int, classes: int):
        super().__init__()
        self.conv3d = nn.Conv3d(c_in, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3d(x)


class I3D(nn.Module):
    """Clips (b, 3, f, 224, 224), float in [-1, 1], f >= 9, to Kinetics logits (b, 400), mean over time.

    `eps` is the batch norms': 1e-3 in TensorFlow's own I3D and hassony2, 1e-5 in the port that VideoGPT and
    TATS use. Key layout of piergiaj/pytorch-i3d. Starts in evaluation mode: as a feature network it never
    trains. Raises ValueError for another shape.
    """

    def __init__(self, eps: float = 1e-3):
        super().__init__()
        self.Conv3d_1a_7x7 = Unit(3, 64, 7, stride=2, eps=eps)
        self.MaxPool3d_2a_3x3 = MaxPool((1, 3, 3), (1, 2, 2))
        self.Conv3d_2b_1x1 = Unit(64, 64, 1, eps=eps)
        self.Conv3d_2c_3x3 = Unit(64, 192, 3, eps=eps)
        self.MaxPool3d_3a_3x3 = MaxPool((1, 3, 3), (1, 2, 2))
        c = 192
        for name, widths in MIXED.items():
            if name == "4b":
                self.MaxPool3d_4a_3x3 = MaxPool((3, 3, 3), (2, 2, 2))
            if name == "5b":
                self.MaxPool3d_5a_2x2 = MaxPool((2, 2, 2), (2, 2, 2))
            block = Mixed(c, widths, eps)
            self.add_module(f"Mixed_{name}", block)
            c = block.c_out
        self.avg_pool = nn.AvgPool3d((2, 7, 7), stride=1)
        self.logits = Logits(c, 400)
        self.to(memory_format=torch.channels_last_3d)  # 1.8 times faster on a CPU, same numbers to 1e-5
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 5 or x.shape[1] != 3 or x.shape[3:] != (224, 224) or x.shape[2] < SHORTEST_CLIP:
            raise ValueError(
                f"I3D takes clips of shape (b, 3, f, 224, 224), f >= {SHORTEST_CLIP}, not {tuple(x.shape)}."
            )
        for layer in self.children():  # the layers run in the order they were defined in
            x = layer(x)
        return x.flatten(2).mean(2)


def fold_batch_norm(net: I3D) -> I3D:
    """The same function with each batch norm folded into its convolution, in place; no weights load afterwards.

    Same numbers to rounding: a batch norm in evaluation mode is a scale and a shift of each channel.
    """
    for unit in net.modules():
        if isinstance(unit, Unit) and isinstance(unit.bn, nn.BatchNorm3d):
            unit.conv3d, unit.bn = fuse_conv_bn_eval(unit.conv3d, unit.bn), nn.Identity()
    return net.requires_grad_(False)


def random_i3d(seed: int = 0) -> I3D:
    """I3D with random weights that depend on `seed` alone; the global generator is left as it was.

    He's initialisation (arXiv 1502.01852), standard deviation sqrt(2 / fan_in), keeps the second moment
    through a ReLU, and a fresh batch norm in evaluation mode is the identity but for eps; so the signal
    reaches the logits at the scale of the input, where PyTorch's default would shrink it by a factor of 2 to
    3 at each of 20 layers.
    """
    with torch.random.fork_rng(devices=[]):  # constructing draws from the global generator
        net = I3D()
    generator = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.Conv3d):
            std = math.sqrt(2 / module.weight[0].numel())
            nn.init.normal_(module.weight, 0.0, std, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return net


# Parts of hassony2's keys and what piergiaj calls them; no other part of a key holds one of either side.
HASSONY2 = {
    "conv3d_0c_1x1.": "logits.",
    "conv3d_": "Conv3d_",
    "mixed_": "Mixed_",
    ".batch3d.": ".bn.",
    ".branch_0.": ".b0.",
    ".branch_1.0.": ".b1a.",
    ".branch_1.1.": ".b1b.",
    ".branch_2.0.": ".b2a.",
    ".branch_2.1.": ".b2b.",
    ".branch_3.1.": ".b3b.",
}


def is_hassony2(state_dict: Mapping[str, Tensor]) -> bool:
    """True for the key layout of hassony2/kinetics_i3d_pytorch."""
    return "conv3d_0c_1x1.conv3d.weight" in state_dict


def convert_keys(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights in piergiaj's or hassony2's key layout, to this class's (piergiaj's), without copies.

    The result is a plain dict on purpose. Files without `num_batches_tracked` (287 entries) then load
    strictly, where an OrderedDict that carries torch's `_metadata` makes batch norm ask for those entries.
    """
    converted = {}
    hassony2 = is_hassony2(state_dict)
    for key, value in state_dict.items():
        if hassony2:
            for theirs, ours in HASSONY2.items():
                key = key.replace(theirs, ours)
        converted[key] = value
    return converted
