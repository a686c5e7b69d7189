"""Run lengths: those of COCO, as a list and as text, and those of Label Studio's brush."""

from typing import Any

import numpy as np

from segtrain.errors import DataError


def decode_coco_rle(counts: Any, size: Any, where: str) -> np.ndarray:
    """bool (H, W) of COCO's run lengths: of 0 and 1 by turns, down the columns, as a list or as compressed text.

    The text has six bits a character, from 48 on: five of the number, lowest first, and one if more follow; from the
    fourth number on it is the difference to the one two before (maskApi.c of pycocotools). DataError for anything else.
    """
    if not (isinstance(size, list) and len(size) == 2 and all(type(n) is int and 0 < n < 2**20 for n in size)):
        raise DataError(f"{where}: the size of a mask must be [height, width], found {str(size)[:40]}")
    if isinstance(counts, str):
        counts = numbers_of_text(counts, where)
    if not (isinstance(counts, list) and all(type(n) is int and n >= 0 for n in counts)):
        raise DataError(f"{where}: the counts of a mask must be numbers of pixels, found {str(counts)[:40]}")
    height, width = size
    if sum(counts) != height * width:
        raise DataError(
            f"{where}: the counts of a mask add up to {sum(counts)} pixels, its size {width}x{height} has "
            f"{height * width}"
        )
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(width, height).T


def numbers_of_text(text: str, where: str) -> list[int]:
    """The counts in COCO's compressed text."""
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60:
            raise DataError(f"{where}: the compressed counts of a mask have {character!r}, which is none of COCO's")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits & 16) << (shift - 4)  # the highest bit is the sign
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    if shift:
        raise DataError(f"{where}: the compressed counts of a mask are cut short")
    return counts


def decode_brush(content: Any, height: int, width: int, where: str) -> np.ndarray:
    """bool (H, W) of Label Studio's brush: where the opacity of its RGBA image is not 0.

    content: the list of bytes. Its bits: the number of values (32), bits a value - 1 (5), four sizes - 1 (4 each); then
    a bit whether one value is repeated, which size (2), the number of values - 1 in that many bits, and the value or
    the values (@thi.ng/rle-pack; label_studio_converter/brush.py). DataError for anything else.
    """
    if not (isinstance(content, list) and all(type(n) is int and 0 <= n < 256 for n in content)):
        raise DataError(f"{where}: a brush's rle must be a list of bytes, found {str(content)[:40]}")
    stream = Bits(bytes(content))
    try:
        total, word = stream.read(32), stream.read(5) + 1
        sizes = [stream.read(4) + 1 for _ in range(4)]
        if total != 4 * height * width or word > 16:
            raise DataError(f"{where}: a brush's rle has {total} values of {word} bits, expected 4 for each of the "
                            f"{width}x{height} pixels")  # fmt: skip
        values = np.zeros(total, np.uint16)
        done = 0
        while done < total:
            repeated = stream.read(1)
            stop = done + 1 + stream.read(sizes[stream.read(2)])
            values[done:stop] = stream.read(word) if repeated else [stream.read(word) for _ in range(stop - done)][
                : total - done
            ]  # fmt: skip
            done = stop
    except EOFError as error:
        raise DataError(f"{where}: a brush's rle is cut short: its bytes end within the mask") from error
    return values.reshape(height, width, 4)[..., 3] > 0


class Bits:
    """Numbers of any width out of bytes, highest bit first. EOFError after the last one."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.place = 0

    def read(self, width: int) -> int:
        end = self.place + width
        if end > 8 * len(self.content):
            raise EOFError
        some = int.from_bytes(self.content[self.place // 8 : (end + 7) // 8], "big")
        self.place = end
        return some >> (-end % 8) & ((1 << width) - 1)
