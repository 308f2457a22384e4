"""Checkpoints: written beside the last good one, checked before they are read, each run alone in its directory."""

import fcntl
import json
import os
import pickle
import random
import shutil
import sys
import zlib
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import nn

from common.cli import UserError, reason
from common.distributed import broadcast, gather_rows, sharded_parameters


def attempt(work: Callable[[], None], what: str, keep_going: bool = False) -> bool:
    """Do this rank's share of the writing of `what`, and return whether all ranks could.

    Where one has failed, all raise UserError with its reason; with keep_going rank 0 prints it, and training goes on.
    """
    problem = None
    try:
        work()
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save and safetensors have their own
        problem = error
    except dcp.api.CheckpointException as error:  # which has what went wrong on each rank
        problem = next(iter(error.failures.values()))[0]
    if problem:
        problem = getattr(problem, "strerror", None) or reason(problem, -1)
    problem = next(filter(None, gather_rows([problem], dist.get_world_size())), None)
    message = f"{what} could not be written: {problem}"
    if problem and not keep_going:
        raise UserError(f"{message}; make room and --resume auto, or train on all the same with --keep-going")
    if problem and dist.get_rank() == 0:
        print(f"{message}; training goes on without it", file=sys.stderr, flush=True)
    return not problem


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


def save_checkpoint(
    path: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict,
    keep: int,
    keep_going: bool = False,
    batch: dict | None = None,
) -> str:
    """Write trained weights, optimizer, random states and the loop's `state` (JSON values) to the folder `path`.

    Frozen weights, but for those of heads, are not written: they are those of the model that the run starts from. All
    files go to a temporary folder that is renamed at the end, with their checksums in it. Weights are safetensors.
    Beside it, only the newest `keep` checkpoints stay. Where it is there already, nothing is done. batch: written to
    batch.pt. keep_going: a checkpoint that cannot be written is none, and no error.
    """
    main, rank = dist.get_rank() == 0, dist.get_rank()
    if broadcast(os.path.exists(path)):
        return path

    def note():
        os.makedirs(path + ".tmp", exist_ok=True)
        version, words, *numbers = np.random.get_state()
        rng = {"torch": torch.get_rng_state().tolist(), "python": random.getstate()}
        rng["numpy"] = [version, words.tolist(), *numbers]
        if torch.cuda.is_available():
            rng["cuda"] = torch.cuda.get_rng_state().tolist()
        _write_json(f"{path}.tmp/random-{rank}.json", rng)
        if main:
            _write_json(f"{path}.tmp/state.json", state)
        if main and batch:
            torch.save(batch, f"{path}.tmp/batch.pt")

    def write():
        dcp.save(_tensors(model, optimizer),
                 storage_writer=dcp.HuggingFaceStorageWriter(path + ".tmp", save_distributed=True))

    def seal():
        names = sorted(os.listdir(path + ".tmp"))[rank :: dist.get_world_size()]
        parts.extend((name, _checksum(f"{path}.tmp/{name}")) for name in names)

    def finish():
        if main:
            _write_json(f"{path}.tmp/manifest.json", manifest)
            put_in_place(path)
            for old in checkpoints(os.path.dirname(path))[:-keep]:
                drop(old)

    what, parts, manifest = f"the checkpoint {path}", [], {}
    try:
        if all(attempt(work, what, keep_going) for work in (note, write, seal)):
            for shares in gather_rows([parts], dist.get_world_size()):
                manifest.update(shares)
            attempt(finish, what, keep_going)
    finally:
        if main:  # where something went wrong; else it is gone
            shutil.rmtree(path + ".tmp", ignore_errors=True)
    return path


def _write_json(path: str, value) -> None:
    with open(path, "w") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())


def _checksum(path: str) -> list[int]:
    """Size and CRC-32 of a file."""
    size = found = 0
    with open(path, "rb") as file:
        while piece := file.read(2**24):
            size, found = size + len(piece), zlib.crc32(piece, found)
    return [size, found]


