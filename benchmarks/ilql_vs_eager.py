"""An ILQL step against the same step in plain eager PyTorch, written below: steps per second, and peak memory.

    python benchmarks/ilql_vs_eager.py --model ../shared/data/models/imdb-gpt2-mini

Both take the same ragged random trajectories from the same weights through the same losses, AdamW and the sync of the
targets, and must find the same loss and gradient norm, else the run is worth nothing. What differs: the plain step has
logits and all four Q heads for the whole vocabulary at each place of a padded batch, from which it gathers what the
losses read; ours has them where an action is, a chunk at a time, and of the targets a single number. With --heads
actions the plain step takes its heads, not its logits, at the actions alone, padded, as trlX does; with --sort it puts
rows of like lengths together, as ours does. Runs the given model and one of GPT-2 small's shape, with random weights.
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import versus  # noqa: E402

sys.path.insert(0, str(versus.ROOT))
SHORTEST, LONGEST, RATE = 20, 160, 1e-5


def batches_of(config: dict) -> list[list]:
    """For each step of a turn, trajectories of SHORTEST to LONGEST tokens: a tenth to a half of each is its prompt, all
    others are actions with random rewards, the last of them terminal."""
    import random

    from transformers import AutoConfig

    import ilql

    draw, words = random.Random(1), AutoConfig.from_pretrained(config["_model"]).vocab_size

    def trajectory():
        length = draw.randint(SHORTEST, LONGEST)
        ids, prompt = [draw.randrange(words) for _ in range(length)], int(length * draw.uniform(0.1, 0.5))
        rewards = [draw.gauss(0, 1) for _ in ids[prompt:]]
        return ilql.Trajectory(ids[:prompt], ids[prompt:], [*range(length - prompt)], rewards, [], [])

    return [[trajectory() for _ in range(config["rows"])] for _ in range(config["steps"])]


def heads_of(width: int, vocabulary: int) -> dict:
    """The heads that both sides start from; unlike those of a new run they say something, or half the losses and their
    gradients would be 0 and the comparison would not see them."""
    import torch

    from common.models import TokenHead, make_head

    torch.manual_seed(1)
    heads = {"v": make_head(width, 1)}
    for name in ("q1", "q2", "target_q1", "target_q2"):
        heads[name] = TokenHead(width, vocabulary)
    for head in heads.values():
        torch.nn.init.normal_(head[2].weight, std=0.02)
    for name in ("target_q1", "target_q2"):
        heads[name].requires_grad_(False)
    return heads


def take_turns(config: dict, turns, step) -> None:
    """Turns of some steps each; step(batch) returns the loss and the norm of the gradient."""
    batches, first = batches_of(config), None
    actions = sum(len(item.actions) for batch in batches for item in batch)
    while True:
        turns.wait()
        for batch in batches:
            last = step(batch)
            first = first or last
        turns.done(steps=len(batches), samples=len(batches) * config["rows"], tokens=actions,
                   first_loss=first[0], first_norm=first[1], loss=last[0], norm=last[1])


def ours(config: dict, turns) -> None:
    """A step of ilql.py, as its loop makes it."""
    import torch

    import ilql
    from common.distributed import adamw, init, optimizer_step
    from common.models import LanguageModel, load_lm, prepare

    device, args = init(1), ilql.Args(micro_batch_size=config["micro"])
    lm = load_lm(config["_model"])
    model = LanguageModel(lm, heads_of(lm.config.hidden_size, lm.config.vocab_size))
    prepare(model, getattr(torch, config["_dtype"]), device)
    optimizer = adamw(model, RATE, (args.adam_beta1, args.adam_beta2), args.adam_epsilon, 0.0)

    def step(batch):
        loss = ilql.batch_loss_and_gradient(model, batch, args)["loss/total"]
        norm = optimizer_step(optimizer, RATE, args.max_grad_norm, loss, 0, str)
        ilql.sync_targets(model, args.target_rate)
        return loss, norm

    take_turns(config, turns, step)


def eager(config: dict, turns) -> None:
    """The same step, written down the obvious way."""
    import torch
    from torch.nn.functional import cross_entropy
    from transformers import AutoModelForCausalLM

    import ilql  # for its default hyperparameters alone

    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, config["_dtype"])
    args, micro = ilql.Args(), config["micro"]
    lm = AutoModelForCausalLM.from_pretrained(config["_model"], dtype=torch.float32).eval().to(device)
    heads = torch.nn.ModuleDict(heads_of(lm.config.hidden_size, lm.config.vocab_size)).to(device)
    trained = [*lm.parameters(), *(part for part in heads.parameters() if part.requires_grad)]
    optimizer = torch.optim.AdamW(trained, RATE, (args.adam_beta1, args.adam_beta2), args.adam_epsilon,
                                  weight_decay=0.0)

    def collated(items):
        """ids and mask (B, T); of the places before each token but the first (B, T - 1): rewards after it, whether it
        is an action, and whether it is the last."""
        width = max(len(item.prompt) + len(item.output) for item in items)
        ids, mask, acts, last = (torch.zeros(len(items), width, dtype=torch.long) for _ in range(4))
        rewards = torch.zeros(len(items), width)
        for row, item in enumerate(items):
            begin, end = len(item.prompt), len(item.prompt) + len(item.output)
            ids[row, :end], mask[row, :end] = torch.tensor([*item.prompt, *item.output]), 1
            acts[row, begin:end], last[row, end - 1] = 1, 1
            rewards[row, begin:end] = torch.tensor(item.rewards)
        return [part.to(device) for part in (ids, mask, rewards[:, 1:], acts[:, 1:].bool(), last[:, 1:].bool())]

    def at_actions(acts):
        """The places (B, A) of each row's actions, filled up with its last one's, and which are real."""
        counts = acts.sum(1, keepdim=True)
        real = torch.arange(int(counts.max()), device=device) < counts
        first = acts.long().argmax(1, keepdim=True)
        return first + torch.minimum(torch.arange(real.shape[1], device=device), counts - 1), real

    def loss_of(items, count):
        ids, mask, rewards, weight, last = collated(items)
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            out = lm(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
        hidden, tokens = out.hidden_states[-1].float(), ids[:, 1:]
        values = heads["v"](hidden)[..., 0]
        values, following = values[:, :-1], values[:, 1:].detach()
        nll = cross_entropy(out.logits[:, :-1].float().transpose(1, 2), tokens, reduction="none")
        states = hidden[:, :-1]
        if config["heads"] == "actions":
            places, real = at_actions(weight)
            states = states.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1]))
            values, following, nll, rewards, tokens, last = (part.gather(1, places) for part in (
                values, following, nll, rewards, tokens, last))
            weight = real
        qs = [heads[name](states) for name in ("q1", "q2")]  # (B, T, V)
        with torch.no_grad():
            target_qs = [heads[name](states) for name in ("target_q1", "target_q2")]
        chosen, target = ([q.gather(-1, tokens[..., None])[..., 0] for q in group] for group in (qs, target_qs))
        target = torch.minimum(*target)
        td = rewards + args.gamma * following * ~last
        u = target - values
        q_loss = sum((q - td) ** 2 for q in chosen)
        v_loss = torch.where(u < 0, 1 - args.tau, args.tau) * u**2
        cql = sum(cross_entropy(q.transpose(1, 2), tokens, reduction="none") for q in qs)
        awac = (args.awac_beta * u.detach()).exp().clamp(max=100) * nll
        return (weight * (q_loss + v_loss + args.cql_scale * cql + args.awac_scale * awac)).sum() / count

    def step(batch):
        if config["sort"]:
            batch = sorted(batch, key=lambda item: len(item.prompt) + len(item.output))
        total, count = 0.0, sum(len(item.actions) for item in batch)
        for start in range(0, len(batch), micro):
            loss = loss_of(batch[start : start + micro], count)
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(trained, args.max_grad_norm).item()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name in ("q1", "q2"):
                for target, online in zip(heads[f"target_{name}"].parameters(), heads[name].parameters()):
                    target.copy_(args.target_rate * online + (1 - args.target_rate) * target)
        return total, norm

    take_turns(config, turns, step)


def flops_of(config: dict) -> float:
    """What a turn needs: thrice a forward with logits, Q and V at the actions, and the targets' numbers for these."""
    from transformers import AutoConfig

    shape, total = AutoConfig.from_pretrained(config["_model"]), 0.0
    width, words = shape.hidden_size, shape.vocab_size
    inner = 2 * 2 * width**2  # the first layer of a head, for a state
    for item in (item for batch in batches_of(config) for item in batch):
        length, actions = len(item.prompt) + len(item.output), len(item.actions)
        total += 3 * versus.forward_flops(shape, length, actions, length)
        total += actions * (3 * 2 * (inner + 2 * 2 * width * words) + 2 * inner + 3 * inner)
    return total


