"""Bytes per process of a run before it is started: a dry run of the script's own models and steps, without memory.

    python benchmarks/memory_plan.py --model gpt-neox-20b --algorithm ppo --ranks 16 --gradient-checkpointing
    python benchmarks/memory_plan.py --table [gpt-j-6b ...]   which flags make large models fit on GPUs of 80 GB
    python benchmarks/memory_plan.py --check                  the plan beside the measured peaks of small runs

The model is built from its config by the code that the scripts use, of torch's fake tensors, which have shapes on the
meta device and no memory, in a fake process group of --ranks processes. FSDP2 shards it; forward, backward, optimizer
and sampler run; the storages that would be alive are counted. So gathers, prefetches, reductions, recomputation and the
chunks of logits need no formulas here, and a change in common/ changes the plan. Deep models are extrapolated from
two shallow ones, a row at a time, which is exact where all layers are alike.

Not counted: the CUDA context and NCCL's buffers, fragmentation (RESERVE stands for these), workspaces inside kernels,
reward models. Batches are full: every row has all its tokens.
"""

import argparse
import contextlib
import copy
import dataclasses
import gc
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import weakref
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.cache_utils import Cache

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from common import distributed  # noqa: E402
from common.cli import UserError  # noqa: E402
from common.distributed import adamw, optimizer_step, unsharded  # noqa: E402
from common.generation import pick  # noqa: E402
from common.models import (  # noqa: E402
    LanguageModel,
    LogitRules,
    TokenHead,
    add_lora,
    checkpoint_blocks,
    collate,
    collate_branches,
    load_config,
    make_head,
    prepare,
    train_top,
)

STATE = ("parameters", "gradients", "optimizer", "reference")  # a process's share; in CPU memory with --offload
ROWS = (*STATE, "gathered parameters", "gradient reduction", "activations", "KV cache", "logits")
ALGORITHMS = ("ppo", "sft", "dpo", "ilql")
GPU, RESERVE = 80e9, 8e9  # bytes; the reserve: CUDA context about 0.6e9, NCCL 1e9 to 2e9, the rest for fragmentation
BUILTIN = {  # the published configs
    "gpt-j-6b": dict(model_type="gptj", n_embd=4096, n_layer=28, n_head=16, n_positions=2048, rotary_dim=64,
                     vocab_size=50400, tie_word_embeddings=False),
    "gpt-neox-20b": dict(model_type="gpt_neox", hidden_size=6144, num_hidden_layers=44, num_attention_heads=64,
                         intermediate_size=24576, max_position_embeddings=2048, vocab_size=50432,
                         tie_word_embeddings=False),
    "llama-3-70b": dict(model_type="llama", hidden_size=8192, num_hidden_layers=80, num_attention_heads=64,
                        num_key_value_heads=8, intermediate_size=28672, max_position_embeddings=8192,
                        vocab_size=128256, tie_word_embeddings=False)}


# --- counting ---------------------------------------------------------------------------------------------------------


