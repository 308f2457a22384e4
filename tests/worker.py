"""Run by tests under torchrun, or alone: prints what must be equal for any number of processes, as JSON on rank 0.

    worker.py FOLDER CHECK...
"""

import json
import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import transformers  # noqa: E402
from conftest import char_tokenizer, tiny_lm  # noqa: E402

import ppo  # noqa: E402
from common import randomwalks  # noqa: E402
from common.checkpoint import load_checkpoint, save_checkpoint  # noqa: E402
from common.distributed import gather_rows, generator, init, rank_rows, unsharded  # noqa: E402
from common.generation import generate, noise, sample_texts  # noqa: E402
from common.models import LanguageModel, LogitRules, collate, frozen, make_head, prepare, top_copy  # noqa: E402

PROMPTS = [[5, 6, 7, 8, 9], [10, 11], [12, 3, 4], [20], [30, 31, 32, 33]]
RESPONSES = [[4, 5], [6, 7, 8, 2], [9], [10, 11, 12, 13, 14, 15, 2], [16, 17, 2]]


def policy(architecture: str, shard_size: int | None = None, dtype=torch.float32) -> LanguageModel:
    model = LanguageModel(tiny_lm(architecture))
    torch.manual_seed(1)
    model.heads["value"] = make_head(model.width, 1)
    torch.nn.init.normal_(model.heads["value"][2].weight, std=0.1, generator=torch.Generator().manual_seed(0))
    return prepare(model, dtype, torch.device("cpu"), shard_size=shard_size)


def gradients(architecture: str, micro_batch_size: int, rows: int = 5, **options) -> dict[str, float]:
    """Norm and a random projection of each parameter's gradient of one PPO minibatch, by the script's own `update`."""
    model, prompts, responses = policy(architecture, **options), PROMPTS[:rows], RESPONSES[:rows]
    draw = lambda: torch.randn(rows, 7, generator=torch.Generator().manual_seed(len(data)))  # noqa: E731
    mask = torch.arange(7) < torch.tensor([len(response) for response in responses])[:, None]
    data = {"mask": mask}
    for name in ("logprobs", "ref_logprobs", "values", "advantages", "returns"):
        data[name] = draw() * mask - (4 if name == "logprobs" else 0) * mask
    captured = {}

    class Capture(torch.optim.SGD):
        def step(self):
            for name, parameter in model.named_parameters():
                whole = parameter.grad.full_tensor()
                captured[name] = [whole.norm().item(),
                                  (whole * torch.randn(whole.shape, generator=generator(7))).sum().item()]

    args = ppo.Args(ppo_epochs=1, batch_size=rows, rollout_batch_size=rows, micro_batch_size=micro_batch_size,
                    max_grad_norm=1e9)
    ppo.update(model, Capture(model.parameters(), 0.1), prompts, responses, data, LogitRules(),
               {"step": 0, "updates": 0}, 1, args, str)
    return captured


def check_gradients(folder):
    return {f"{architecture}-{micro}": gradients(architecture, micro)
            for architecture in ("gpt2", "llama", "t5") for micro in (1, 2, 5)}


def check_few(folder):
    """Fewer rows than ranks, for the gradient, for sampling and scoring, and for the reward function."""
    model, tokenizer = policy("gpt2"), char_tokenizer()
    items = sample_texts(model, tokenizer, PROMPTS[:1], noise(generator(3), 1, 6), LogitRules(), batch_size=2)
    scores = ppo.compute_scores(lambda outputs: [len(output) for output in outputs], items, [{"prompt": "a"}],
                                tokenizer, ppo.Args())
    data = ppo.score_tokens(model, lambda batch: model(**batch)["logprobs"], PROMPTS[:1],
                            [item["tokens"] for item in items], LogitRules(), 2, torch.device("cpu"))
    return [gradients("gpt2", 2, 1), gradients("gpt2", 2, 2), scores, data["logprobs"].tolist()]


def check_start(folder):
    """The start of random walks, written by one process: all find it whole, with the weights that its seed gives."""
    path = f"{folder}/start-{dist.get_world_size()}"
    randomwalks.cloned_walker = lambda walks, seed: randomwalks.untrained_walker(seed)  # not fitted, for want of time
    randomwalks.write_cloned_walker(path, None, 3)
    found = transformers.AutoModelForCausalLM.from_pretrained(path)
    assert transformers.AutoTokenizer.from_pretrained(path).eos_token
    return [parameter.norm().item() for parameter in found.parameters()]


def check_hybrid(folder):
    """Hybrid sharding: two copies of the weights on two ranks."""
    return gradients("gpt2", 2, shard_size=1)