def same(result: dict, dtype: str) -> None:
    """Leave if the two sides did not compute the same: at their first step, and, as rounding spreads, later on."""
    near = {"float32": 1e-4, "bfloat16": 3e-2}[dtype]
    for names, most in ((("first_loss", "first_norm"), near), (("loss", "norm"), 10 * near)):
        for name in names:
            pairs = [(one[name], other[name]) for one, other in zip(*result["runs"].values())]
            gap = max(abs(one - other) / abs(other) for one, other in pairs)
            one, other = pairs[-1]
            print(f"{result['name']}: {name} {one:.6g} against {other:.6g}, at most {gap:.1e} apart")
            if not gap < most:
                sys.exit(f"{result['name']}: not the same step: rounding would be at most {most:.0e}")
            result[f"{name}_gap"] = gap


def main():
    """Run and report."""
    flags = versus.parser(__doc__)
    flags.add_argument("--model", required=True, help="path of a GPT-2-like model of a few million parameters")
    flags.add_argument("--rows", type=int, default=16, help="trajectories of a step; a quarter for GPT-2 small's shape")
    flags.add_argument("--micro", type=int, default=8, help="trajectories of a forward; a half for GPT-2 small's")
    flags.add_argument("--steps", type=int, default=1, help="steps of a turn; one for GPT-2 small's shape")
    flags.add_argument("--heads", choices=("all", "actions"), default="all", help="where the plain step has its heads")
    flags.add_argument("--sort", action="store_true", help="give the plain step rows of like lengths together, too")
    flags.add_argument("--only", choices=("given", "gpt2-small"), help="one of the two models")
    args = flags.parse_args()
    from transformers import AutoConfig, AutoModelForCausalLM

    results, folder = [], tempfile.mkdtemp()
    for name, rows, micro, steps in (("given", args.rows, args.micro, args.steps),
                                     ("gpt2-small", max(1, args.rows // 4), max(1, args.micro // 2), 1)):
        if args.only not in (None, name):
            continue
        path = args.model
        if name == "gpt2-small":
            path = f"{folder}/gpt2-small"
            AutoModelForCausalLM.from_config(AutoConfig.for_model(**versus.gpt2_small())).save_pretrained(path)
        config = {"model": name, "rows": rows, "micro": micro, "steps": steps, "heads": args.heads, "sort": args.sort,
                  "_model": path, "_dtype": args.dtype}
        result = versus.compare(f"ILQL {name}", {"ours": ours, "eager": eager}, config, pairs=args.pairs,
                                threads=args.threads, dtype=args.dtype, flops=flops_of(config), unit="steps",
                                alike=("steps", *versus.COUNTS))
        same(result, args.dtype)
        results.append(result)
    versus.report("ilql", results, args.json)


if __name__ == "__main__":
    main()