class Ledger(TorchDispatchMode):
    """Bytes of the fake storages that are alive, by row, and the rows at the peak of each window of a phase of the run.

    A storage's row is the one that was set by `row` when it was made; else it is logits if its last dimension is the
    vocabulary, else activations. Operations whose result has a shape that depends on values get an answer: `scored`
    for how many tokens are to be scored, 1 for a number that is read out.
    """

    def __init__(self, vocabulary: int):
        super().__init__()
        self.vocabulary, self.scored, self.current = vocabulary, 1, None
        self.known, self.rows = WeakIdKeyDictionary(), dict.fromkeys(ROWS, 0)
        self.total, self.peak, self.phase, self.windows = 0, {}, None, {}

    def change(self, name: str, by: int) -> None:
        """Add bytes to a row; remember all rows if that is a peak."""
        self.rows[name] += by
        self.total += by
        if self.phase and self.total > self.highest:
            self.peak, self.highest = dict(self.rows), self.total

    def count(self, storage: torch.UntypedStorage, name: str) -> None:
        """Count a storage that is new, or has another size than before."""
        entry = self.known.get(storage)
        if entry is None:
            entry = self.known[storage] = [name, 0]
            weakref.finalize(storage, lambda: self.change(entry[0], -entry[1]))
        by, entry[1] = storage.nbytes() - entry[1], storage.nbytes()
        self.change(entry[0], by)

    def move(self, tensor: torch.Tensor, name: str) -> None:
        """Count a tensor's storage in another row from now on."""
        tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if entry := self.known.get(tensor.untyped_storage()):
            self.rows[entry[0]] -= entry[1]
            self.rows[name] += entry[1]
            entry[0] = name

    @contextlib.contextmanager
    def row(self, name: str):
        """What is made inside belongs to this row."""
        before, self.current = self.current, name
        try:
            yield
        finally:
            self.current = before

    def mark(self, event: str) -> None:
        """One window ends here and another begins, called after this event and how often it has come in this phase."""
        if self.phase:
            self.windows.setdefault(self.phase, {})[self.event] = self.peak
            times = sum(name.startswith(f"{event} #") for name in self.windows[self.phase])
            self.event = f"{event} #{times}"
        self.peak, self.highest = dict(self.rows), self.total

    @contextlib.contextmanager
    def watch(self, phase: str | None):
        """A phase, from its first window to its last; None for what is not to be seen."""
        self.phase, self.event = phase, "begin"
        self.peak, self.highest = dict(self.rows), self.total
        yield
        self.mark("end")
        self.phase = None

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.prim.device.default:
            return args[0].fake_device  # asked for all the time
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its local operations come here
        fake = bool(args) and isinstance(args[0], FakeTensor)
        if fake and function is torch.ops.aten._local_scalar_dense.default:
            return 1
        if fake and function is torch.ops.aten.nonzero.default:
            result = torch.zeros(self.scored, args[0].ndim, dtype=torch.long)
        else:
            result = function(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, FakeTensor):
                logits = tensor.ndim and tensor.shape[-1] == self.vocabulary
                self.count(tensor.untyped_storage(), self.current or ("logits" if logits else "activations"))
        return result


@contextlib.contextmanager
def watched(ledger: Ledger, gloo: bool):
    """FSDP2, caches and optimizer with their storages in the right rows; a window from each gather or reduction to the
    next, so that a window has at most one block in it."""
    resize, make_mesh = torch.UntypedStorage.resize_, distributed.init_device_mesh
    unshard, wait, post_backward = (getattr(FSDPParamGroup, name)
                                    for name in ("unshard", "wait_for_unshard", "post_backward"))
    held, reduce_scatter, all_gather = [], dist.reduce_scatter_single, dist.all_gather_single
    update, step, logits = Cache.update, torch.optim.AdamW.step, LanguageModel.logits

    def resized(storage, size):
        resize(storage, size)
        if storage in ledger.known:
            ledger.count(storage, "")

    def within(name, function):
        def call(*args, **kwargs):
            with ledger.row(name):
                return function(*args, **kwargs)
        return call

    def waited(group):
        ledger.mark(f"gather {group._module_fqn}")
        with ledger.row("gathered parameters"):
            wait(group)
        for part in group.fsdp_params:
            whole = getattr(part, "_unsharded_param", None)
            if whole is not None and whole.requires_grad and not hasattr(whole, "watched"):
                whole.watched = True
                whole.register_post_accumulate_grad_hook(lambda p: ledger.move(p.grad, "gradient reduction"))

    def reduced(group, *args):
        with ledger.row("gradient reduction"):
            post_backward(group, *args)
        for part in group.fsdp_params:
            if part.sharded_param.grad is not None:
                ledger.move(part.sharded_param.grad, "gradients")
        ledger.mark(f"reduce {group._module_fqn}")

    def marked(*args):
        ledger.mark("logits")
        return logits(*args)

    def copying(collective, keep):
        def call(*args, **kwargs):
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            copies = [torch.empty_like(max(tensors, key=torch.Tensor.numel))]
            if keep:
                held[:] = copies
            return collective(*args, **kwargs)
        return call if gloo else collective

    def copied(tensor, memo):  # torch's own reads storages
        new = tensor.detach().clone()
        if isinstance(tensor, torch.nn.Parameter):
            new = torch.nn.Parameter(new, tensor.requires_grad)
        return memo.setdefault(id(tensor), new)

    def mesh(*args, **kwargs):  # of true tensors
        with _disable_current_modes():
            return make_mesh(*args, **kwargs)

    with contextlib.ExitStack() as stack:
        for target, name, new in (
                (torch.UntypedStorage, "resize_", resized), (distributed, "init_device_mesh", mesh),
                (FSDPParamGroup, "unshard", within("gathered parameters", unshard)),
                (FSDPParamGroup, "wait_for_unshard", waited), (FSDPParamGroup, "post_backward", reduced),
                (LanguageModel, "logits", marked), (Cache, "update", within("KV cache", update)),
                (torch.optim.AdamW, "step", within("optimizer", step)), (torch.Tensor, "__deepcopy__", copied),
                (dist, "reduce_scatter_single", copying(reduce_scatter, True)),
                (dist, "all_gather_single", copying(all_gather, False)),
                # of peft, to where everything is already; fake parameters cannot be swapped in place
                (torch.nn.Module, "to", lambda module, *_, **__: module)):
            stack.enter_context(mock.patch.object(target, name, new))
        yield


