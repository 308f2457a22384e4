"""Scripts as a user runs them, but forked from a process that has imported what all of them import, which takes longer
than most of them: `python tests/forked.py` reads jobs, a line of JSON each, and answers with process and exit code.

Several processes are started here in torchrun's place, with its variables: the first that fails ends the others. What
is said of torchrun itself is tested with torchrun (conftest.run_script).
"""

import json
import os
import runpy
import signal
import socket
import sys
import traceback


def warm(root: str) -> None:
    """Import the scripts, and forget them and common/: what runs may be a copy elsewhere. What others wrote stays."""
    sys.path.insert(0, root)
    for name in ("ppo", "sft", "ilql", "dpo", "common.checkpoint"):
        __import__(name)
    for name, module in list(sys.modules.items()):
        if (getattr(module, "__file__", None) or "").startswith(f"{root}/") and name != "__main__" and (
                "site-packages" not in module.__file__):
            del sys.modules[name]
    del sys.path[0]


def script(words: list[str]) -> int:
    """`python WORDS` in this process: the exit code."""
    sys.argv, sys.path[0] = words, os.path.dirname(os.path.abspath(words[0]))
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return 1 if isinstance(end.code, str) else end.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush(), sys.stderr.flush()
    return 0


def launch(words: list[str], processes: int) -> int:
    """So many processes of `script`: 0, or the exit code of the first that fails."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    ranks = []
    for rank in range(processes):
        ranks.append(os.fork())
        if not ranks[-1]:
            os.environ.update({name: str(value) for name, value in dict(
                RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=processes, LOCAL_WORLD_SIZE=processes,
                MASTER_ADDR="localhost", MASTER_PORT=port).items()})
            os._exit(script(words))
    code = 0
    while ranks:
        ended, status = os.wait()
        ranks.remove(ended)
        if status and not code:
            code = os.waitstatus_to_exitcode(status)
            for rank in ranks:
                os.kill(rank, signal.SIGTERM)
    return code


def run(words: list[str], processes: int, cwd: str, environment: dict, output: list[str]) -> None:
    """A job, in a process and a session of its own."""
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, path in enumerate([os.devnull, *output]):
        os.dup2(os.open(path, os.O_RDWR), descriptor)
    os._exit(launch(words, processes) if processes else script(words))


if __name__ == "__main__":
    jobs, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what imports print is no answer
    warm(sys.argv[1])
    for line in jobs:
        child = os.fork()
        if not child:
            run(**json.loads(line))
        print(child, file=answers, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)
