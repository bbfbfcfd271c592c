"""
Tensors and devices: sending arrays to a GPU, and models whose numbers come later.
"""

import torch
from torch.overrides import TorchFunctionMode


def send(array, device):
    """An array or tensor on a device. To a GPU it is copied from pinned memory, while the host goes
    on; a copy from other memory would make it wait until the GPU has done all its work."""
    tensor, kind = torch.as_tensor(array), torch.device(device).type
    if kind == "cuda" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=kind != "mps")  # where it is not safe


class Unfilled(TorchFunctionMode):
    """Parameters made in this context are zeros instead of random numbers: what is loaded replaces
    them. (On the meta device asking for random numbers imports two seconds of PyTorch's compiler.)
    """

    RANDOM = ("normal_", "uniform_", "trunc_normal_", "kaiming_uniform_", "erfinv_")

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in self.RANDOM:
            tensor = args[0] if args else kwargs["tensor"]
            if not tensor.is_meta:
                tensor.detach().zero_()
            return tensor
        return function(*args, **(kwargs or {}))