# --- the dry run ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Plan:
    """What is to be planned. The settings are those of the scripts, but for model, algorithm, ranks and lengths."""

    config: object
    algorithm: str = "ppo"
    ranks: int = 1
    dtype: str = "bfloat16"
    lora_rank: int = 0
    num_layers_unfrozen: int = -1
    num_value_layers: int = 0
    gradient_checkpointing: bool = False
    offload: bool = False
    keep_sharded: bool | None = False  # None: plan a rollout of both kinds
    shard_size: int | None = None
    batch_size: int = 32
    micro_batch_size: int = 4
    generation_batch_size: int = 32  # 0: plan no rollout
    prompt_length: int = 512
    response_length: int = 512
    gloo: bool = False  # on CPUs: gloo copies a collective's whole buffer; that of a reduction lives until the next one


def build(plan: Plan, config, ledger: Ledger):
    """The sharded policy, by the script's own code, and a reference as a function of a batch, or None."""
    script, device = importlib.import_module(plan.algorithm), torch.device("cpu")
    names = {field.name for field in dataclasses.fields(script.Args)} & {f.name for f in dataclasses.fields(Plan)}
    args = script.Args(model="", **{name: getattr(plan, name) for name in names})
    dtype, longest = getattr(torch, plan.dtype), plan.prompt_length + plan.response_length
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM

    def load(_path):
        with ledger.watch("load"):
            return auto.from_config(copy.deepcopy(config), dtype=torch.float32).eval()

    with mock.patch.object(script, "load_lm", load):
        if plan.algorithm == "ppo":
            return script.build(args, load(""), "", dtype, device, LogitRules())[:2]
        if plan.algorithm == "dpo":
            return script.load_models(load(""), "", dtype, device, longest, args)[:2]
    lm = load("")
    if plan.num_layers_unfrozen != -1:
        train_top(lm, plan.num_layers_unfrozen)
    if plan.lora_rank:
        add_lora(lm, plan.lora_rank, args.lora_alpha)
    if plan.gradient_checkpointing:
        checkpoint_blocks(lm)
    model, vocabulary = LanguageModel(lm), lm.get_output_embeddings().weight.shape[0]
    if plan.algorithm == "ilql":
        model.heads["v"] = make_head(model.width, 1)
        for q in ("q1", "q2"):
            model.heads[q] = TokenHead(model.width, vocabulary)
            model.heads[f"target_{q}"] = TokenHead(model.width, vocabulary).requires_grad_(False)
    return prepare(model, dtype, device, shard_size=plan.shard_size, offload=plan.offload), None


