"""`python -m experiments.generate SIZE "a sentence" [key=value ...]`: a film for a sentence.

Writes `<runs>/<size>/films/<sentence>-<seed>.mp4` and, beside it, a contact sheet with a row for each stage.
"""

import re
import sys
import time
import warnings
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from experiments import build
from experiments.cli import for_people
from experiments.config import Config, load
from lightning_modules.media import to_uint8, write_mp4
from models.cascade import Film, MakeAVideo


def make_cascade(config: Config) -> MakeAVideo:
    """The trained cascade of a size, with a progress bar for each stage of sampling."""
    bar: tqdm[None] | None = None

    def on_step(name: str, calls: int, total: int) -> None:
        nonlocal bar
        if calls == 1 or bar is None:
            bar = tqdm(total=total, desc=f"sampling {name}", file=sys.stderr)
        bar.update(calls - bar.n)
        if calls == total:
            bar.close()

    device = build.device()
    mixed = build.precision(config.decoder.trainer.precision).startswith("bf16")
    return build.cascade(config, device, torch.bfloat16 if mixed else torch.float32, on_step)


def generate(
    config: Config, prompt: str, seed: int | None = None, maker: MakeAVideo | None = None
) -> tuple[Path, Path]:
    """Make one film.

    Returns:
        Paths of the mp4 and of the contact sheet.

    Raises:
        ValueError: the prompt is empty.
        FileNotFoundError: a stage has not been trained.
    """
    if not prompt.strip():
        raise ValueError('the prompt is empty: say what the film should show, as in PROMPT="a 3D emoji of a ram".')
    maker = maker or make_cascade(config)
    if maker.clip.truncated(prompt):
        warnings.warn(
            f"the prompt has more tokens than CLIP reads ({config.clip.model.context_length}); the end is ignored.",
            stacklevel=2,
        )
    seed = config.seed if seed is None else seed
    film = maker.text_to_video([prompt], [seed])
    folder = build.run_folder(config, "films")
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "film"
    path = folder / f"{name}-{seed}.mp4"
    write_mp4(path, film.high[0].cpu(), film.fps)
    sheet = path.with_suffix(".png")
    contact_sheet(film, prompt).save(sheet)
    return path, sheet


def contact_sheet(film: Film, title: str, columns: int = 8, side: int = 160) -> Image.Image:
    """A row for each stage: the same moments of the film in the decoder's frames, upF's, SR_l's and SR_h's.

    Frames are enlarged without smoothing, so that each shows its own pixels. The rows after the first begin
    between two of the decoder's frames, to show what interpolation made.
    """
    rows: list[tuple[str, Tensor]] = [
        ("D^t", film.decoded),
        ("upF", film.interpolated),
        ("SR_l^t", film.low),
        ("SR_h", film.high),
    ]
    margin = 18
    sheet = Image.new("RGB", (columns * side, (side + margin) * len(rows) + margin), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((4, 3), f'"{title}"', fill="black")
    for i, (name, clip) in enumerate(rows):
        count = clip.shape[2]
        chosen = torch.linspace(0, count - 1, columns).round().long()
        frames = rearrange(clip[0][:, chosen], "c f h w -> f c h w").float().cpu()
        mode = "nearest" if frames.shape[-1] <= side else "bilinear"
        frames = F.interpolate(frames, (side, side), mode=mode)
        strip = to_uint8(rearrange(frames, "f c h w -> c h (f w)"))
        top = margin + i * (side + margin)
        sheet.paste(Image.fromarray(strip), (0, top + margin))
        fps = film.fps if i else film.fps * (film.decoded.shape[2] - 1) / max(1, film.low.shape[2] - 1)
        draw.text(
            (4, top + 3), f"{name}: {count} frames of {clip.shape[-1]} x {clip.shape[-1]}, {fps:g} fps", fill="black"
        )
    return sheet


@for_people
def main(arguments: list[str]) -> None:
    if len(arguments) < 2:
        raise ValueError('usage: python -m experiments.generate SIZE "a sentence" [key=value ...]')
    size, prompt, *overrides = arguments
    config = load(size, overrides)
    start = time.time()
    path, sheet = generate(config, prompt)
    print(f"{path}\n{sheet}\nin {time.time() - start:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
