"""A bug seeded in the text of the kernels, and how a run finds it."""

import re
from pathlib import Path
from typing import NamedTuple

from tests.abn.cuda_emulator import replay
from tests.abn.cuda_emulator.launches import sanitized

WRONG, FAULT = "WRONG", "FAULT"
UBSAN, ASAN, TSAN = "runtime error:", "ERROR: AddressSanitizer", "WARNING: ThreadSanitizer"
RUNS = {UBSAN: "ubsan", ASAN: "asan", TSAN: "tsan"}  # plain for the others


class Bug(NamedTuple):
    what: str
    old: str
    new: str
    found: str  # how
    kernels: str  # that need to run: a pattern of function names
    place: int = 0  # which of several occurrences of `old`


def with_bug(bug: Bug, text: str) -> str:
    places = [found.start() for found in re.finditer(re.escape(bug.old), text)]
    assert places, f"the kernels no longer hold {bug.old!r}"
    if bug.place == -1:
        return text.replace(bug.old, bug.new)
    at = places[bug.place]
    return text[:at] + bug.new + text[at + len(bug.old) :]


def verdict(out: str, status: int) -> str:
    """How the run with a bug ended; what it printed if that is no finding, such as source that does not compile."""
    found = [kind for kind in (WRONG, FAULT, UBSAN, ASAN, TSAN) if kind in out]
    return found[0] if found else f"status {status}: {out}"


def found_by(bug: Bug, text: str, launches: list[replay.Launch], folder: Path) -> str:
    """How the launches of the bug's kernels find it, compiled from `text` with the bug."""
    source, path = folder / "text", folder / "launches"
    source.write_text(with_bug(bug, text))
    chosen = [launch for launch in launches if re.match(f"abn::({bug.kernels})", launch.kernel)]
    assert chosen, f"no launch of {bug.kernels}"
    replay.save(chosen, path)
    done = sanitized(RUNS.get(bug.found, "plain"), source, path)
    return verdict(done.stdout + done.stderr, done.returncode)
