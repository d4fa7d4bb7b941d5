"""Write a one-layer network as an ONNX file, in the few parts of its format that this needs, without a library."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def _field(number: int, value: int | bytes | str) -> bytes:
    """Encode a field of a protocol buffer: an integer as a varint, anything else with its length."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    content = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    low = value & 127
    return bytes([low]) if value < 128 else bytes([low | 128]) + _varint(value >> 7)


def _image(name: str, sides: tuple[int, ...]) -> bytes:
    shape = b"".join(_field(1, _field(1, side)) for side in sides)
    return _field(1, name) + _field(2, _field(1, _field(1, 1) + _field(2, shape)))


def write_onnx(path: Path, weights: NDArray[np.float32], side: int, external: str = "") -> Path:
    """Write the convolution (out, 3, 1, 1) of an image (1, 3, side, side).

    `external`: path of a file that the weights are said to be in, instead of in the ONNX file.
    """
    where = _field(13, _field(1, "location") + _field(2, external)) + _field(14, 1) if external else b""
    values = where or _field(9, weights.astype("<f4").tobytes())
    tensor = b"".join(_field(1, n) for n in weights.shape) + _field(2, 1) + _field(8, "w") + values
    node = _field(1, "image") + _field(1, "w") + _field(2, "maps") + _field(4, "Conv")
    graph = _field(1, node) + _field(2, "g") + _field(5, tensor) + _field(11, _image("image", (1, 3, side, side)))
    graph += _field(12, _image("maps", (1, len(weights), side, side)))
    path.write_bytes(_field(1, 8) + _field(7, graph) + _field(8, _field(1, "") + _field(2, 13)))
    return path
