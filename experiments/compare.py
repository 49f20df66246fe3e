"""`python -m experiments.compare SIZE [key=value ...]`: has learning from video taught motion and kept the pictures?

The decoder's clips of a size beside those of its two baselines and real ones, scored alike:

real clips     as they are
our cascade    as far as D^t
before video   D^t as it began, the identity in time: each frame is a picture of its own
one still      the first of those pictures, as often as there are frames

Where D^t was shown pictures too (`image_share`) and D's weights are not at hand, as with a model in a box, the place of
"before video" is taken by "image layers": D^t without its temporal layers, the picture network that D has become.

All three are of the same embeddings, P's of the names in the CSV of data.clips, and of the same seeds. Concepts are
those trained on; those of `data.clips_without` whose stills were trained on, so that no clip of theirs was; and those
that no stage has seen in any form (in `data.filters.without` too). CLIPSIM is by the cascade's own CLIP or, as in
`make eval-clipsim`, by `clip_name`. The table goes to `<runs>/<size>/compare/` as markdown and JSON.
"""

import json
import sys
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from datamodules.filters import read_names
from datamodules.video_sources import Clip, list_clips
from experiments import build
from experiments.benchmarks import named_rows, prompted
from experiments.cli import for_people
from experiments.config import Config, load
from experiments.generate import make_cascade
from experiments.sampling import sample_seed
from experiments.scores import metric, real_clips, scoring_clip
from lightning_modules.media import as_bytes
from lightning_modules.metrics import CLIPSIM, FrechetVideoDistance, frechet_distance
from lightning_modules.metrics.motion import Motion
from lightning_modules.whole import whole
from models.cascade import MakeAVideo, Stage
from models.clip import Clip as CLIP
from models.unet import UNet

OURS, BEFORE, IMAGE, STILL, REAL = "our cascade (D^t)", "before video", "image layers", "one still", "real clips"
TRAINED, NEVER_MOVED, UNSEEN = "trained on", "still seen, never its motion", "never seen"
NEVER_STILL = "motion seen, never its still"
KINDS = {  # are its clips held out, its stills
    (False, False): TRAINED,
    (True, False): NEVER_MOVED,
    (False, True): NEVER_STILL,
    (True, True): UNSEEN,
}
NOT_TAKEN = ("clips", "prompts", "generated", "folder", "output", "fps", "resolution")  # keys of make eval-... alone


def named_clips(config: Config) -> list[tuple[Clip, str]]:
    """The clips of a WebVid folder with their names, of which training reads none."""
    names = {row["videoid"]: row["name"] for row in named_rows(config.data.clips)}
    clips, _ = list_clips(config.data.clips)
    return [(clip, names[clip.key]) for clip in clips if clip.key in names]