def damage(path: str) -> str | None:
    """What is wrong with a checkpoint, or None: each file must be what was written. All ranks must call, and share the
    reading."""
    problem = None
    try:
        with open(f"{path}/manifest.json") as file:
            manifest = json.load(file)
        for name in sorted(manifest)[dist.get_rank() :: dist.get_world_size()]:
            if _checksum(f"{path}/{name}") != manifest[name]:
                problem = f"{name} is not as it was written"
    except (OSError, ValueError) as error:
        name = os.path.basename(getattr(error, "filename", None) or "manifest.json")
        problem = f"{name} cannot be read ({getattr(error, 'strerror', None) or 'not JSON'})"
        problem = problem if os.path.isdir(path) else "no checkpoint there"
    return next(filter(None, gather_rows([problem], dist.get_world_size())), None)


def put_in_place(path: str) -> None:
    """Rename the folder `path`.tmp to `path`, which may exist: it goes only when the new one is there."""
    shutil.rmtree(path + ".old", ignore_errors=True)
    if os.path.exists(path):
        os.replace(path, path + ".old")
    os.replace(path + ".tmp", path)
    shutil.rmtree(path + ".old", ignore_errors=True)


def drop(path: str) -> None:
    """Delete a checkpoint, so that a kill on the way leaves no half of one."""
    shutil.rmtree(path + ".old", ignore_errors=True)
    os.replace(path, path + ".old")
    shutil.rmtree(path + ".old", ignore_errors=True)


def tidy(folder: str) -> None:
    """Put right what a kill in the middle of `put_in_place` or `drop` has left in a folder."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    for path in (os.path.join(folder, name[:-4]) for name in names if name.endswith(".old")):
        if os.path.exists(path + ".tmp") and not os.path.exists(path):  # else it was to be deleted
            os.replace(path + ".old", path)
    for path in (os.path.join(folder, name) for name in names if name.endswith((".old", ".tmp"))):
        shutil.rmtree(path, ignore_errors=True)


def load_checkpoint(path: str, model: nn.Module, optimizer: torch.optim.Optimizer, data) -> dict:
    """Read a checkpoint back into the model, the optimizer and the random generators, and return the loop's state.

    Any number of ranks can read what any number of ranks wrote. Raises UserError when it is not a whole checkpoint of
    this model, or of a run whose data had another checksum than `data`.
    """
    state = read_state(path)
    if state.get("data") != data:
        raise UserError(f"--resume {path}: the data has changed since; start again in another --output-dir")
    try:
        dcp.load(_tensors(model, optimizer), storage_reader=dcp.HuggingFaceStorageReader(path))
    except (OSError, ValueError, RuntimeError, KeyError, dcp.api.CheckpointException) as error:
        raise UserError(f"--resume {path}: not a whole checkpoint of this model ({reason(error, -1)}); choose "
                        "another") from None
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


def read_batch(path: str) -> dict:
    """The batch that `save_checkpoint` wrote with a state, for `--replay`. Raises UserError when there is none."""
    try:
        return torch.load(f"{path}/batch.pt", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(f"--replay {path}: its batch.pt cannot be read ({type(error).__name__}); give the "
                        "nonfinite-step-N of a run that stopped there") from None


def read_state(path: str, flag: str = "--resume") -> dict:
    """The loop's state of a checkpoint, without its weights. Raises UserError, with the flag, when there is none."""
    try:
        with open(f"{path}/state.json") as file:
            return json.load(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {path}: no checkpoint there ({type(error).__name__})") from None


def checkpoints(folder: str) -> list[str]:
    """The step-N checkpoints in `folder`, oldest first."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    steps = sorted(int(name[5:]) for name in names if name.startswith("step-") and name[5:].isdigit())
    return [os.path.join(folder, f"step-{step}") for step in steps]


# --- one run in a directory -------------------------------------------------------------------------------------------

_locks: dict[str, int] = {}  # of this process, by folder: a notebook may run twice in the same one


def lock(folder: str) -> str | None:
    """Claim a run directory for this process, as long as it lives; or return who has it."""
    os.makedirs(folder, exist_ok=True)
    folder = os.path.realpath(folder)
    if folder in _locks:
        return None
    handle = os.open(f"{folder}/lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(handle, 100).decode(errors="replace").strip()
        os.close(handle)
        return owner or "another process"
    except OSError:  # a file system without locks
        pass
    os.ftruncate(handle, 0)
    os.write(handle, f"process {os.getpid()} on {os.uname().nodename}".encode())
    _locks[folder] = handle
    return None


def unlock(folder: str) -> None:
    """Give a run directory up."""
    handle = _locks.pop(os.path.realpath(folder), None)
    if handle is not None:
        os.close(handle)
