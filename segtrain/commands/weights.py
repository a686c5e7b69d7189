"""`segtrain weights`: list the published files of weights, identify one, or download one."""

from pathlib import Path

from segtrain.config import WeightsConfig
from segtrain.console import say
from segtrain.errors import DataError
from segtrain.files import file_to_write
from segtrain.weights.download import describe_download, fetched, known_by_word
from segtrain.weights.files import existing, read_weights
from segtrain.weights.identify import backbone_of
from segtrain.weights.layouts import LAYOUTS
from segtrain.weights.provenance import origin
from segtrain.weights.published import describe_known, has_hash, known_by_name, known_files


def weights(config: WeightsConfig) -> None:
    """List the published files, print which of them a file is, or download one.

    DataError if the file has the name of a published one but not its hash, or cannot be downloaded.
    """
    if config.fetch is not None:
        known = known_by_word(config.fetch)
        path = fetched(known, None if config.output is None else file_to_write(config.output, known["file"]))
        say(describe_download(known, path))
        if known["noncommercial"]:
            say(f"WARNING    not for commercial use: {known['licence']}")
        say(str(path))
        return
    if config.verify is None:
        for known in known_files():
            say(describe_known(known))
        say(f"{len(known_files())} files; segtrain weights verify=FILE tells which of them a file is")
        return
    path = existing(Path(config.verify), remedy="give the file that is to be looked at")
    source = read_weights(path)
    likely = backbone_of(source.tensors, source.layout) or "no known backbone"
    say(f"{path}: md5 {source.md5}, sha256 {source.sha256}")
    say(f"tensors    {source.num_tensors()}, {LAYOUTS[source.layout].title}, by their number {likely}")
    namesake = known_by_name(path)
    if source.known is not None:
        edition = " (first release)" if source.md5 == source.known["md5_old"] else ""
        say(f"published  {describe_known(source.known)}{edition}")
    elif namesake is not None and has_hash(namesake):
        raise DataError(
            f"{path} has the name of a published file but not its content: it is damaged, or was rewritten. Published "
            f"is\n{describe_known(namesake)}"
        )
    else:
        say("published  by its hash, it is none of the files that `segtrain weights` lists with one")
    for line in origin(source.provenance):
        say(line)