def concepts(config: Config) -> dict[str, list[tuple[Clip, str]]]:
    """Named clips by what training has seen of them; at most `evaluate.samples` of each kind, spread over the list.

    Raises ValueError where there are fewer than two of every kind.
    """
    only = read_names(config.data.clips_only) if config.data.clips_only else None
    no_clip = read_names(config.data.clips_without) if config.data.clips_without else frozenset()
    no_still = frozenset[str]().union(*map(read_names, config.data.filters.without.values()))
    found: dict[str, list[tuple[Clip, str]]] = {kind: [] for kind in KINDS.values()}
    for clip, name in named_clips(config):
        if only is None or clip.key in only:
            found[KINDS[clip.key in no_clip, clip.key in no_still]].append((clip, name))
    samples = config.evaluate.samples
    if samples == 1 or samples < 0:
        raise ValueError(f"samples={samples}: a distance needs at least two clips of a kind, and 0 stands for all.")
    n = samples or max(map(len, found.values()))
    some = {kind: clips[:: max(1, len(clips) // n)][:n] for kind, clips in found.items() if len(clips) > 1}
    if not some:
        listed = f" that {config.data.clips_only} lists" if only else ""
        raise ValueError(f"'{config.data.clips}' has fewer than two named clips of any kind{listed}.")
    return some


def without_motion(config: Config, device: torch.device) -> tuple[str, Stage]:
    """BEFORE and D^t as its training began: D's weights, and temporal layers that are the identity.

    Where D's weights are not at hand: if its spatial layers were frozen, they are D's; if they went on with pictures,
    IMAGE and D^t with temporal layers that are the identity. Raises FileNotFoundError if neither.
    """
    net = build.network(config, "decoder_video")
    assert isinstance(net, UNet)
    part, kind = config.decoder_video, BEFORE
    try:
        state = build.weights(config, "decoder")
    except FileNotFoundError:
        if not part.freeze_spatial and not part.image_share:
            raise
        kind = BEFORE if part.freeze_spatial else IMAGE
        time = net.temporal_keys()
        state = {key: value for key, value in build.weights(config, "decoder_video").items() if key not in time}
    net.load_image_weights(state)
    net = net.to(device).eval().requires_grad_(False)
    return kind, Stage(net, build.diffusion(config, "decoder_video"), config.decoder.size)


def made(
    maker: MakeAVideo, baseline: tuple[str, Stage], config: Config, names: list[str], first: int
) -> dict[str, Tensor]:
    """Clips of each kind, uint8 `b 3 f h w`, of as many prompts, which are samples first, first + 1, ...

    baseline: as `without_motion` has it.
    """
    kind, still = baseline
    seeds = [sample_seed(config.seed, first + i) for i in range(len(names))]
    frames, fps = config.cascade.frames, config.cascade.fps
    embedding = maker.embed([prompted(config.evaluate.prompt, name) for name in names], seeds)
    clips = {OURS: maker.decode(embedding, fps, seeds)}
    trained, maker.decoder = maker.decoder, still
    clips[kind] = maker.decode(embedding, fps, seeds)
    maker.decoder = trained
    clips[STILL] = clips[kind][:, :, :1].expand(-1, -1, frames, -1, -1)
    return {name: as_bytes(clip) for name, clip in clips.items()}


def compare(config: Config) -> dict[str, Any]:
    """The scores of each kind of clip on each kind of concept; returns what is written to the JSON file."""
    maker = make_cascade(config)
    maker.on_step = None
    baseline, fvd = without_motion(config, maker.device), metric(config, "fvd", None).to(maker.device)
    clip = scoring_clip(config, maker.clip)
    result: dict[str, Any] = {
        "size": config.size,
        "seed": config.seed,
        "model": maker.digest(),
        "prompt": config.evaluate.prompt,
        "frames": config.cascade.frames,
        "fps": config.cascade.fps,
        "sampling": {name: asdict(config.cascade.sampling(name)) for name in ("prior", "decoder")},
        "concepts": {},
    }
    for concept, some in concepts(config).items():
        clips, names = [clip for clip, _ in some], [name for _, name in some]
        rows = {kind: Row(fvd, clip, maker.device) for kind in (REAL, OURS, baseline[0], STILL)}
        for videos, numbers in real_clips(config, clips):
            rows[REAL].add(videos, [prompted(config.evaluate.prompt, names[k]) for k in numbers])
        size = config.evaluate.batch_size
        for first in tqdm(range(0, len(names), size), desc=concept, file=sys.stderr):
            part = names[first : first + size]
            for kind, videos in made(maker, baseline, config, part, first).items():
                rows[kind].add(videos, [prompted(config.evaluate.prompt, name) for name in part])
        result["concepts"][concept] = {
            "n": len(names), "names": names, "rows": {kind: row.scores(rows[REAL]) for kind, row in rows.items()}
        }  # fmt: skip
    return result


class Row:
    """The scores of one kind of clips."""

    def __init__(self, fvd: FrechetVideoDistance, clip: CLIP, device: torch.device):
        self.fvd, self.features = fvd, list[Tensor]()
        self.clipsim, self.motion = CLIPSIM(clip).to(device), Motion().to(device)

    def add(self, videos: Tensor, prompts: list[str]) -> None:
        videos = videos.to(self.motion.device)
        self.clipsim.update(videos, prompts)
        self.motion.update(videos)
        self.features.append(self.fvd.features(videos))

    def scores(self, real: "Row") -> dict[str, Any]:
        n, backbone = sum(map(len, self.features)), self.clipsim.summary()["backbone"]
        found = {"n": n, "clipsim": float(self.clipsim.compute()), "backbone": backbone}
        if self is not real:
            found[self.fvd.name] = float(frechet_distance(torch.cat(real.features), torch.cat(self.features)))
        return found | {"motion": float(self.motion.compute()), "correlation": float(self.motion.correlation())}


def markdown(result: dict[str, Any]) -> str:
    """The result as one table."""
    concepts = result["concepts"]
    ours = next(iter(concepts.values()))["rows"][OURS]
    distance = next(name for name in ours if name.startswith("fvd"))
    lines = [
        f"| concepts | clips | CLIPSIM | {distance} | motion | correlation over time |",
        "|---|---|---|---|---|---|",
    ]
    for concept, found in concepts.items():
        for i, (kind, row) in enumerate(found["rows"].items()):
            far = f"{row[distance]:.2f}" if distance in row else ""
            few = "" if row["n"] == found["n"] else f", {row['n']} readable"
            head = f"{concept}, {found['n']}{few}" if i == 0 else ""
            lines.append(
                f"| {head} | {kind} | {row['clipsim']:.3f} | {far} | {row['motion']:.2f} | {row['correlation']:+.2f} |"
            )
    return "\n".join(lines)


@for_people
def main(arguments: list[str]) -> None:
    if not arguments:
        raise ValueError("usage: python -m experiments.compare SIZE [key=value ...]")
    size, *overrides = arguments
    for word in overrides:
        if (key := word.partition("=")[0].removeprefix("evaluate.")) in NOT_TAKEN:
            raise ValueError(f"'{word}': compare takes D^t's clips of the names in data.clips, and no {key}.")
    config = load(size, overrides, section="evaluate")
    result = compare(config)
    folder = build.run_folder(config, "compare")
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("compare.json", json.dumps(result, indent=2)), ("compare.md", markdown(result) + "\n")):
        with whole(folder / name) as path:
            path.write_text(text)
    print(f"{markdown(result)}\n{folder / 'compare.md'}")


if __name__ == "__main__":
    main(sys.argv[1:])
