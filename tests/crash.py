"""Kill runs at random moments and resume them, for tests/test_reliability.py; prints what was found as JSON.

    python tests/crash.py FOLDER SCRIPT PROCESSES KILLS SEED

A run is forked from this process, which has imported everything, so that most of its time is training and writing. It
gets SIGKILL after a random time, and is started again with `--resume auto` until it ends by itself; its files must then
be those of a run that nobody killed, to the last bit. That is done again until there were enough kills.
"""

import json
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

torch.set_num_threads(1)

import dpo  # noqa: E402
import ilql  # noqa: E402
import ppo  # noqa: E402
import sft  # noqa: E402
from common import checkpoint  # noqa: E402

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
SHARED = dict(save_every=1, eval_every=2, micro_batch_size=2, batch_size=4, max_new_tokens=4, learning_rate=1e-3,
              max_length=40, keep_checkpoints=2, resume="auto")


def score(outputs, **_):
    return [sum(ord(letter) % 7 for letter in output) / 10 for output in outputs]


def start(script: str, model: str, folder: str) -> None:
    """Train a tiny model."""
    flags = dict(SHARED, model=model, output_dir=folder)
    if script == "ppo":
        ppo.train(ppo.Args(**flags, rollout_batch_size=8, total_episodes=64, num_eval_prompts=4, kl_target=1.0,
                           reward_scaling="running"), reward_fn=score, prompts=WORDS)
    elif script == "sft":
        sft.train(sft.Args(**flags, epochs=4, held_out=0.2, num_eval_prompts=2),
                  [{"prompt": word, "completion": word[::-1]} for word in WORDS])
    elif script == "dpo":
        dpo.train(dpo.Args(**flags, epochs=4, held_out=0.2, num_eval_prompts=2),
                  [{"prompt": word, "chosen": word[::-1], "rejected": "z" + word} for word in WORDS])
    else:
        ilql.train(ilql.Args(**flags, epochs=3, num_eval_prompts=2, beta=[0.0, 1.0]),
                   [[word, word[::-1]] for word in WORDS], [float(len(word)) for word in WORDS], metric_fn=score)


def fork(script: str, model: str, folder: str, processes: int, log: str) -> list[int]:
    """Start a run; returns the processes' ids."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(processes):
        child = os.fork()
        if child:
            children.append(child)
            continue
        code = 1
        try:
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(out, 1), os.dup2(out, 2)
            if processes > 1:
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes),
                                  MASTER_ADDR="localhost", MASTER_PORT=str(port))
            start(script, model, folder)
            torch.distributed.barrier()
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    return children


def wait(children: list[int], seconds: float) -> bool | None:
    """Whether all ended well; None if they have not ended in time."""
    codes, until = {}, time.time() + seconds
    while len(codes) < len(children):
        for child in set(children) - set(codes):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                codes[child] = os.waitstatus_to_exitcode(status)
        if time.time() > until:
            children[:] = [child for child in children if child not in codes]
            return None
        time.sleep(0.002)
    return not any(codes.values())


def contents(folder: str) -> dict[str, object]:
    """What two equal runs must have in common: all files but the clock's."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        name = str(path.relative_to(folder))
        if not path.is_file() or name in ("lock", "args.yaml") or "manifest" in name:
            continue
        if name.endswith(".jsonl"):
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            clock = {key for row in rows for key in row if key == "seconds" or key.startswith("perf/")}
            found[name] = [{key: value for key, value in row.items() if key not in clock} for row in rows]
        elif name.endswith("state.json"):
            state = json.loads(path.read_text())
            state["args"] |= {"output_dir": None, "resume": None, "track": None}
            del state["date"]
            found[name] = state
        elif name.endswith(".safetensors"):
            found[name] = {key: tensor.numpy().tobytes() for key, tensor in load_file(path).items()}
        else:
            found[name] = path.read_bytes()
    return found


def main() -> None:
    folder, script, processes, kills, seed = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
    draw, model, log = random.Random(seed), f"{folder}/model", f"{folder}/{script}-{processes}.log"
    reference = f"{folder}/{script}-{processes}"
    begun = time.time()
    assert wait(fork(script, model, reference, processes, log), 300), Path(log).read_text()[-3000:]
    whole, wanted = time.time() - begun, contents(reference)
    assert {Path(name).parts[0] for name in wanted} == {"checkpoints", "metrics.jsonl", "model", "samples.jsonl"}
    counts = {"kills": 0, "writing": 0, "resumed": 0, "runs": 0, "seconds": whole}
    while counts["kills"] < kills:
        counts["runs"] += 1
        run = f"{folder}/{script}-{processes}-{counts['runs']}"
        while True:
            had = bool(checkpoint.checkpoints(f"{run}/checkpoints"))
            children = fork(script, model, run, processes, log)
            # often enough within the time that a start takes, and never in the same place
            ended = wait(children, draw.uniform(0.1, 1.1) * whole if counts["kills"] < kills else 300)
            counts["resumed"] += had
            if ended is None:
                for child in children:
                    os.kill(child, signal.SIGKILL)
                wait(children, 30)
                counts["kills"] += 1
                counts["writing"] += any(Path(run).rglob("*.tmp")) or any(Path(run).rglob("*.old"))
                continue
            assert ended, f"{run}: " + Path(log).read_text()[-3000:]
            break
        found = contents(run)
        assert found.keys() == wanted.keys(), (run, found.keys() ^ wanted.keys())
        assert found == wanted, (run, [name for name in wanted if found[name] != wanted[name]])
    print("RESULT", json.dumps(counts))


if __name__ == "__main__":
    main()