def check_sampling(folder):
    """The same tokens on any number of ranks; ranks that stop at different lengths; gathered once or kept sharded."""
    found = {}
    for architecture in ("gpt2", "llama", "t5"):
        model = policy(architecture)
        rules = LogitRules(eos_ids=tuple(range(2, 12)))  # many end tokens: rows and ranks end at very different steps
        for keep_sharded in (False, True):
            for count in (5, 1):  # one prompt: fewer than ranks
                items = sample_texts(model, char_tokenizer(), PROMPTS[:count], noise(generator(3), count, 20), rules,
                                     batch_size=2, keep_sharded=keep_sharded)
                found[f"{architecture}-{keep_sharded}-{count}"] = [item["tokens"] for item in items]
        batch = collate(PROMPTS[:1], RESPONSES[:1], model.start_id, torch.device("cpu"))
        model(**batch)["logprobs"].sum().backward()  # training goes on after a rollout
        assert all(hasattr(parameter, "full_tensor") for parameter in model.parameters())
    return found


def check_apart(folder):
    """Ranks inside `unsharded` make different numbers of calls and do not wait for each other."""
    model = policy("gpt2")
    with unsharded(model):
        for _ in range(1 + 3 * dist.get_rank()):
            generate(model, PROMPTS, noise(generator(1), 5, 4 + 5 * dist.get_rank()))
    out = model(**collate(PROMPTS, RESPONSES, None, torch.device("cpu")))
    return [round(value, 4) for value in out["logprobs"].tolist()]


def check_gathers(folder):
    """All-gathers during a rollout do not grow with its length."""
    model, counts = policy("gpt2"), []
    for length in (2, 12):
        with torch.profiler.profile() as profile, unsharded(model):
            generate(model, PROMPTS, noise(generator(1), 5, length))
        counts.append(sum(event.count for event in profile.key_averages() if "allgather" in event.key.lower()))
    return counts


def check_rows(folder):
    """Rows over ranks and back."""
    found = []
    for count in (1, 2, 3, 5, 8):
        rows, real = rank_rows(count)
        shares = gather_rows([(len(rows), sum(real))], dist.get_world_size())
        assert len({share for share, _ in shares}) == 1 and sum(number for _, number in shares) == count
        found.append(gather_rows([row * 10 for row in rows], count))
    return found


def check_scores(folder):
    """log-probs, reference, values, entropy of whole-copy and hydra references."""
    found = {}
    for architecture in ("gpt2", "llama", "t5"):
        lm = tiny_lm(architecture)
        twin = top_copy(lm, 1, whole=True, detach=True)
        model = LanguageModel(lm)
        model.heads["value"] = make_head(model.width, 1)
        prepare(model, torch.float32, torch.device("cpu"))
        reference = prepare(frozen(twin, torch.float32), torch.float32, torch.device("cpu"))
        data = ppo.score_tokens(model, lambda batch, reference=reference: reference(**batch)["logprobs"], PROMPTS,
                                RESPONSES, LogitRules(), 2, torch.device("cpu"))
        assert (data["logprobs"] - data["ref_logprobs"]).abs().max() < 1e-5
        found[architecture] = data["logprobs"].tolist()
    return found


def checkpoint_losses(path: str) -> list[float]:
    """Three losses after a checkpoint that is read if it is there, and else written after three steps; and two numbers
    of the random generator."""
    model, losses = policy("gpt2"), []
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, fused=True)
    batch = collate(PROMPTS, RESPONSES, None, torch.device("cpu"))

    def step():
        out = model(**batch)
        loss = -out["logprobs"].mean() + out["value"].square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    if Path(path).exists():
        state = load_checkpoint(path, model, optimizer, None)
        assert state["kl_coef"] == 0.1 + 0.2
    else:
        for _ in range(3):
            step()
        torch.rand(dist.get_rank() + 1)
        save_checkpoint(path, model, optimizer, {"kl_coef": 0.1 + 0.2}, 1)
    for _ in range(3):
        losses.append(step())
    return losses, torch.rand(2).tolist()


def check_checkpoint(folder):
    """Write and continue; read and continue; and read what another number of ranks has written, where that exists."""
    world = dist.get_world_size()
    path = f"{folder}/{world}/checkpoints/step-3"
    written = None if Path(path).exists() else checkpoint_losses(path)
    dist.barrier()
    read = checkpoint_losses(path)
    other = f"{folder}/{3 - world}/checkpoints/step-3"
    assert written is None or written == read, (written, read)
    return [read[0], checkpoint_losses(other)[0] if Path(other).exists() else None]


if __name__ == "__main__":
    torch.set_num_threads(1)
    init(0)
    results = {check: globals()[f"check_{check}"](sys.argv[1]) for check in sys.argv[2:]}
    everywhere = gather_rows([json.dumps(results)], dist.get_world_size())
    assert len(set(everywhere)) == 1, "ranks disagree"
    if dist.get_rank() == 0:
        print("RESULT", json.dumps(results))
    sys.stdout.flush()
    dist.barrier()
    os._exit(0)  # as common.cli.run does
