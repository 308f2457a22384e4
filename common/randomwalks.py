"""Random walks, the built-in offline task: find the shortest path to a goal in a small directed graph.

The task of the decision-transformer paper (arXiv 2106.01345, section 5) as the trlX examples set it up. A sample is a
path written in letters, one a node, with the goal `a`: "sda" walks from s over d to the goal.
"""

import dataclasses
import os
from collections import deque

import numpy as np
import torch
import torch.distributed as dist
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from common.distributed import broadcast
from common.metrics import say

LETTERS = "abcdefghijklmnopqrstu"
GOAL = 0


@dataclasses.dataclass(frozen=True)
class RandomWalks:
    """A graph and walks on it. Nodes are numbers, 0 is the goal; texts write node i as the i-th letter."""

    adjacency: np.ndarray  # (nodes, nodes) bool, [i, j]: an edge leads from i to j
    walks: list[str]  # random walks of at most max_length nodes, stopped at the goal
    max_length: int  # nodes in the longest walk
    shortest: dict[str, int]  # for each start letter, nodes on the shortest path to the goal

    @property
    def starts(self) -> list[str]:
        """The 20 start letters: every node but the goal."""
        return sorted(self.shortest)

    def length(self, walk: str) -> int | None:
        """Nodes of `walk` up to its first visit of the goal; None if it takes a missing edge or never arrives."""
        nodes = [LETTERS.find(letter) for letter in walk]
        for i, node in enumerate(nodes):
            if not 0 <= node < len(self.adjacency) or (i and not self.adjacency[nodes[i - 1], node]):
                return None
            if node == GOAL:
                return i + 1
        return None

    def metric(self, samples: list[str], **_) -> dict[str, list[float]]:
        """For each sample its optimality, 1 for a shortest path, 0 for max_length nodes or an invalid path, and in
        between in proportion (trlX's measure); and invalid, 1 where `length` has none."""
        optimality, invalid = [], []
        for sample in samples:
            length = self.length(sample)
            nodes = self.max_length if length is None else min(length, self.max_length)
            optimality.append((self.max_length - nodes) / (self.max_length - self.shortest.get(sample[:1], 1)))
            invalid.append(float(length is None))
        return {"optimality": optimality, "invalid": invalid}

    def reward(self, samples: list[str], **_) -> list[float]:
        """The optimality of each sample."""
        return self.metric(samples)["optimality"]


def random_walks(
    seed: int, nodes: int = 21, max_length: int = 10, count: int = 1000, edge_probability: float = 0.1
) -> RandomWalks:
    """Draw a graph and `count` walks. Graphs are drawn again until every node has an edge and the goal can be reached
    from every node in fewer than max_length nodes (trlX accepts graphs where it cannot, and divides by zero)."""
    rng = np.random.RandomState(seed % 2**32)  # it takes no larger ones
    while True:
        adjacency = rng.rand(nodes, nodes) > 1 - edge_probability
        np.fill_diagonal(adjacency, False)
        if not adjacency.any(axis=1).all():
            continue
        adjacency[GOAL] = np.arange(nodes) == GOAL
        distance, queue = {GOAL: 1}, deque([GOAL])
        while queue:  # breadth first, backwards from the goal
            node = queue.popleft()
            for before in np.flatnonzero(adjacency[:, node]):
                if before not in distance:
                    distance[int(before)] = distance[node] + 1
                    queue.append(int(before))
        if len(distance) == nodes and max(distance.values()) < max_length:
            break
    walks = []
    for _ in range(count):
        walk = [GOAL]
        while walk[0] == GOAL:
            walk = [rng.randint(nodes)]
        while len(walk) < max_length and walk[-1] != GOAL:
            walk.append(rng.choice(np.flatnonzero(adjacency[walk[-1]])))
        walks.append("".join(LETTERS[node] for node in walk))
    return RandomWalks(adjacency, walks, max_length, {LETTERS[n]: d for n, d in distance.items() if n != GOAL})


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a letter, and distinct <pad>, <bos> and <eos>."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<bos>", "<eos>", *LETTERS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
                                   clean_up_tokenization_spaces=False, model_max_length=32)


def untrained_walker(seed: int) -> GPT2LMHeadModel:
    """The model of the task, with random weights: a 6-layer, 144-wide GPT-2, 1.5 million parameters, as trlX's."""
    codec = tokenizer()
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=len(codec), n_positions=32, n_embd=144, n_layer=6, n_head=12,
        activation_function="gelu_pytorch_tanh", bos_token_id=codec.bos_token_id, eos_token_id=codec.eos_token_id,
        pad_token_id=codec.pad_token_id)).eval()


def cloned_walker(
    walks: RandomWalks, seed: int, epochs: int = 8, batch_size: int = 50, learning_rate: float = 1e-3
) -> GPT2LMHeadModel:
    """A small GPT-2 fitted to the walks: the behaviour-cloned start of the task.

    Next-token cross-entropy over whole walks with their end token; the learning rate falls linearly to 0. About ten
    seconds on one core.
    """
    codec, model = tokenizer(), untrained_walker(seed)
    ids = codec([walk + codec.eos_token for walk in walks.walks], padding=True, return_tensors="pt")
    batches = [rows for _ in range(epochs) for rows in torch.randperm(len(walks.walks)).split(batch_size)]
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.0)
    for step, rows in enumerate(batches):
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / len(batches))
        tokens, mask = ids.input_ids[rows], ids.attention_mask[rows]
        logits = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits[mask[:, 1:] == 1], tokens[:, 1:][mask[:, 1:] == 1])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model


def write_cloned_walker(path: str, walks: RandomWalks, seed: int) -> None:
    """Write `cloned_walker` and its tokenizer to the folder `path`, unless they are there. All ranks must call."""
    if broadcast(os.path.exists(path)):
        return
    say("fitting a small GPT-2 to 1000 random walks ...")
    if dist.get_rank() == 0:
        cloned_walker(walks, seed).save_pretrained(path + ".tmp")
        tokenizer().save_pretrained(path + ".tmp")
        os.replace(path + ".tmp", path)
    dist.barrier()
