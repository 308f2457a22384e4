"""The embedded PostgreSQL, once for all tests, empty for each; the real embedding model from its PyPI package."""

import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("DATABASE_URL", None)
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent.parent)]

import numpy as np  # noqa: E402
import pytest  # noqa: E402


@pytest.fixture(scope="session")
def folder():
    """Not pytest's tmp_path: each pytest that starts closes its root to others, and root's server is another user."""
    with tempfile.TemporaryDirectory(prefix="plainrl-news-") as path:
        yield path


@pytest.fixture(scope="session")
def opened(folder):
    """A database on a server of its own."""
    from database import Database

    with Database(None, folder) as database:
        yield database
        database._server.cleanup()


@pytest.fixture
def database(opened):
    """The same, with empty tables, and no embedding model recorded."""

    def empty(connection):
        connection.execute(
            "TRUNCATE articles, chunks, lexemes, settings, asks, choices, ratings, models, activations "
            "RESTART IDENTITY CASCADE"
        )
        connection.execute("DROP INDEX IF EXISTS chunks_embedding")
        connection.execute("ALTER TABLE chunks ALTER COLUMN embedding TYPE vector")

    opened.run(empty)
    return opened


@pytest.fixture(scope="session")
def embedder():
    """all-MiniLM-L6-v2, which remembers what it has embedded: most tests ingest the same articles."""
    from embedding import Embedder

    class Remembers(Embedder):
        known = {}

        def embed(self, texts):
            new = [text for text in dict.fromkeys(texts) if text not in self.known]
            if new:
                self.known.update(zip(new, super().embed(new)))
            return np.array([self.known[text] for text in texts])

    return Remembers()
