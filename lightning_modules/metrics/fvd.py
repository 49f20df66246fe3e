"""Frechet Video Distance (arXiv 1812.01717): how far two sets of clips lie apart in the eyes of I3D.

Preprocessing is the reference's: bytes, bilinear to 224x224 without keeping the aspect, 2x / 255 - 1;
features are the 400 logits averaged over time. The number falls as the sets grow, so compare only equal
numbers of clips.
"""

import hashlib
import pickle
import warnings
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from models.i3d import I3D, SHORTEST_CLIP, convert_keys, is_hassony2, random_i3d

RESIZE = "bilinear to 224x224, aspect not kept, align_corners=False, no antialiasing"
RANDOM = "fixed-seed random network"


def frechet_distance(x: Tensor, y: Tensor) -> Tensor:
    """Squared Frechet distance of Gaussians fitted to features x (n, d) and y (m, d); a float64 scalar >= 0.

        || mu_x - mu_y ||^2 + Tr S_x + Tr S_y - 2 Tr (S_x S_y)^{1/2},   covariances with divisor n - 1

    The last trace is the nuclear norm || X Y^T ||_* / sqrt((n-1)(m-1)) of the centred features: no matrix
    square root, so it holds for n < d too. Raises ValueError for fewer than two rows or unequal d.
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"Features must be (n, d) and (m, d), not {tuple(x.shape)} and {tuple(y.shape)}.")
    n, m = len(x), len(y)
    if min(n, m) < 2:
        raise ValueError(f"A Frechet distance needs at least two clips of each kind, and there are {n} and {m}.")
    x, y = x.double(), y.double()
    mean_x, mean_y = x.mean(0), y.mean(0)
    x, y = (x - mean_x) / (n - 1) ** 0.5, (y - mean_y) / (m - 1) ** 0.5
    # X = Q R with orthonormal Q leaves the norm to R: at most d x d, however many clips there are.
    r_x, r_y = (torch.linalg.qr(z, mode="r").R for z in (x, y))
    cross = torch.linalg.svdvals(r_x @ r_y.T).sum()
    distance = (mean_x - mean_y).square().sum() + x.square().sum() + y.square().sum() - 2 * cross
    return distance.clamp(min=0)  # rounding can leave -1e-13


def check_videos(videos: Tensor, frames: int = 1) -> None:
    """Raises ValueError unless `videos` is uint8 (b, 3, f, h, w) with f >= `frames`."""
    if videos.dtype != torch.uint8:
        raise ValueError(f"Videos must be uint8 in 0..255, not {str(videos.dtype).removeprefix('torch.')}.")
    if videos.ndim != 5 or videos.shape[1] != 3:
        raise ValueError(f"Videos must have the shape (b, 3, f, h, w), not {tuple(videos.shape)}.")
    if videos.shape[2] < frames:
        raise ValueError(f"The network needs clips of at least {frames} frames, and these have {videos.shape[2]}.")


def prepare(videos: Tensor) -> Tensor:
    """uint8 (b, 3, f, h, w) to float (b, 3, f, 224, 224) in [-1, 1], frame by frame."""
    frames = rearrange(videos, "b c f h w -> (b f) c h w").float()
    frames = F.interpolate(frames, size=(224, 224), mode="bilinear", align_corners=False)
    return rearrange(frames * (2 / 255) - 1, "(b f) c h w -> b c f h w", b=len(videos))


def sha256_of(path: Path, expected: str | None = None) -> str:
    """SHA-256 of a file, in hex; raises ValueError where it is not the `expected` one."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if expected is not None and digest != expected.lower():
        raise ValueError(f"{path} has the SHA-256 {digest}, but {expected} was expected.")
    return digest


