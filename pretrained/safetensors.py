"""
.safetensors files: 8 bytes with the length of the header, a JSON header, then the tensors.

Files are memory-mapped, so a tensor is read only when it is used, and not copied if it can be used
in place.
"""

import json
import math
import mmap
from pathlib import Path

import torch

from common.files import writing
from config import UserError, regular

TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in TYPES.items()}


class TensorFile:
    """A memory-mapped .safetensors file: `names`, and file[name] as a view of the map; writing to
    it does not change the file. Raises UserError for another or an incomplete file."""

    def __init__(self, path):
        self.path = Path(path)
        try:
            with open(regular(path), "rb") as file:
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            size = 8 + int.from_bytes(self.map[:8], "little")
            header = json.loads(self.map[8:size])
            header.pop("__metadata__", None)
            self.entries = {name: self.entry(size, **fields) for name, fields in header.items()}
            end = max(begin + length for _, _, begin, length in self.entries.values())
            if len(self.map) != end:
                raise ValueError(f"{len(self.map)} bytes, but its header says {end}")
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{path}: not a checkpoint, or cut short ({reason})") from None

    @staticmethod
    def entry(start, dtype, shape, data_offsets):
        """(dtype, shape, first byte in the file, bytes) of a header's entry."""
        if dtype not in TYPES:
            raise UserError(
                f"weights stored as {dtype} are not supported: take the model in float16, bfloat16 "
                "or float32"
            )
        first, end = data_offsets
        if math.prod(shape) * TYPES[dtype].itemsize != end - first:
            raise ValueError(f"{end - first} bytes for {dtype} {shape}")
        return TYPES[dtype], shape, start + first, end - first

    @property
    def names(self):
        return list(self.entries)

    def shape(self, name):
        return tuple(self.entries[name][1])

    def __getitem__(self, name):
        dtype, shape, begin, length = self.entries[name]
        if not length:
            return torch.empty(shape, dtype=dtype)
        if begin % dtype.itemsize:  # not aligned: must be copied
            content = bytearray(self.map[begin : begin + length])
            return torch.frombuffer(content, dtype=dtype).view(shape)
        count = length // dtype.itemsize
        return torch.frombuffer(self.map, dtype=dtype, count=count, offset=begin).view(shape)

    def release(self, name):
        """Return the memory of a tensor that was copied to the system."""
        _, _, begin, length = self.entries[name]
        first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
        whole_pages = (begin + length - first) // mmap.PAGESIZE * mmap.PAGESIZE
        if whole_pages > 0 and hasattr(self.map, "madvise"):
            self.map.madvise(mmap.MADV_DONTNEED, first, whole_pages)


def write(path, tensors):
    """Write {name: tensor} as a .safetensors file."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        length = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + length],
        }
        offset += length
    text = json.dumps(header).encode("utf-8")
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
    with writing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            flat = tensor.detach().cpu().contiguous().flatten()
            file.write(flat.view(torch.uint8).numpy().data)
