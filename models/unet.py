"""ONE U-Net for D, D^t, upF, SR_l, SR_l^t and SR_h, after unCLIP's ADM (arXiv 2204.06125, 2105.05233).

An image is a clip of one frame. What makes a network a decoder, an interpolator or an upsampler is its
`UNetConfig`; what makes it a video network is `temporal=True`, which adds layers that begin as the identity.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from models.norm import Norm
from models.p3d import PseudoAttention3d, PseudoConv3d, sinusoidal
from models.tiles import in_tiles, through


@dataclass
class UNetConfig:
    """The shape of a U-Net. Channels at level i are `width * multiples[i]`, its side 1 / (2^i patch) of the input."""

    width: int = 128  # channels of the first level
    patch: int = 1  # squares of patch x patch pixels are the channels of one: 4 and 16 times cheaper at 2 and 4 (Ours)
    multiples: list[int] = field(default_factory=lambda: [1, 2, 3, 4])  # channels of each level / width
    blocks: int = 3  # residual blocks per level, on the way down (one more on the way up)
    attention: list[int] = field(default_factory=lambda: [2, 4, 8])  # downsampling factors that have attention
    head_width: int = 64  # channels of an attention head
    temporal_attention: bool = True  # in a video network, temporal attention after each spatial attention
    dropout: float = 0.0
    embedding_width: int = 0  # width of the CLIP image embedding, 0 = not conditioned on one
    context_tokens: int = 4  # tokens made of the embedding, for attention
    low_res: bool = False  # super-resolution: takes the small clip, resized, as three more channels
    residual: bool = False  # super-resolution that predicts x0: the output is added to the small clip (Ours)
    learned_variance: bool = True  # predicts the variance too: six output channels (arXiv 2102.09672)
    checkpoint_activations: bool = False  # recompute residual blocks in backward: less memory, more time
    channels_last: bool = True  # false = the common memory layout, in which every swap of space and time copies


class ResBlock(nn.Module):
    """ADM's residual block: norm, SiLU, conv, scale and shift by the timestep embedding, conv.

    `resample` "up" or "down" changes the side by two inside the block, in both of its branches.
    """

    def __init__(self, c_in: int, c_out: int, time_width: int, dropout: float, temporal: bool, resample: str = ""):
        super().__init__()
        self.resample = resample
        self.norm_in = Norm(c_in)
        self.conv_in = PseudoConv3d(c_in, c_out, temporal=temporal)
        self.time = nn.Linear(time_width, 2 * c_out)
        self.norm_out = Norm(c_out)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = PseudoConv3d(c_out, c_out, temporal=temporal)
        nn.init.zeros_(self.conv_out.spatial.weight)
        nn.init.zeros_(self.conv_out.spatial.bias)  # type: ignore[arg-type]
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, time: Tensor, frames: int) -> Tensor:
        h = self.norm_in(x)
        if self.resample == "down":
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        elif self.resample == "up":
            h, x = (F.interpolate(y, scale_factor=2.0, mode="nearest") for y in (h, x))
        h = self.conv_in(h, frames)
        h = self.norm_out(h, *self.time(F.silu(time)).chunk(2, dim=1))
        h = self.conv_out(self.dropout(h), frames)
        return self.skip(x) + h


class Level(nn.Module):
    """A residual block and, where the level has it, attention."""

    def __init__(self, res: ResBlock, attention: PseudoAttention3d | None = None, recompute: bool = False):
        super().__init__()
        self.res, self.attention, self.recompute = res, attention, recompute
        self.joins_skip = res.resample != "up"  # on the way up, every block but the upsampling one takes a skip

    def run(self, x: Tensor, time: Tensor, frames: int, context: Tensor | None) -> Tensor:
        x = self.res(x, time, frames)
        return x if self.attention is None else self.attention(x, frames, context)

    def forward(self, x: Tensor, time: Tensor, frames: int, context: Tensor | None) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self.run, x, time, frames, context, use_reentrant=False)
        return self.run(x, time, frames, context)


class UNet(nn.Module):
    """The network of every pixel stage.

    Args:
        config: its shape.
        temporal: add the temporal layers and the fps embedding (D^t, upF, SR_l^t).
        masked: add the four input channels of interpolation, masked RGB and mask (paper, section 3.3).
            Their weights begin at zero, so that upF = D^t at step 0.
    """

    def __init__(self, config: UNetConfig, *, temporal: bool = False, masked: bool = False):
        super().__init__()
        self.config, self.temporal, self.masked = config, temporal, masked
        width, time_width = config.width, 4 * config.width
        channels = [width * m for m in config.multiples]
        context_width = time_width if config.embedding_width and config.context_tokens else 0

        self.time = mlp(width, time_width)
        self.fps = mlp(width, time_width, zero=True) if temporal else None
        self.noise_level = mlp(width, time_width) if config.low_res else None
        if config.embedding_width:
            self.embedding = nn.Linear(config.embedding_width, time_width)
            if config.context_tokens:
                self.context = nn.Linear(config.embedding_width, config.context_tokens * time_width)
            self.no_embedding = nn.Parameter(torch.zeros(config.embedding_width))  # guidance: "no condition"

        def level(c_in: int, c_out: int, factor: int, resample: str = "", attend: bool = True) -> Level:
            res = ResBlock(c_in, c_out, time_width, config.dropout, temporal, resample)
            attention = None
            if attend and factor in config.attention:
                attention = PseudoAttention3d(
                    c_out,
                    config.head_width,
                    context_width=context_width,
                    temporal=temporal and config.temporal_attention,
                )
            return Level(res, attention, config.checkpoint_activations)

        square = config.patch**2
        self.conv_in = PseudoConv3d((3 + 3 * config.low_res) * square, width, temporal=temporal)
        # A convolution of its own rather than wider weights: the image checkpoint then loads as it is.
        self.conv_given = nn.Conv2d(4 * square, width, 3, padding=1, bias=False) if masked else None
        if self.conv_given is not None:
            nn.init.zeros_(self.conv_given.weight)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        skips, c, factor = [width], width, 1
        for i, c_level in enumerate(channels):
            for _ in range(config.blocks):
                self.down.append(level(c, c_level, factor))
                skips.append(c := c_level)
            if i < len(channels) - 1:
                factor *= 2
                self.down.append(level(c, c, factor, "down", attend=False))
                skips.append(c)
        self.middle = nn.ModuleList([level(c, c, factor), level(c, c, factor, attend=False)])
        for i, c_level in reversed(list(enumerate(channels))):
            for _ in range(config.blocks + 1):
                self.up.append(level(c + skips.pop(), c_level, factor))
                c = c_level
            if i:
                factor //= 2
                self.up.append(level(c, c, factor, "up", attend=False))
        self.norm_out = Norm(c)
        self.conv_out = PseudoConv3d(c, (6 if config.learned_variance else 3) * square, temporal=temporal)
        nn.init.zeros_(self.conv_out.spatial.weight)
        nn.init.zeros_(self.conv_out.spatial.bias)  # type: ignore[arg-type]
        self.layout = torch.channels_last if config.channels_last else torch.contiguous_format
        self.to(memory_format=self.layout)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        *,
        embedding: Tensor | None = None,
        drop: Tensor | None = None,
        fps: Tensor | None = None,
        low_res: Tensor | None = None,
        noise_level: Tensor | None = None,
        given: Tensor | None = None,
        tile: int = 0,
    ) -> Tensor:
        """One prediction.

        Args:
            x: noised clip `b 3 f h w`, or image `b 3 h w`, in [-1, 1] before the noise.
            t: diffusion times `b`.
            embedding: CLIP image embedding `b d`, scaled to unit variance per coordinate (`models.clip`).
            drop: rows whose embedding is replaced by the learned "no condition" of guidance, bool `b`.
            fps: frames per second `b`, the achieved rate.
            low_res: the small clip resized to x's size, as x.
            noise_level: diffusion time of the noise that was added to `low_res`, `b`.
            given: masked RGB and mask `b 4 f h w`; mask 1 = this frame is given.
            tile: frames that a layer works on at a time (`models.tiles`), 0 = all. The same to rounding.

        Returns:
            As x, with 6 channels if the variance is learned (prediction first).
        """
        image = x.ndim == 4
        if image:
            x = x.unsqueeze(2)
            low_res = low_res.unsqueeze(2) if low_res is not None else None
        patch = self.config.patch
        sides = patch * 2 ** (len(self.config.multiples) - 1)
        if x.shape[-1] % sides or x.shape[-2] % sides:
            patches = f" and patches of {patch} x {patch}" if patch > 1 else ""
            raise ValueError(f"a U-Net of {len(self.config.multiples)} levels{patches} needs sides divisible by "
                             f"{sides}, not {x.shape[-2]} x {x.shape[-1]}.")  # fmt: skip
        frames = x.shape[2]

        # Conditions are repeated per frame before the layers that read them, not after: a matrix product rounds
        # by its number of rows, and a clip must equal its frames folded into the batch bit for bit.
        def per_frame(values: Tensor) -> Tensor:
            return values.repeat_interleave(frames, dim=0)

        time = self.time(sinusoidal(per_frame(t), self.config.width).to(x.dtype))
        context = None
        if self.config.embedding_width:
            if embedding is None:
                raise ValueError("this U-Net is conditioned on a CLIP image embedding; none was given.")
            if drop is not None:
                embedding = torch.where(drop[:, None], self.no_embedding.to(embedding.dtype), embedding)
            embedding = per_frame(embedding)
            time = time + self.embedding(embedding)
            if self.config.context_tokens:
                context = rearrange(self.context(embedding), "b (n d) -> b n d", n=self.config.context_tokens)
        if self.fps is not None and fps is not None and frames > 1:
            # fps in 1...30 is stretched over the range that sinusoids of a diffusion time resolve well
            time = time + self.fps(sinusoidal(per_frame(fps * (1000 / 30)), self.config.width).to(x.dtype))
        if self.noise_level is not None and noise_level is not None:
            time = time + self.noise_level(sinusoidal(per_frame(noise_level), self.config.width).to(x.dtype))

        def fold(clip: Tensor) -> Tensor:
            # the one copy: to channels-last memory
            pixels = rearrange(clip, "b c f (h p) (w q) -> (b f) h w (c p q)", p=patch, q=patch)
            return pixels.permute(0, 3, 1, 2).contiguous(memory_format=self.layout)

        x = fold(torch.cat((x, low_res), dim=1) if low_res is not None else x)

        def enter(noised: Tensor, *more: Any) -> Tensor:
            *masked, count = more
            h = self.conv_in.spatial(noised)
            if self.conv_given is not None and masked:
                h = h + self.conv_given(masked[0])
            return self.conv_in.along_time(h, count)

        inputs = (x,) if self.conv_given is None or given is None else (x, fold(given))
        h = in_tiles(enter, inputs, frames, tile, reach=1)
        skips = [h]
        for block in self.down:
            h = through(block, (h,), time, frames, context, tile)
            skips.append(h)
        for block in self.middle:
            h = through(block, (h,), time, frames, context, tile)
        for block in self.up:
            if block.joins_skip and not tile:  # whole, so that neither part outlives it
                h = torch.cat((h, skips.pop()), dim=1)
                h = block(h, time, frames, context)
            else:
                h = through(block, (h, skips.pop()) if block.joins_skip else (h,), time, frames, context, tile)
        h = in_tiles(lambda x, count: self.conv_out(self.norm_out(x), count), (h,), frames, tile, reach=1)
        h = rearrange(h, "(b f) (c p q) h w -> b c f (h p) (w q)", f=frames, p=patch, q=patch)
        if self.config.residual and low_res is not None:
            h = torch.cat((h[:, :3] + low_res, h[:, 3:]), dim=1)
        return h.squeeze(2) if image else h

    def temporal_keys(self) -> set[str]:
        """Keys of the state dict that an image network of the same config does not have."""
        return {k for k in self.state_dict() if ".temporal." in f".{k}" or k.startswith(("fps.", "conv_given."))}

    def load_image_weights(self, state: dict[str, Tensor]) -> None:
        """Load the weights of the network this one grows from (D -> D^t -> upF, SR_l -> SR_l^t).

        The missing keys must be exactly the temporal ones, or for upF the mask's alone; none may be unexpected.

        Raises:
            ValueError: the checkpoint is of another network; says which keys disagree.
        """
        new = {"conv_given.weight"} if self.masked else self.temporal_keys()
        own = self.state_dict()
        wrong = {k for k in state if k not in own or own[k].shape != state[k].shape}
        names = sorted(wrong) + sorted((set(own) - set(state)) ^ new)
        if names:
            raise ValueError(
                f"the checkpoint is not of this network: {len(names)} keys disagree, the first is '{names[0]}'. "
                "Train the earlier stage with the same config, or point to another checkpoint."
            )
        self.load_state_dict(state, strict=False)


def mlp(c_in: int, c_out: int, zero: bool = False) -> nn.Sequential:
    """Two layers with a SiLU between; `zero` starts it as the zero function."""
    layers: Sequence[nn.Module] = (nn.Linear(c_in, c_out), nn.SiLU(), nn.Linear(c_out, c_out))
    if zero:
        nn.init.zeros_(layers[2].weight)  # type: ignore[arg-type]
        nn.init.zeros_(layers[2].bias)  # type: ignore[arg-type]
    return nn.Sequential(*layers)