def load_i3d(path: Path) -> nn.Module:
    """The network of a published weight file of FVD, in evaluation mode on the CPU.

    i3d_torchscript.pt (stylegan-v) is a TorchScript archive; i3d_pretrained_400.pt (VideoGPT, TATS) a dict of
    287 entries in piergiaj's layout with BN eps 1e-5; hassony2's layout has 1e-3. Raises ValueError for other
    files, rgb_imagenet.pt (344 entries in piergiaj's layout) among them: it is another network. A layout
    cannot tell everything, so reports carry the digest.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any("/code/" in name for name in archive.namelist()):
                with warnings.catch_warnings():  # TorchScript is deprecated, but the file is what it is
                    warnings.simplefilter("ignore", FutureWarning)
                    return torch.jit.load(str(path), map_location="cpu").eval()
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is not a weight file that PyTorch can read safely.") from error
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(f"{path} is not a plain dictionary of I3D weights.")
    hassony2 = is_hassony2(weights)
    if "logits.conv3d.weight" in weights and any(key.endswith("num_batches_tracked") for key in weights):
        raise ValueError(
            f"{path} has the {len(weights)} entries of rgb_imagenet.pt, whose distances are not FVD; "
            "use i3d_torchscript.pt or i3d_pretrained_400.pt."
        )
    with torch.random.fork_rng(devices=[]):  # constructing draws from the global generator
        net = I3D(eps=1e-3 if hassony2 else 1e-5)
    try:
        net.load_state_dict(convert_keys(weights))
    except RuntimeError as error:
        raise ValueError(f"{path} does not hold the weights of I3D: its entries do not fit.") from error
    return net


class FrechetVideoDistance(Metric):
    """FVD of generated clips against real ones; lower is better.

    `weights` names a published file (see `load_i3d`), whose `sha256` is checked where given; the number is
    then called "fvd". Without weights the network is random with a fixed seed, and the number "fvd_random":
    it orders gross differences in a test or a demo and compares with nothing published. `chunk` clips run at
    a time.

    Videos are moved to the metric's own device. The network stays out of the module tree, so that no
    checkpoint holds it. Use `update` and `compute`: a single call of the metric has only one kind of clip.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    real: list[Tensor]
    fake: list[Tensor]
    real_shape: Tensor
    fake_shape: Tensor
    network: nn.Module

    def __init__(self, weights: str | Path | None = None, sha256: str | None = None, chunk: int = 8):
        super().__init__()
        if weights is None and sha256 is not None:
            raise ValueError("A SHA-256 was given without the weight file it belongs to.")
        if weights is not None and not Path(weights).is_file():
            raise FileNotFoundError(f"There is no I3D weight file at {weights}.")
        self.name = "fvd_random" if weights is None else "fvd"
        self.digest = None if weights is None else sha256_of(Path(weights), sha256)
        network = random_i3d() if weights is None else load_i3d(Path(weights))
        object.__setattr__(self, "network", network)  # past nn.Module's registration
        self.chunk = chunk
        for kind in ("real", "fake"):
            self.add_state(kind, default=[], dist_reduce_fx="cat")
            # (f, h, w) of the clips; a rank that saw none has zeros, hence the maximum
            self.add_state(f"{kind}_shape", default=torch.zeros(3, dtype=torch.long), dist_reduce_fx="max")

    def update(self, videos: Tensor, real: bool) -> None:
        """Adds uint8 (b, 3, f, h, w) clips, 0..255, f >= 9. All clips have the same f; each kind one (h, w).

        Raises ValueError for floats, another shape, or a length or size that changes.
        """
        check_videos(videos, SHORTEST_CLIP)
        self._note_shape(videos, "real" if real else "fake")
        (self.real if real else self.fake).append(self.features(videos))

    def compute(self) -> Tensor:
        """The distance, a float64 scalar; ValueError where there are fewer than two clips of a kind."""
        n_real, n_fake = self._count(self.real), self._count(self.fake)
        if min(n_real, n_fake) < 2:
            raise ValueError(
                f"FVD needs at least two real and two generated clips, and there are {n_real} and {n_fake}."
            )
        return frechet_distance(dim_zero_cat(self.real), dim_zero_cat(self.fake))

    def features(self, videos: Tensor) -> Tensor:
        """I3D logits (b, 400) of uint8 clips (b, 3, f, h, w), float32 even under autocast."""
        net = self.network.to(self.device)
        # The TorchScript archive can scale and resize by itself; it gets prepared input like any other.
        scripted = isinstance(net, torch.jit.ScriptModule)
        options = {"rescale": False, "resize": False, "return_features": True} if scripted else {}
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            logits = [net(prepare(clips.to(self.device)), **options) for clips in videos.split(self.chunk)]
        return torch.cat(logits)

    def summary(self) -> dict[str, int | str | None]:
        """What must be printed beside the number: sizes of both sets and their clips, resize, network."""
        frames = int(torch.maximum(self.real_shape, self.fake_shape)[0])
        return {
            "name": self.name,
            "n_real": self._count(self.real),
            "n_fake": self._count(self.fake),
            "frames": frames or None,
            "resolution_real": self._resolution(self.real_shape),
            "resolution_fake": self._resolution(self.fake_shape),
            "resize": RESIZE,
            "weights": RANDOM if self.digest is None else f"sha256:{self.digest}",
        }

    def _note_shape(self, videos: Tensor, kind: str) -> None:
        shape = torch.tensor(videos.shape[2:], device=self.device)
        own, frames = getattr(self, f"{kind}_shape"), int(torch.maximum(self.real_shape, self.fake_shape)[0])
        if frames and frames != shape[0]:
            raise ValueError(f"All clips of an FVD have one length; {frames} frames came first, now {shape[0]}.")
        if own.any() and not torch.equal(own, shape):
            first, now = self._resolution(own), self._resolution(shape)
            raise ValueError(f"All {kind} clips have one size; {first} came first, now {now}.")
        setattr(self, f"{kind}_shape", shape)

    @staticmethod
    def _count(features: list[Tensor] | Tensor) -> int:
        """Number of clips; torchmetrics turns the list into one tensor where it gathers ranks."""
        return len(features) if isinstance(features, Tensor) else sum(len(rows) for rows in features)

    @staticmethod
    def _resolution(shape: Tensor) -> str | None:
        """The "HxW" of an (f, h, w) state, None before the first clip."""
        return f"{int(shape[1])}x{int(shape[2])}" if shape.any() else None
