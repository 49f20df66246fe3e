"""`python -m experiments.export SIZE [folder=... half=true] [key=value ...]`: the trained cascade as one folder.

What it writes, `<runs>/<size>/pretrained` unless named, is all that `MakeAVideo.from_pretrained` needs.
"""

import sys
from pathlib import Path

from experiments import build
from experiments.cli import for_people
from experiments.config import Config, load


def export(config: Config, folder: str = "", half: bool = False) -> Path:
    """Write the cascade of a size to a folder, in float16 with `half`; FileNotFoundError for untrained stages."""
    path = Path(folder) if folder else build.run_folder(config, "pretrained")
    build.cascade(config).save_pretrained(str(path), half)
    return path


@for_people
def main(arguments: list[str]) -> None:
    if not arguments:
        raise ValueError("usage: python -m experiments.export SIZE [folder=... half=true] [key=value ...]")
    own = dict(word.split("=", 1) for word in arguments[1:] if word.startswith(("folder=", "half=")))
    overrides = [word for word in arguments[1:] if word.split("=")[0] not in own]
    if own.get("half", "false") not in ("true", "false"):
        raise ValueError(f"half={own['half']} is neither true nor false.")
    path = export(load(arguments[0], overrides), own.get("folder", ""), own.get("half") == "true")
    size = sum(file.stat().st_size for file in path.iterdir())
    print(f"{path}: {size / 2**20:.0f} MiB")


if __name__ == "__main__":
    main(sys.argv[1:])