def make_batch(plan: Plan, model: LanguageModel, rows: int, prompt: int, response: int) -> tuple[dict, int]:
    """Inputs of `LanguageModel.forward` for full rows (pairs for dpo), and how many tokens are scored."""
    prompts, outputs = [[1] * prompt] * rows, [[1] * response] * rows
    if plan.algorithm != "dpo":
        return collate(prompts, outputs, model.start_id, model.device), rows * response
    if not model.seq2seq and model.takes_positions:  # a pair shares a line, and its prompt
        lines = [[(prompts[0], outputs[:1] * 2, outputs[:1] * 2)]] * rows
        return collate_branches(lines, model.device), 2 * rows * response
    batch = collate(prompts * 2, outputs * 2, model.start_id, model.device)
    for name in ("encoder_ids", "encoder_mask") if model.seq2seq else ():
        batch[name] = batch[name][::2]
    return batch, 2 * rows * response


def train_step(plan: Plan, ledger: Ledger, model, reference, optimizer, batch: dict, micro_batches: int) -> None:
    """An optimizer step, whose last micro-batch is watched."""
    for number in reversed(range(micro_batches)):
        with ledger.watch(None if number else "update forward"):
            out = model(**batch, with_entropy=False)
        with ledger.watch(None if number else "update reference"):
            if plan.algorithm == "dpo":
                with torch.no_grad():
                    reference(batch)
            loss = sum(value.sum() for value in out.values() if value.requires_grad)
        with ledger.watch(None if number else "update backward"):
            loss.backward()
        del out, loss
    with ledger.watch("optimizer"):
        optimizer_step(optimizer, 1e-3, 1.0, 0.0, 0, str)


def sample(ledger: Ledger, plan: Plan, model: LanguageModel, keep_sharded: bool) -> None:
    """The first and the last step of `generate`, as it does them."""
    rows, rules, name = plan.generation_batch_size, LogitRules(), "rollout" + ", kept sharded" * keep_sharded

    def step(ids, mask, cache, encoder):
        logits, _, cache = model.decode(ids, mask, cache, **encoder)
        logits = logits.float()
        logprobs = rules(logits, ids[:, -1], ids[:, -1]).log_softmax(-1)
        pick(logprobs, torch.rand(rows))
        return cache, logits, logprobs  # which live on into the next step

    with torch.no_grad(), unsharded(model, keep_sharded):
        ids, encoder = torch.zeros(rows, plan.prompt_length, dtype=torch.long), {}
        longest = plan.prompt_length + plan.response_length - 1
        with ledger.watch(f"{name}, prompt"):
            if model.seq2seq:
                encoder = {"encoder_states": model.encode(ids, ids.bool()), "encoder_mask": ids.bool()}
                ids, longest = ids[:, :1], plan.response_length - 1
            held = step(ids, None if model.seq2seq else torch.ones_like(ids).bool(), None, encoder)
        del held
        ids = torch.zeros(rows, longest, dtype=torch.long)
        held = step(ids, None if model.seq2seq else torch.ones_like(ids).bool(), None, encoder)
        mask = None if model.seq2seq else torch.ones(rows, longest + 1, dtype=torch.bool)
        with ledger.watch(f"{name}, last token"):
            held = step(ids[:, :1], mask, held[0], encoder)


