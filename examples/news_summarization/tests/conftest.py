"""What tests of the example share: both folders on sys.path, and the embedded PostgreSQL."""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]  # the example's files, and the repository's common/

from database import Database  # noqa: E402


@pytest.fixture(scope="session")
def database():
    """A database of its own, with the schema; whatever tests put there stays for those after them."""
    # not below pytest's own folder, which each pytest that starts closes to the user whom PostgreSQL runs as under root
    folder = tempfile.mkdtemp(prefix="news-database-")
    os.chmod(folder, 0o755)
    with Database(None, folder) as opened:
        yield opened
    opened._server.cleanup()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def empty(database):
    """The same, with empty tables; the embedding model, once recorded, stays."""
    tables = "articles, chunks, lexemes, asks, choices, ratings, models, activations"
    database.run(lambda connection: connection.execute(f"TRUNCATE {tables} RESTART IDENTITY"))
    return database
