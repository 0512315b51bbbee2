"""The safetensors format, streamed: the library's writer needs a second copy of all tensors in memory."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
CHUNK = 4 << 20


def safetensors_bytes(tensors: Mapping[str, Tensor]) -> Iterator[memoryview | bytes]:
    """The bytes of a safetensors file in chunks of at most 4 MiB; the tensors are on the CPU.

    Format: 8 bytes little-endian header length, a JSON header `{name: {dtype, shape, data_offsets}}` padded
    with spaces to a multiple of 8, the tensors' bytes without gaps. Raises KeyError for another dtype.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    # Widest types first keeps every tensor aligned to its own size.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    for name, tensor in ordered:
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for _, tensor in ordered:
        if tensor.numel():
            data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
            for start in range(0, len(data), CHUNK):
                yield data[start : start + CHUNK]