def dry_run(plan: Plan, config) -> dict[str, dict[str, dict[str, int]]]:
    """Rows at the peak of each window of each phase, for a model of this config at its full depth."""
    if dist.is_initialized():
        raise RuntimeError("a plan needs its own process group: run it in a process of its own")
    if plan.ranks % (plan.shard_size or plan.ranks):
        raise UserError(f"--shard-size {plan.shard_size} does not divide the {plan.ranks} processes")
    dist.init_process_group("fake", rank=0, world_size=plan.ranks, store=FakeStore())
    ledger = Ledger(config.get_text_config().vocab_size)
    gc.freeze()  # so that collecting is quick
    try:
        with watched(ledger, plan.gloo), FakeTensorMode(allow_non_fake_inputs=True), ledger:
            with ledger.row("reference"):
                model, reference = build(plan, config, ledger)
            gc.collect()
            for tensor in (*model.parameters(), *model.buffers()):
                ledger.move(tensor, "parameters")
            optimizer = adamw(model, 1e-3, (0.9, 0.95), 1e-8, 0.0)
            small, ledger.scored = make_batch(plan, model, 1, 2, 2)
            train_step(plan, ledger, model, reference, optimizer, small, 1)  # the optimizer has its moments now
            ledger.windows = {"load": ledger.windows["load"]}
            for keep in (False, True) if plan.keep_sharded is None else (plan.keep_sharded,):
                if plan.generation_batch_size:
                    sample(ledger, plan, model, keep)
            rows = -(-plan.batch_size // plan.ranks)
            micro = min(rows, plan.micro_batch_size)
            batch, ledger.scored = make_batch(plan, model, micro, plan.prompt_length, plan.response_length)
            if plan.algorithm == "ppo":
                with torch.no_grad():
                    with ledger.watch("scoring"):
                        out = model(**batch)
                    with ledger.watch("scoring, reference"):
                        reference(batch)
                del out
            train_step(plan, ledger, model, reference, optimizer, batch, min(2, -(-rows // micro)))
            del batch, small, model, reference, optimizer
    finally:
        dist.destroy_process_group()
        gc.collect()
        gc.unfreeze()
    return ledger.windows


# --- from a shallow model to a deep one -------------------------------------------------------------------------------


def with_depth(config, depth: int):
    """The config with so many blocks, in encoder and decoder alike."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    old = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == old:  # such as layer_types
            setattr(text, name, value[:depth])
    for name in ("num_hidden_layers", "num_decoder_layers"):
        if hasattr(text, name):
            setattr(text, name, depth)
    return config


def deeper(few: dict[str, dict], more: dict[str, dict], depth: int, layers: int) -> dict[str, dict]:
    """The windows of a phase of a model of so many layers, from those of two shallow ones, with `depth` layers and with
    one more: windows of the lower half of the blocks are paired from below, those of the upper half from above. With
    two blocks in each half, those between are as their inner ones, with more or fewer layers done, so that none of
    them is the highest."""
    found = {}
    for event, low in few.items():
        number = re.search(r"(?<=\.)\d+\b", event)
        above = number and int(number[0]) >= depth // 2
        upper = event[: number.start()] + str(int(number[0]) + 1) + event[number.end() :] if above else event
        found[event] = {row: low[row] + (layers - depth) * (more[upper][row] - low[row]) for row in ROWS}
    return found


def windows_of(plan: Plan) -> dict[str, dict[str, dict[str, float]]]:
    """Rows at the peak of each window of each phase, at both ends of the model if it is deep."""
    layers = plan.config.get_text_config().num_hidden_layers
    depth = 4 + 2 * max(0, plan.num_layers_unfrozen, plan.num_value_layers)
    if layers <= depth + 1 or plan.config.is_encoder_decoder:
        return dry_run(plan, plan.config)
    few, more = (dry_run(plan, with_depth(plan.config, number)) for number in (depth, depth + 1))
    return {phase: deeper(few[phase], more[phase], depth, layers) for phase in few}


def on_device(rows: dict[str, float], offload: bool) -> float:
    """Bytes of a phase on the device: all, or what is not kept in CPU memory."""
    return sum(value for name, value in rows.items() if not (offload and name in STATE))


def phases_of(plan: Plan) -> dict[str, dict[str, float]]:
    """Rows at the peak of rollout, scoring (ppo) and update, and of `load`: what stands in CPU memory before anything
    is sharded."""
    phases = {}
    for name, windows in windows_of(plan).items():
        if name == "optimizer" and plan.offload:
            continue  # runs on the CPU
        phase = "update" if name.startswith("update") or name == "optimizer" else name
        phase = re.sub(r", (prompt|last token|reference)$", "", phase)
        phases.setdefault(phase, []).extend(windows.values())
    return {phase: max(windows, key=lambda rows: on_device(rows, plan.offload)) for phase, windows in phases.items()}


def peak_of(phases: dict, keep_sharded: bool, offload: bool) -> float:
    """Bytes at the highest phase of a run with or without these flags."""
    left_out = ("load", "rollout" if keep_sharded else "rollout, kept sharded")
    return max(on_device(rows, offload) for name, rows in phases.items() if name not in left_out)


# --- the check --------------------------------------------------------------------------------------------------------

SMALL = {
    "gpt2": dict(model_type="gpt2", n_embd=256, n_layer=4, n_head=4, n_positions=512, vocab_size=8192,
                 bos_token_id=None, eos_token_id=None),
    "llama": dict(model_type="llama", hidden_size=256, num_hidden_layers=4, num_attention_heads=8,
                  num_key_value_heads=2, intermediate_size=704, max_position_embeddings=512, vocab_size=8192,
                  bos_token_id=None, eos_token_id=None),
    "t5": dict(model_type="t5", d_model=256, d_kv=32, d_ff=1024, num_layers=3, num_heads=8, vocab_size=8192,
               decoder_start_token_id=0, pad_token_id=0, eos_token_id=None)}
CHECKS = [  # family, algorithm, ranks, settings
    ("gpt2", "sft", 1, {}), ("llama", "sft", 2, dict(dtype="bfloat16", gradient_checkpointing=True)),
    ("llama", "ppo", 1, {}), ("gpt2", "ppo", 1, dict(num_layers_unfrozen=1)),
    ("llama", "ppo", 2, dict(lora_rank=8, keep_sharded=True)), ("gpt2", "dpo", 1, {}),
    ("llama", "dpo", 1, dict(lora_rank=8, gradient_checkpointing=True)), ("gpt2", "ilql", 2, dict(micro_batch_size=2)),
    ("t5", "sft", 1, {})]
SIZES = dict(dtype="float32", batch_size=8, micro_batch_size=8, prompt_length=96, response_length=96)


def make_model(folder: str, family: str) -> None:
    """A random model and a tokenizer of words, without an end token, so that outputs are as long as they can be."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<pad>", "<unk>", *(f"w{i}" for i in range(500))])}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>").save_pretrained(folder)
    config = AutoConfig.for_model(**SMALL[family])
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    auto.from_config(config).save_pretrained(folder)


def tokens_alive(profile) -> list[tuple[int, int]]:
    """(time in ns, bytes of tensors alive then) at each allocation and release that the profiler saw."""
    events = sorted((event.start_ns(), event.nbytes()) for event in profile.profiler.kineto_results.events()
                    if event.name() == "[memory]")
    total, curve = 0, []
    for when, size in events:
        total += size
        curve.append((when, total))
    return curve


def measure(folder: str, algorithm: str, settings: dict) -> dict[str, float]:
    """Train for two steps by the script's own `train`; the most bytes of tensors alive in each phase after the first
    optimizer step, by the allocator's own events (on a GPU by its peak)."""
    script, spans = importlib.import_module(algorithm), []
    settings, cuda = dict(settings), torch.cuda.is_available()
    prompt, response = settings.pop("prompt_length"), settings.pop("response_length")
    rows = settings["batch_size"]
    text = lambda start, count: " ".join(f"w{(7 * start + i) % 500}" for i in range(count))  # noqa: E731
    # rows differ a little in length, so that batches are padded, as true ones are
    prompts = [text(i, prompt - i % 4) for i in range(2 * rows)]
    answers = [text(i + 50, response) for i in range(2 * rows)]
    options = dict(model=folder, output_dir=folder + "/run", num_eval_prompts=0, **settings)
    if algorithm == "ppo":
        options |= dict(num_eval_prompts=1, total_episodes=2 * rows, rollout_batch_size=rows, ppo_epochs=1,
                        max_new_tokens=response, max_length=prompt + response)
        data = dict(reward_fn=lambda samples, **_: [float(i) for i in range(len(samples))], prompts=prompts)
    elif algorithm == "dpo":
        data = dict(pairs=[dict(prompt=p, chosen=a, rejected=a[3:] + " w9") for p, a in zip(prompts, answers)])
        options |= dict(held_out=0.0, max_length=512)
    else:
        data = dict(samples=[[p, a] for p, a in zip(prompts, answers)])
        options |= dict(held_out=0.0) if algorithm == "sft" else {}
        data |= dict(rewards=[float(i) for i in range(2 * rows)]) if algorithm == "ilql" else {}

    def timed(phase, function):
        def call(*args, **kwargs):
            began = time.time_ns()
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            try:
                return function(*args, **kwargs)
            finally:
                spans.append((phase, began, time.time_ns(), torch.cuda.max_memory_allocated() if cuda else 0))
        return call

    functions = {"sample_texts": "rollout", "score_tokens": "scoring", "optimizer_step": "optimizer",
                 "update": "update", "batch_loss": "update", "batch_metrics": "update",
                 "batch_loss_and_gradient": "update"}
    with contextlib.ExitStack() as stack:
        for name, phase in functions.items():
            if hasattr(script, name):
                stack.enter_context(mock.patch.object(script, name, timed(phase, getattr(script, name))))
        profile = None if cuda else stack.enter_context(torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True))
        script.train(script.Args(**options), **data)
    first = min(end for phase, _, end, _ in spans if phase == "optimizer")
    spans = [span for span in spans if span[1] > first]
    if not cuda:
        curve = tokens_alive(profile)
        spans = [(*span[:3], max(size for when, size in curve if span[1] <= when <= span[2])) for span in spans]
    found = {}
    for phase, _, _, peak in spans:
        phase = "update" if phase == "optimizer" else phase
        found[phase] = max(found.get(phase, 0), peak)
    return found


