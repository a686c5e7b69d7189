"""Where the YAML files are: in configs/ of the checkout, in segtrain/configs/ of the wheel."""

from collections.abc import Iterable
from pathlib import Path

CONFIGS = next(
    path for path in (Path(__file__).parents[1] / "configs", Path(__file__).parents[2] / "configs") if path.is_dir()
)
GROUP_FOLDERS = tuple(sorted(path.name for path in CONFIGS.iterdir() if path.is_dir()))


def group_choices(group: str, folders: Iterable[str | Path] = ()) -> list[str]:
    """Names of the YAML files of a group, those in the user's own folders (--config-dir) too."""
    places = (Path(folder) / group for folder in (CONFIGS, *folders))
    return sorted({path.stem for place in places if place.is_dir() for path in place.glob("*.yaml")})
