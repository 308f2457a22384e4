"""Process group, device, seeds, FSDP2 sharding, gathers, the optimizer: one code path for one and many processes."""

import contextlib
import ctypes
import datetime
import functools
import itertools
import math
import os
import random
import warnings
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from common.cli import UserError

# Some blocks return views (T5, OPT), and FSDP warns of in-place operations on them; tests hold their gradients to the
# unsharded ones
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


def init(seed: int | None) -> torch.device:
    """Join the process group (torchrun's, or a group of one), seed every generator alike, unless the seed is None, and
    return this rank's device."""
    cuda = torch.cuda.is_available()
    with contextlib.suppress(AttributeError, OSError, TypeError):  # glibc alone has it
        # Give no memory back to the system: the pages of a large tensor, fresh at each step, cost as much as its sums
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    meet()  # makes its group, while all ranks are near
    if seed is not None:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def generator(*keys: int) -> torch.Generator:
    """A CPU generator that depends on the keys alone, such as (seed, step): nothing to save, alike on every rank."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0] >> 1))


# --- rows over ranks --------------------------------------------------------------------------------------------------


def rank_rows(count: int) -> tuple[list[int], list[bool]]:
    """The row numbers of this rank, every world-size-th of `count` rows, and which of them are real.

    Every rank gets equally many, so that all make the same collective calls: where the rows do not divide evenly, the
    last ones are row 0 again and not real. `gather_rows` drops those, and a loss gives them weight 0.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = range(rank, -(-count // world) * world, world)
    return [row if row < count else 0 for row in mine], [row < count for row in mine]


def gather_rows(rows: list, count: int) -> list:
    """All `count` rows, in order, on every rank, from the share of each rank (see `rank_rows`)."""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, rows)
    return [row for group in itertools.zip_longest(*parts) for row in group][:count]


def meet() -> None:
    """Wait for all ranks for as long as it takes. To be called before a collective that some ranks come to after a
    user's function and others at once: other collectives give up after half an hour."""
    if dist.get_world_size() > 1:
        dist.barrier(_patient_group())


@functools.cache
def _patient_group():
    return dist.new_group(backend="gloo", timeout=datetime.timedelta(days=365))


def broadcast(value):
    """Rank 0's picklable `value`, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


# --- FSDP2 ------------------------------------------------------------------------------------------------------------


def block_lists(module: nn.Module) -> list[nn.ModuleList]:
    """The outermost lists of blocks: where transformers keeps its layers, whatever the architecture calls them."""
    lists = []
    for child in module.children():
        lists += [child] if isinstance(child, nn.ModuleList) else block_lists(child)
    return lists


def shard(
    model: nn.Module,
    dtype: torch.dtype,
    device: torch.device,
    *,
    fp32: list[nn.Module] = (),
    shard_size: int | None = None,
    offload: bool = False,
    methods: tuple[str, ...] = (),
) -> None:
    """Shard `model` in place with FSDP2: a group for each block, one for each module of `fp32`, the root for the rest
    (embeddings, head, tied weights).

    dtype: what the parameters are gathered and used in; master weights, reductions and the `fp32` modules stay float32.
    shard_size: ranks that share one copy of the weights (hybrid sharding); all ranks by default.
    methods: other entry points than `forward` that gather the root's parameters.
    Raises UserError when no block was found, since the model would then be gathered whole.
    """
    world = dist.get_world_size()
    shard_size = shard_size or world
    if world % shard_size:
        raise UserError(f"--shard-size {shard_size} does not divide the {world} processes")
    if shard_size == world:
        mesh = init_device_mesh(device.type, (world,))
    else:
        mesh = init_device_mesh(device.type, (world // shard_size, shard_size), mesh_dim_names=("replicate", "shard"))
    offload_policy = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()

    def fully(module, param_dtype, **options):
        policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)
        fully_shard(module, mesh=mesh, mp_policy=policy, offload_policy=offload_policy, **options)

    blocks = [block for blocks in block_lists(model) for block in blocks if next(block.parameters(), None) is not None]
    if not blocks:
        raise UserError(f"found no list of blocks in a {type(model).__name__}: this architecture cannot be sharded")
    trained = any(parameter.requires_grad for parameter in model.parameters())
    for block in dict.fromkeys(blocks):
        fully(block, dtype)
    for module in fp32:
        fully(module, torch.float32)
    # a trained root stays gathered from its forward to its backward, which a reference never has
    fully(model, dtype, reshard_after_forward=not trained)
    if not trained:
        model.register_forward_hook(_forget_forward)
    for name in methods:
        register_fsdp_forward_method(model, name)


def _forget_forward(model: nn.Module, *_) -> None:
    """FSDP (torch 2.13) lists every forward of every group for the backward to come, which a frozen model never has: in
    a long run the lists would fill the memory."""
    with contextlib.suppress(AttributeError):  # they are its own, and may be called otherwise in another version
        state = model._get_fsdp_state()
        state._comm_ctx.post_forward_order.clear()
        for group in (group for each in state._state_ctx.all_states for group in each._fsdp_param_groups):
            group._post_forward_indices.clear()


@contextlib.contextmanager
def unsharded(model: nn.Module, keep_sharded: bool = False):
    """Hold all of a sharded model's parameters gathered, so that a rollout gathers once and not once a token.

    Inside, ranks need not make the same calls. With keep_sharded nothing is held (it would not fit), and they must.
    """
    groups = [module for module in model.modules() if isinstance(module, FSDPModule)] if not keep_sharded else []
    for module in groups:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    # The blocks have nothing to gather then, and their hooks cost as much as a small block
    hooks = [(hooks, dict(hooks)) for module in groups for hooks in (module._forward_pre_hooks, module._forward_hooks)
             if module is not model]
    for live, _ in hooks:
        live.clear()
    # but for one thing that they do: what embeddings have made in float32 goes into the blocks in their own dtype
    firsts = [blocks[0] for blocks in block_lists(model)] if groups and model.dtype != torch.float32 else []
    casts = [block.register_forward_pre_hook(lambda _, inputs: tuple(
        part.to(model.dtype) if isinstance(part, torch.Tensor) and part.is_floating_point() else part
        for part in inputs)) for block in firsts]
    try:
        yield
    finally:
        for cast in casts:
            cast.remove()
        for live, saved in hooks:
            live.update(saved)
        for module in groups:
            module.reshard()
            module.set_reshard_after_forward(module is not model, recurse=False)


def sharded_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The sharded parameters by name, which an optimizer and a checkpoint hold. A root that has run without a backward
    keeps its gathered copies in their place, so `model.parameters()` alone may give those."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return dict(model.named_parameters())


def adamw(
    model: nn.Module, learning_rate: float, betas: tuple[float, float], epsilon: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) over the trained parameters of a sharded model; weight decay is for matrices alone."""
    trained = [parameter for parameter in sharded_parameters(model).values() if parameter.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
              {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, learning_rate, betas, epsilon, fused=True)


def clip_gradient(optimizer: torch.optim.Optimizer, max_norm: float) -> float:
    """Clip the gradient, on all ranks, to this norm; return its norm before."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    return (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()


def optimizer_step(
    optimizer: torch.optim.Optimizer,
    learning_rate: float,
    max_grad_norm: float,
    loss: float,
    step: int,
    rescue: Callable[[str], str],
) -> float:
    """Clip the gradient to max_grad_norm, step at learning_rate, clear the gradient; return its norm before clipping.

    Raises UserError for a gradient or a loss, of any rank, that is not finite, before anything is changed;
    rescue(name) saves the batch and the state under this name and returns their path.
    """
    norm = clip_gradient(optimizer, max_grad_norm)
    whole = torch.tensor(norm + loss, dtype=torch.float64)
    dist.all_reduce(whole)
    if not math.isfinite(whole.item()):
        what = "loss is not finite" if math.isfinite(norm) else f"gradient is {norm}"
        path = rescue(f"nonfinite-step-{step}")
        raise UserError(f"step {step}: the {what}; its batch and the state before it are in {path}, nothing else was "
                        f"written: --replay {path} shows the rows. Lower --learning-rate, or look at the data and the "
                        "scores")
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad()
    return norm


def full_state_dict(module: nn.Module) -> dict[str, torch.Tensor]:
    """The whole state dict on rank 0's CPU, gathered one tensor at a time; an empty dict on the other ranks."""
    return get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