def measure_case(folder: str, algorithm: str, settings: dict) -> None:
    """`measure` on one of several ranks, perhaps; rank 0 writes what it found."""
    found = measure(folder, algorithm, settings)
    if dist.get_rank() == 0:
        Path(folder, "measured.json").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)  # as common.cli.run does


def check() -> None:
    """Print plan and measurement of all CHECKS, each in processes of its own."""
    print(f"{'case':<62} {'phase':<8} {'planned MB':>10} {'measured MB':>11} {'ratio':>6}")
    for family, algorithm, ranks, settings in CHECKS:
        name = " ".join([family, algorithm, f"{ranks} rank{'s' * (ranks > 1)}", *words_of(settings)])
        settings = {**SIZES, **settings}
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
        with tempfile.TemporaryDirectory() as folder:
            make_model(folder, family)
            more = dict(gloo=not torch.cuda.is_available(), generation_batch_size=-(-settings["batch_size"] // ranks))
            flags = words_of({"model": folder, "algorithm": algorithm, "ranks": ranks, "json": f"{folder}/plan.json",
                              **settings, **more})
            for words in ([*launch, __file__, "--measure", json.dumps([folder, algorithm, settings])],
                          [__file__, *flags]):
                done = subprocess.run([sys.executable, *words], env={**os.environ, "OMP_NUM_THREADS": "1"},
                                      capture_output=True, text=True)
                if done.returncode:
                    sys.exit(f"{name}: {done.stderr}")
            measured, plan = (json.loads(Path(folder, f"{part}.json").read_text()) for part in ("measured", "plan"))
        for phase, size in measured.items():
            planned = plan["phases"][phase]["total"]
            print(f"{name:<62} {phase:<8} {planned / 1e6:>10.1f} {size / 1e6:>11.1f} {planned / size:>6.3f}",
                  flush=True)


def words_of(settings: dict) -> list[str]:
    """Settings as command-line words."""
    return [word for name, value in settings.items() if value is not False
            for word in ["--" + name.replace("_", "-"), *([] if value is True else [str(value)])]]


# --- tables and the command line --------------------------------------------------------------------------------------

WAYS = ("", "--gradient-checkpointing", "--gradient-checkpointing --keep-sharded",
        "--gradient-checkpointing --keep-sharded --offload",
        "--num-layers-unfrozen 4 --gradient-checkpointing --keep-sharded",
        "--lora-rank 16 --gradient-checkpointing", "--lora-rank 16 --gradient-checkpointing --keep-sharded")


def load_model_config(path: str):
    """The config of a built-in name, of a JSON file, or of a model by path or hub id."""
    if path in BUILTIN:
        return AutoConfig.for_model(**BUILTIN[path])
    try:
        return load_config(path)
    except UserError as error:
        raise UserError(f"{str(error).replace('--from-config', '--model')}; built in: {', '.join(BUILTIN)}") from None


def plan_of(args, **others) -> Plan:
    """The plan that the command line asks for."""
    settings = {field.name: getattr(args, field.name) for field in dataclasses.fields(Plan)[1:]}
    return Plan(load_model_config(args.model), **{**settings, **others})


def report(plan: Plan, path: str | None) -> None:
    """Print the rows in GB, a column for each phase, and write them to a JSON file, in bytes."""
    phases = phases_of(plan)
    loading = sum(phases.pop("load").values())
    phases = {name.split(",")[0]: {**rows, "total": on_device(rows, plan.offload)} for name, rows in phases.items()}
    print(f"{'GB per process':<22}" + "".join(f"{phase:>12}" for phase in phases))
    for row in (*ROWS, "total"):
        where = "  in CPU memory" if plan.offload and row in STATE else ""
        print(f"{row:<22}" + "".join(f"{rows[row] / 1e9:>12.3f}" for rows in phases.values()) + where)
    print(f"while loading, {loading / 1e9:.1f} GB of CPU memory a process, {8 * loading / 1e9:.0f} for 8 of them")
    if path:
        peak = max(rows["total"] for rows in phases.values())
        Path(path).write_text(json.dumps({"phases": phases, "peak": peak, "loading": loading}, indent=1))


def table(names: list[str], algorithms: list[str], words: list[str]) -> None:
    """Print as Markdown the GB on each GPU by model, algorithm, flags and number of GPUs; bold: it fits."""
    counts, known = (8, 16, 32, 64), {}
    print(f"| model | algorithm | flags | {' | '.join(f'{n} GPUs' for n in counts)} |\n|{'---|' * (3 + len(counts))}")
    for name, algorithm, way in ((name, algorithm, way) for name in names for algorithm in algorithms for way in WAYS):
        args = parse([*words, "--model", name, "--algorithm", algorithm, *way.split()])
        rest = way.replace(" --keep-sharded", "").replace(" --offload", "")  # these two are read off one plan
        if (name, algorithm, rest) not in known:  # each rank has two micro-batches or more
            known[name, algorithm, rest] = phases_of(plan_of(
                args, ranks=8, batch_size=16 * args.micro_batch_size, keep_sharded=None, offload=False))
        cells = []
        for count in counts:  # what is gathered does not depend on the number of ranks
            phases = {phase: {row: size * 8 / count if row in STATE else size for row, size in rows.items()}
                      for phase, rows in known[name, algorithm, rest].items()}
            peak = peak_of(phases, args.keep_sharded, args.offload)
            cells.append(f"**{peak / 1e9:.0f}**" if peak <= GPU - RESERVE else f"{peak / 1e9:.0f}")
        print(f"| {name} | {algorithm} | {f'`{way}`' if way else 'none'} | {' | '.join(cells)} |", flush=True)


def parse(words: list[str]):
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help=f"a model or its config, by path or hub id, or one of {', '.join(BUILTIN)}")
    parser.add_argument("--algorithm", choices=ALGORITHMS)
    for field in dataclasses.fields(Plan)[2:]:
        kind = dict(default=field.default, type=str if field.type is str else int)
        choices = dict(choices=("bfloat16", "float32")) if field.name == "dtype" else {}
        parser.add_argument("--" + field.name.replace("_", "-"), **choices,
                            **(dict(action="store_true") if field.default is False else kind))
    parser.add_argument("--json", help="write the plan to this file too, in bytes")
    parser.add_argument("--table", nargs="*", metavar="MODEL", help="the table of these built-in models, or of all")
    parser.add_argument("--check", action="store_true", help="plan and measure small runs")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    return parser.parse_args(words)


def main() -> None:
    """Read the flags; plan, or print a table."""
    args = parse(sys.argv[1:])
    try:
        if args.measure:
            measure_case(*json.loads(args.measure))
        elif args.check:
            check()
        elif args.table is not None:
            table(args.table or list(BUILTIN), [args.algorithm] if args.algorithm else ALGORITHMS, sys.argv[1:])
        elif not args.model:
            raise UserError("--model: give a model, or --table, or --check")
        else:
            report(plan_of(args, algorithm=args.algorithm or "ppo"), args.json)
    except UserError as error:
        sys.exit(f"memory_plan.py: error: {error}")


if __name__ == "__main__":
    main()
