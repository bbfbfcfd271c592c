"""
Sharding: training what no GPU holds, by PyTorch's FSDP2 (fully_shard; its idea is the third stage
of ZeRO, Rajbhandari et al. 2020, arXiv 1910.02054).

    torchrun --nproc_per_node=8 train.py configs/llava_next.py --shard on

Of W processes each keeps 1/W of every parameter, its gradient and the optimizer's state, in fp32.
Before a block computes, all its parameters are gathered, in the dtype of the run; afterwards they
are dropped, and gathered again for the backward pass. Gradients are summed in fp32, and each
process gets its part of the sum. All processes must gather the same blocks in the same order, so a
batch without pictures reads one that nobody looks at (batches.py: `always_images`); its gradients,
all 0, are dropped.

A model begins without weights, on the meta device; each tensor is then read from its file where it
lies, and each process keeps its part.
"""

import hashlib

import torch
import torch.distributed as dist
from torch import nn

from common import shards
from config import UserError


def check_sharding(settings):
    """Raise UserError for --shard on where PyTorch cannot shard."""
    if settings.shard == "on" and (why := shards.lacking()):
        raise UserError(f"--shard on {why}")


# ---------------------------------------------------------------------------------------------
# The model


def find_units(model):
    """The modules that are gathered one at a time: the blocks of GPT and tower. What is in none,
    such as embeddings and projector, stays gathered during a step."""
    found = []
    for part in (model.gpt, model.tower):
        for module in part.modules() if part is not None else ():
            if isinstance(module, (nn.ModuleList, nn.Sequential)):
                found += [child for child in module if any(True for _ in child.parameters())]
    return found


def make_group(device):
    """A group of this process alone, if torchrun has not made one: FSDP2 needs a group."""
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def shard(model, device, dtype, keeps_gathered=False, is_compiled=False):
    """Give each process its part of each parameter; those on the meta device stay there.

    keeps_gathered: between micro-batches all parameters stay, in dtype: more memory, less traffic.
    is_compiled: each block is compiled by itself, and those that are alike share one graph."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy()
    if dtype != torch.float32:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for unit in reversed(find_units(model)):  # those inside others first
        if is_compiled:
            unit.forward = torch.compile(unit.forward)
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=not keeps_gathered)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)


@torch.no_grad()
def fill(model, weights, device, prefix=""):
    """Give parameters and buffers on the meta device their values from {prefix + name: tensor},
    which are read one after the other."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    filled = {}
    for name, own in model.state_dict().items():
        if not own.is_meta:
            continue
        whole = weights[prefix + name].to(own.dtype)
        if isinstance(own, DTensor):  # each process takes its part, and nothing is sent
            how = {"placements": own.placements, "src_data_rank": None}
            filled[name] = distribute_tensor(whole.to(device), own.device_mesh, **how)
        else:
            filled[name] = whole.to(device)
    model.load_state_dict(filled, strict=False, assign=True)
    for module in model.modules():  # the tables of positions are in no checkpoint
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def local(tensor):
    """This process's part of a tensor that may be sharded."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


# ---------------------------------------------------------------------------------------------
# Saving and resuming


class Saver:
    """Writes saves (common/shards.py) while training goes on."""

    def __init__(self, processes):
        self.processes, self.pending = processes, None
        self.group = dist.new_group(backend="gloo")  # not in the way of training's collectives

    def save(self, folder, step, facts, tensors, wait):
        """Begin a save. facts: what is no tensor; tensors: of all processes, each its part; wait:
        until it is whole."""
        from torch.distributed.checkpoint import async_save

        self.finish()
        if self.processes.device.type == "cpu":  # else they are copied from the GPU at once
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        path = shards.begin(folder, step, facts, self.processes.is_first)
        self.pending = path, async_save(tensors, checkpoint_id=path, process_group=self.group)
        if wait:
            self.finish()

    def finish(self):
        """Wait for the save that is under way, and make it the last one."""
        if self.pending:
            (path, future), self.pending = self.pending, None
            future.result()
            self.processes.wait()
            if self.processes.is_first:
                shards.commit(path)
            self.processes.wait()


def weights_of(model):
    """{name: tensor} of a model's weights, as they are saved."""
    return {f"weights/{name}": value for name, value in model.state_dict().items()}


def states_of(model, optimizers):
    """{name: tensor} of optimizers' states, as they are saved."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"optimizer/{names[parameter]}/{key}": value
        for optimizer in optimizers
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def restore(model, optimizers, folder):
    """Give a sharded model, and optimizers, what the last save in a folder holds, by however many
    processes it was written."""
    from torch.distributed.checkpoint import load

    reader = shards.open_reader(shards.find_save(folder))
    wanted, own = weights_of(model), dict(model.named_parameters())
    states = {parameter: {} for parameter in own.values()}
    for name, about in reader.read_metadata().state_dict_metadata.items():
        if optimizers and name.startswith("optimizer/"):
            _, of, key = name.split("/")
            if about.size == own[of].shape:
                wanted[name] = torch.zeros_like(own[of], dtype=about.properties.dtype)
            else:  # the number of steps
                wanted[name] = torch.zeros(about.size, dtype=about.properties.dtype)
            states[own[of]][key] = wanted[name]
    load(wanted, storage_reader=reader)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            optimizer.state.update((p, states[p]) for p in group["params"] if states[p])


def digest_parts(tensors):
    """A sha256 of sharded weights: of what each process has of them, in order of the processes."""
    own = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        own.update(name.encode())
        part = local(value).detach().cpu().contiguous().flatten()
        own.update(part.view(torch.uint8).numpy().data)
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, own.hexdigest())
    return hashlib.sha256("".join(parts).encode()).hexdigest()
