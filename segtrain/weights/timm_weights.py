"""The pretrained weights of timm's encoders, by name, from the hub's cache or its server, or from a file of timm's."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segtrain.config import ModelConfig
from segtrain.errors import DataError, SegtrainError
from segtrain.models import Segmenter
from segtrain.models.blocks import Norm
from segtrain.models.timm_encoder import PREFIX, TimmEncoder, build_timm
from segtrain.weights.files import existing, hashes, read_safetensors, read_torch, unwrap
from segtrain.weights.matching import channels_note, spread_rgb, takes_other_channels
from segtrain.weights.provenance import with_terms

NON_COMMERCIAL = ("-nc", "noncommercial", "non-commercial", "research")


@dataclass
class TimmReport:
    """What became of timm's weights: the counterpart of matching.Report."""

    name: str
    licence: str
    origin: str
    tensors: int
    sha256: str
    certificate: str
    normalised: tuple[list[float], list[float]] | None

    @property
    def provenance(self) -> dict[str, Any]:
        """Weights whose licence forbids commercial use are named; for others it is not known."""
        words = self.licence.lower()
        noncommercial = True if any(word in words for word in NON_COMMERCIAL) else None
        entry = {"file": self.name, "known": None, "licence": self.licence, "noncommercial": noncommercial}
        return with_terms([entry], [])

    @property
    def start(self) -> dict[str, Any]:
        return {"file": self.origin, "sha256": self.sha256, "matched": self.tensors, "share": 1.0}

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.tensors} tensors, all of the encoder's, from {self.origin}"]
        lines += [f"licence of the weights: {self.licence}", self.certificate]
        lines += [f"WARNING    not for commercial use: {line}" for line in self.provenance["noncommercial"]]
        return "\n".join(lines)


def load_timm(config: ModelConfig, network: Segmenter, file: Path | None = None) -> TimmReport:
    """Give the encoder of a network timm's weights of its name, or those of a file with timm's names.

    config: the options that the network was built with. DataError, in one sentence, if they cannot be had or do not
    fit. Ranks of one machine share the hub's cache.
    """
    body = network.body
    assert isinstance(body, TimmEncoder)
    name = config.backbone.removeprefix(PREFIX)
    norm = Norm(config.norm, config.activation, config.negative_slope, config.norm_variant, config.scale)
    overlay = None if file is None else {"file": str(existing(file)), "hf_hub_id": None, "url": ""}
    try:
        trained = build_timm(config.backbone, norm, config.output_stride, config.backbone_options, True, overlay)
    except SegtrainError:
        raise
    except Exception as error:
        raise unobtainable(name, file, error) from error
    own, notes = body.state_dict(), [trained.certificate]
    state = dict(trained.state_dict())
    for key, value in state.items():
        if takes_other_channels(f"body.{key}", value, own[key], network.in_channels):
            state[key] = spread_rgb(value, network.in_channels)
            notes.append(channels_note(key, network.in_channels))
    body.load_state_dict(state)
    about, origin = trained.about, f"https://huggingface.co/timm/{name}" if file is None else str(file)
    full = f"timm:{about.get('architecture', name)}{'.' + str(about['tag']) if about.get('tag') else ''}"
    mean, std = about.get("mean"), about.get("std")
    count = sum(not key.endswith("num_batches_tracked") for key in trained.state_dict())
    return TimmReport(
        full, str(about.get("license") or "not stated"), origin, count, hashes(file)[1] if file else "",
        "\n".join(notes), (list(mean), list(std)) if mean and std and len(mean) == 3 else None,
    )  # fmt: skip


def unobtainable(name: str, file: Path | None, error: Exception) -> DataError:
    reason = (str(error).strip() or type(error).__name__).partition("\n")[0][:160]
    if file is not None:
        return DataError(
            f"{file} does not fit {PREFIX}{name} ({reason}): give the file of that name, or model.weights=none"
        )
    return DataError(
        f"the weights of {PREFIX}{name} cannot be had ({reason}): download model.safetensors from "
        f"https://huggingface.co/timm/{name} on another machine and give model.weights=FILE, or model.weights=none"
    )


def is_of_timm(path: Path) -> bool:
    """Whether a file has timm's names, not those of a network of ours."""
    content, _ = read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)
    return not any(key.startswith("body.") for key in unwrap(content))
