"""Process group, device, seeds, FSDP2 sharding, gathers, checkpoints. One code path for one and for many processes."""

import contextlib
import ctypes
import datetime
import functools
import json
import math
import os
import random
import shutil
import warnings

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
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
    return [row for group in zip(*parts) for row in group][:count]


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
    for name in methods:
        register_fsdp_forward_method(model, name)


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
    try:
        yield
    finally:
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


def optimizer_step(
    optimizer: torch.optim.Optimizer, learning_rate: float, max_grad_norm: float, step: int, folder: str, batch: dict
) -> float:
    """Clip the gradient to max_grad_norm, step at learning_rate, clear the gradient; return its norm before clipping.

    Raises UserError for a gradient that is not finite, before anything is changed, with `batch` saved in `folder`.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
    if not math.isfinite(norm):
        path = f"{folder}/nonfinite-step-{step}.pt"
        if dist.get_rank() == 0:
            torch.save(batch, path)
        raise UserError(f"step {step}: the gradient is {norm}; its batch is in {path}, nothing else was written. "
                        "Lower --learning-rate, or look at the data and the scores")
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad()
    return norm


def full_state_dict(module: nn.Module) -> dict[str, torch.Tensor]:
    """The whole state dict on rank 0's CPU, gathered one tensor at a time; an empty dict on the other ranks."""
    whole = {}
    for name, tensor in module.state_dict().items():
        tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        if dist.get_rank() == 0:
            whole[name] = tensor.detach().cpu()
    return whole


# --- checkpoints ------------------------------------------------------------------------------------------------------


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """All trained parameters with their Adam state, and the frozen ones of heads, such as target networks, by name. The
    tensors are the live ones: loading writes into them."""
    tensors = {}
    for name, parameter in sharded_parameters(model).items():
        if name.startswith("heads.") and not parameter.requires_grad:
            tensors[f"model.{name}"] = parameter.detach()
        if parameter.requires_grad:
            if not optimizer.state[parameter]:
                moments = {key: torch.zeros_like(parameter.detach()) for key in ("exp_avg", "exp_avg_sq")}
                optimizer.state[parameter].update(step=torch.zeros((), device=parameter.device), **moments)
            tensors[f"model.{name}"] = parameter.detach()
            tensors |= {f"optimizer.{name}.{key}": value for key, value in optimizer.state[parameter].items()}
    return tensors


def save_checkpoint(path: str, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict, keep: int) -> None:
    """Write trained weights, optimizer, random states and the loop's `state` (JSON values) to the folder `path`.

    Frozen weights, but for those of heads, are not written: they are those of the model that the run starts from. All
    files go to a temporary folder that is renamed at the end, so that a folder called `path` is always whole. Weights
    are safetensors. Beside it, only the newest `keep` checkpoints stay.
    """
    if dist.get_rank() == 0:
        shutil.rmtree(path + ".tmp", ignore_errors=True)
        os.makedirs(path + ".tmp")
    dist.barrier()
    writer = dcp.HuggingFaceStorageWriter(path + ".tmp", save_distributed=True)
    dcp.save(_tensors(model, optimizer), storage_writer=writer)
    version, words, *numbers = np.random.get_state()
    rng = {"torch": torch.get_rng_state().tolist(), "python": random.getstate()}
    rng["numpy"] = [version, words.tolist(), *numbers]
    if torch.cuda.is_available():
        rng["cuda"] = torch.cuda.get_rng_state().tolist()
    with open(f"{path}.tmp/random-{dist.get_rank()}.json", "w") as file:
        json.dump(rng, file)
    if dist.get_rank() == 0:
        with open(f"{path}.tmp/state.json", "w") as file:
            json.dump(state, file, indent=1)
    dist.barrier()
    if dist.get_rank() == 0:
        put_in_place(path)
        for old in checkpoints(os.path.dirname(path))[:-keep]:
            shutil.rmtree(old)
    dist.barrier()


def put_in_place(path: str) -> None:
    """Rename the folder `path`.tmp to `path`, which may exist: it goes only when the new one is there."""
    shutil.rmtree(path + ".old", ignore_errors=True)
    if os.path.exists(path):
        os.replace(path, path + ".old")
    os.replace(path + ".tmp", path)
    shutil.rmtree(path + ".old", ignore_errors=True)


def load_checkpoint(path: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """Read a checkpoint back into the model, the optimizer and the random generators, and return the loop's state.

    Any number of ranks can read what any number of ranks wrote. Raises UserError when it is not a whole checkpoint of
    this model.
    """
    try:
        state = read_state(path)
        dcp.load(_tensors(model, optimizer), storage_reader=dcp.HuggingFaceStorageReader(path))
    except (OSError, ValueError, RuntimeError, KeyError, dcp.api.CheckpointException) as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"--resume {path}: not a whole checkpoint of this model ({reason}); choose another") from None
    random_file = f"{path}/random-{dist.get_rank()}.json"
    if os.path.exists(random_file):  # absent for ranks that the saving run did not have
        with open(random_file) as file:
            rng = json.load(file)
        torch.set_rng_state(torch.tensor(rng["torch"], dtype=torch.uint8))
        random.setstate(tuple(tuple(part) if isinstance(part, list) else part for part in rng["python"]))
        np.random.set_state(tuple(rng["numpy"]))
        if "cuda" in rng and torch.cuda.is_available():
            torch.cuda.set_rng_state(torch.tensor(rng["cuda"], dtype=torch.uint8))
    return state


def read_state(path: str) -> dict:
    """The loop's state of a checkpoint, without its weights. Raises UserError when there is none."""
    try:
        with open(f"{path}/state.json") as file:
            return json.load(file)
    except (OSError, ValueError) as error:
        raise UserError(f"--resume {path}: no checkpoint there ({type(error).__name__})") from None


def checkpoints(folder: str) -> list[str]:
    """The step-N checkpoints in `folder`, oldest first."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    steps = sorted(int(name[5:]) for name in names if name.startswith("step-") and name[5:].isdigit())
    return [os.path.join(folder, f"step-{step}") for step in steps]
