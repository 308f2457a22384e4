"""Decoding in shapes that do not change, so that a GPU replays a whole step, sampling too, as one CUDA graph."""

import functools
import warnings
from collections.abc import Callable

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from common.cli import reason
from common.models import LanguageModel, trunk_of

NARROWEST = 128  # columns that the smallest graph reads; each of the others reads twice as many as the one before


class _FixedLayer(DynamicLayer):
    """A cache layer of a fixed shape: each row's new key and value go to the column `at` (b,) of that row."""

    def update(self, key_states, value_states, *_, **__):
        """Write keys and values (b, heads, 1, size); return all."""
        places = torch.arange(len(self.at), device=self.at.device)
        self.keys[places, :, self.at] = key_states[:, :, 0]
        self.values[places, :, self.at] = value_states[:, :, 0]
        return self.keys, self.values


class FixedBatch:
    """A batch for `generate` with a fixed number of places and columns. Rows lie flush left; those that have ended go
    on unread until others take their places.

    Where no graph can be made, on a CPU for one, or of a model that decides by its data what it computes, the same
    code runs each time.
    """

    joins = fixed = True

    def __init__(self, layers: list[DynamicLayer], count: int, longest: int, device: torch.device):
        """layers: of a cache of the model, for their shapes. longest: tokens of the longest row that there can be."""
        self.longest = longest
        self.rows: list[int | None] = [None] * count
        self.used = [0] * count  # tokens in the cache, as `lengths` has them where the device is not to be asked
        self.lengths, self.previous, self.index, self.numbers = torch.zeros(4, count, dtype=torch.long, device=device)
        self.chosen = torch.zeros(count, device=device)
        room = -(-longest // 8) * 8  # attention wants rows of its mask aligned
        self.storage = [[part.new_zeros(count, part.shape[1], room, part.shape[3])
                         for part in (layer.keys, layer.values)] for layer in layers]
        self.cache, self.graphs = DynamicCache(), {}
        self.cache.layers = [_FixedLayer() for _ in layers]

    def going(self) -> list[int]:
        """The places of the rows that have not ended."""
        return [place for place, row in enumerate(self.rows) if row is not None]

    def keep(self, fresh) -> "FixedBatch":
        """Give the free places to the rows of a batch that has just begun, left-padded, with plain layers."""
        places = [place for place, row in enumerate(self.rows) if row is None][: len(fresh.rows)]
        at = torch.tensor(places, device=self.lengths.device)
        mask = fresh.mask[:, :-1]  # without the token that is not in the cache yet
        width, lengths = mask.shape[1], mask.sum(1)
        columns = torch.arange(width, device=at.device) + (width - lengths)[:, None]
        columns = columns.clamp(max=width - 1)[:, None, :, None]  # what lies behind a row is not read
        for parts, layer in zip(self.storage, fresh.cache.layers):
            for part, new in zip(parts, (layer.keys, layer.values)):
                part[at, :, :width] = new.gather(2, columns.expand(-1, new.shape[1], -1, new.shape[3]))
        self.lengths[at] = lengths
        for name in ("previous", "index", "numbers"):
            getattr(self, name)[at] = getattr(fresh, name)
        for place, row, length in zip(places, fresh.rows, lengths.tolist()):
            self.rows[place], self.used[place] = row, length
        return self

    def step(self, model: LanguageModel, draw: Callable) -> tuple[torch.Tensor, torch.Tensor]:
        """Sample a token for each place: the tokens (b,) and their log-probs (b,), which the next step overwrites.

        draw(logits (b, V), states (b, H), previous (b,), index (b,), numbers (b,)) -> tokens, log-probs: the sampler.
        It and the model are those of the first step: a graph holds both.
        """
        need, width = 1 + max(self.used[place] for place in self.going()), NARROWEST
        while width < need:
            width *= 2
        if width not in self.graphs:
            self.graphs[width] = self._capture(functools.partial(self._advance, model, draw, width))
        self.graphs[width]()
        self.used = [count + 1 for count in self.used]
        return self.previous, self.chosen

    def _advance(self, model: LanguageModel, draw: Callable, width: int) -> None:
        """A step on the first `width` columns of the cache. All that it reads and writes keeps its address."""
        at = self.lengths.clamp(max=min(self.longest, width) - 1)  # a row that has ended stays inside
        for layer, (keys, values) in zip(self.cache.layers, self.storage):
            layer.keys, layer.values, layer.at = keys[:, :, :width], values[:, :, :width], at
        width = min(width, self.storage[0][0].shape[2])
        mask = torch.arange(width, device=at.device) <= at[:, None]
        hidden, _ = model._states(trunk_of(model.lm), self.previous[:, None], mask[:, None], cache=self.cache,
                                  use_cache=True, position_ids=at[:, None])
        states = hidden[:, -1]
        tokens, chosen = draw(model.logits(states), states, self.previous, self.index, self.numbers)
        self.previous.copy_(tokens)
        self.chosen.copy_(chosen)
        self.index += 1
        self.lengths += 1

    def _capture(self, advance: Callable[[], None]) -> Callable[[], None]:
        """A function that does what `advance` does, by a CUDA graph where that works."""
        if self.lengths.device.type != "cuda":
            return advance
        changed = (self.previous, self.index, self.lengths, self.chosen)
        saved = [tensor.clone() for tensor in changed]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            advance()  # libraries make their workspaces at their first call, which a graph must not hold
        torch.cuda.current_stream().wait_stream(stream)
        for tensor, before in zip(changed, saved):
            tensor.copy_(before)
        graph = torch.cuda.CUDAGraph()
        try:
            # NCCL's watchdog is another thread, which may ask the device what it likes
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                advance()
        except RuntimeError as error:
            warnings.warn(f"rollouts run without CUDA graphs, a few times slower ({reason(error)})", stacklevel=2)
            return advance
        return graph.replay
