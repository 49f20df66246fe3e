"""`python -m experiments.showcase SIZE [key=value ...]`: pictures of what a size has learnt, for its card.

    training.png   what D made of the CLIP embeddings of one batch of stills, as its training went on
    films.webp     films of the names in the CSV of data.clips: of concepts trained on, of those whose motion was never
                   seen, and of those never seen at all, a row each (`experiments.compare` says how they are told apart)
    animated.webp  stills whose motion was never seen, above, and each set in motion, below
    animated.png   frames of the latter, a row each, after the still

They go to `<runs>/<size>/showcase/`. Films are as large as generate.size_out makes them, and drawn at 128 pixels.
"""

import re
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from experiments import build, films
from experiments.benchmarks import prompted
from experiments.cli import for_people
from experiments.compare import NEVER_MOVED, concepts
from experiments.config import Config, load
from experiments.films import Request
from experiments.generate import make_cascade
from experiments.sampling import sample_seed
from lightning_modules.media import to_uint8, write, write_picture
from lightning_modules.whole import whole
from models import uses
from models.cascade import Film, MakeAVideo

SIDE = 128  # pixels of a film
COLUMNS = 6
ROWS = 8  # of pictures during training, at most
LABEL = 60  # pixels


def training(config: Config, folder: Path) -> None:
    """D's pictures of its fixed batch: the stills, then a row for each of some steps."""
    pictures = sorted((build.run_folder(config, "decoder") / "samples").glob("step_*.png"))
    if not pictures:
        print(f"no pictures of D's training in {build.run_folder(config, 'decoder')}: training.png was not made")
        return
    some = [pictures[i] for i in np.unique(np.geomspace(1, len(pictures), ROWS).round().astype(int) - 1)]
    grids = [Image.open(path).convert("RGB") for path in some]
    tall = grids[0].height // 2  # the stills are above, what was made of them below
    sheet = Image.new("RGB", (LABEL + grids[0].width, tall * (len(grids) + 1)), "white")
    draw = ImageDraw.Draw(sheet)
    rows = [("stills", grids[0].crop((0, 0, grids[0].width, tall)))]
    for path, grid in zip(some, grids, strict=True):
        step = int(re.sub(r"\D", "", path.stem))
        rows.append((f"{step:,}", grid.crop((0, tall, grid.width, 2 * tall))))
    for i, (label, row) in enumerate(rows):
        sheet.paste(row, (LABEL, i * tall))
        draw.text((4, i * tall + tall // 2 - 6), label, fill="black")
    write_picture(folder / "training.png", sheet)


def drawn(film: Film) -> tuple[Tensor, float]:
    """The film `3 f SIDE SIDE` and its rate."""
    clip, fps = film.last()
    small = F.interpolate(clip[0].float().cpu().transpose(0, 1), (SIDE, SIDE), mode="bilinear", antialias=True)
    return small.transpose(0, 1), fps


def grid(rows: list[list[Tensor]]) -> Tensor:
    """Clips of one length side by side, a row each; white where a row has none."""
    wide, empty = max(map(len, rows)), torch.ones_like(rows[0][0])
    padded = torch.stack([clip for row in rows for clip in row + [empty] * (wide - len(row))])
    return rearrange(padded, "(r q) c f h w -> c f (r h) (q w)", q=wide)


def of_sentences(config: Config, maker: MakeAVideo, folder: Path) -> dict[str, list[str]]:
    """films.webp; returns the names that its rows are of, by what was seen of them."""
    found, rows, fps = dict[str, list[str]](), list[list[Tensor]](), 1.0
    for kind, some in concepts(config).items():
        found[kind], row = [name for _, name in some], []
        for k, name in enumerate(found[kind]):
            request = Request(prompt=prompted(config.evaluate.prompt, name), seed=sample_seed(config.seed, k))
            clip, fps = drawn(films.make(config, request, maker))
            row.append(clip)
        rows.append(row)
    write(folder / "films", grid(rows), fps, "webp")
    return found


def stills(config: Config) -> Tensor:
    """Stills of the concepts whose motion was never seen, uint8 `n 3 h w`; none where no list says which."""
    some = concepts(config).get(NEVER_MOVED, [])
    key = next(iter(config.data.filters.without), "")
    if not key or not some:
        return torch.zeros(0)
    side, found = max(config.clip.model.image_size, config.decoder.size), list[Tensor]()
    for clip, _ in some:
        filters = replace(config.data.filters, only={**config.data.filters.only, key: [clip.key]})
        chosen = replace(config, data=replace(config.data, filters=filters))
        with suppress(ValueError):  # a clip whose still the shards have not
            found.append(build.stills(chosen, config.decoder, side, None).preview(1)["image"])
    return torch.cat(found) if found else torch.zeros(0)


def of_stills(config: Config, maker: MakeAVideo, folder: Path) -> int:
    """animated.webp and animated.png; returns of how many stills."""
    pictures, made, fps = stills(config), list[Tensor](), 1.0
    for k, picture in enumerate(pictures):
        clip, fps = drawn(uses.animate(maker, picture[None], [sample_seed(config.seed, k)], films.last_stage(config)))
        made.append(clip)
    if made:
        small = F.interpolate(pictures.float(), (SIDE, SIDE), mode="bilinear", antialias=True) / 127.5 - 1
        above = [still[:, None].expand_as(clip) for still, clip in zip(small, made, strict=True)]
        write(folder / "animated", grid([above, made]), fps, "webp")
        moments = torch.linspace(0, made[0].shape[1] - 1, COLUMNS + 1).round().long()
        rows = [torch.cat((still, rearrange(clip[:, moments], "c f h w -> c h (f w)")), dim=2)
                for still, clip in zip(small, made, strict=True)]  # fmt: skip
        write_picture(folder / "animated.png", Image.fromarray(to_uint8(torch.cat(rows, dim=1))))
    return len(made)


@for_people
def main(arguments: list[str]) -> None:
    if not arguments:
        raise ValueError("usage: python -m experiments.showcase SIZE [key=value ...]")
    config = load(arguments[0], [*arguments[1:], f"evaluate.samples={COLUMNS}"], section="generate")
    folder = build.run_folder(config, "showcase")
    folder.mkdir(parents=True, exist_ok=True)
    training(config, folder)
    maker = make_cascade(config, on_step=lambda *_: None)
    rows = of_sentences(config, maker, folder)
    n = of_stills(config, maker, folder)
    with whole(folder / "films.txt") as part:
        part.write_text("".join(f"{kind}: {', '.join(names)}\n" for kind, names in rows.items()))
    print(f"{folder}: films of {sum(map(len, rows.values()))} sentences, {n} stills set in motion")


if __name__ == "__main__":
    main(sys.argv[1:])
