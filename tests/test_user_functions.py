"""Reward and metric functions are users' code: what they raise, return, take too long for and do to their arguments."""

import array
import collections
import copy
import decimal
import fractions
import json
import math
import os
import re
import signal
import socket
import statistics
import sys
import time
import traceback
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from conftest import char_tokenizer, run_forked, run_script

import common.functions
import dpo
import ilql
import ppo
import sft
from common.cli import FunctionError, UserError
from common.functions import ask, check_metrics, check_scores, load_function

TINY = dict(total_episodes=8, rollout_batch_size=8, batch_size=8, max_length=32, max_new_tokens=4, num_eval_prompts=2)
ITEMS = [dict(sample=f"{prompt} {output}", prompt=prompt, output=output, tokens=[4] * len(output))
         for prompt, output in (("a", "bcd"), ("long " * 40, "e"), ("g", "hij"), ("k", "lm"))]
ROWS = [{"prompt": item["prompt"], "number": number} for number, item in enumerate(ITEMS)]


def asked(function, kind="reward", timeout=None, items=ITEMS, rows=ROWS):
    return ask(function, kind, items, rows, None, timeout)


def refused(function, kind="reward") -> FunctionError:
    with pytest.raises(FunctionError) as caught:
        asked(function, kind)
    assert "\n" not in str(caught.value)
    return caught.value


# --- exceptions -------------------------------------------------------------------------------------------------------


def inverse(number):
    return 1 / number


def fails_at(*numbers):
    def fussy(number):
        return [inverse(0.0 if each in numbers else 1.0) for each in number]

    return fussy


def test_an_exception_names_the_sample_and_shows_the_functions_own_frames():
    error = refused(fails_at(2))
    assert str(error) == ("the reward function fussy failed on sample 2 of 4, prompt 'g', output 'hij': "
                          "ZeroDivisionError: float division by zero")
    names = [frame.name for frame in traceback.extract_tb(error.__cause__.__traceback__)]
    assert names[0] == "fussy" and names[-1] == "inverse"
    assert "the metric function fussy failed on sample 0 of 4, prompt 'a'" in str(refused(fails_at(0), "metric"))
    assert f"prompt {('long ' * 40)[:80]!r}..., output 'e'" in str(refused(fails_at(1)))


def test_an_exception_on_several_samples_or_on_a_batch_alone_says_so(monkeypatch):
    assert "failed on 2 of 4 samples, the first of them sample 1 of 4, prompt" in str(refused(fails_at(1, 3)))
    assert "failed on 4 of 4 samples, the first of them sample 0 of 4, prompt 'a'" in str(refused(fails_at(0, 1, 2, 3)))
    for function in (lambda number: number if len(number) == 1 else inverse(0.0),
                     lambda number: inverse(0.0) if len(number) > 1 else statistics.stdev(number)):  # another mistake
        assert "failed on a batch of 4 samples, though on none of them alone: Zero" in str(refused(function))
    with pytest.raises(FunctionError, match="failed on sample 0 of 1, prompt 'a', output 'bcd': Zero"):
        asked(fails_at(0), items=ITEMS[:1], rows=ROWS[:1])
    calls = []
    monkeypatch.setattr(common.functions, "SEARCH_SECONDS", 0.0)
    with pytest.raises(FunctionError, match="failed on a batch of 4 samples: KeyError: 'x'"):
        asked(lambda number: calls.append(number) or {}["x"])
    assert calls == [[0, 1, 2, 3]], "a function that took long is not called again"


def test_functions_that_end_the_process_print_or_yield_fail_alike(capsys):
    """`sys.exit` must not end one rank as if it had finished. The search for the sample prints nothing."""
    def leaves(number):
        print("scoring")
        sys.exit(0)

    assert re.search("function leaves failed on 4 of 4 samples.*: SystemExit: 0$", str(refused(leaves)))
    assert capsys.readouterr().out == "scoring\n"

    def lazy(number):
        for each in number:
            yield inverse(each - 3)

    error = refused(lazy)
    assert "function lazy failed on sample 3 of 4, prompt 'k'" in str(error)
    assert traceback.extract_tb(error.__cause__.__traceback__)[0].name == "lazy"

    class Wordy(Exception):
        def __str__(self):
            return "one\n" + "word " * 1000

    def raises(number):
        raise Wordy

    assert str(refused(raises)).endswith("Wordy: one")


def test_a_users_mistake_that_is_already_one_line_stays_so():
    def speaks(outputs):
        raise UserError("REWARD_MODEL: no such model")

    for function, line in ((speaks, "^REWARD_MODEL: no such model$"), (lambda answer: 0, "needs an argument 'answer'"),
                           ("file.py:reward", "'file.py:reward' is no function"), (dict, "does not tell its arg")):
        with pytest.raises(UserError, match=line) as caught:
            asked(function)
        assert not isinstance(caught.value, FunctionError)


def test_a_module_that_fails_shows_its_own_traceback(tmp_path):
    for text, reason in (("x = 1\nx.y\n", "AttributeError: 'int' object has no attribute 'y'"),
                         ("def f(:", "SyntaxError: "),
                         ("import no_such_thing", "ModuleNotFoundError: No module named 'no_such_thing'"),
                         ("raise SystemExit(0)", "SystemExit: 0"), ("open('nowhere')", "FileNotFoundError: ")):
        (tmp_path / "broken.py").write_text(text)
        with pytest.raises(FunctionError, match=re.escape(f"broken.py:f: its module fails: {reason}")) as caught:
            load_function(f"{tmp_path}/broken.py:f", "--reward")
        frames = traceback.extract_tb(caught.value.__cause__.__traceback__)
        assert [frame.filename for frame in frames] == [f"{tmp_path}/broken.py"] * ("SyntaxError" not in reason)


# --- answers ----------------------------------------------------------------------------------------------------------

LENGTHS = [3, 1]


class Series:
    """What pandas and others have: a list to be asked for."""

    def __init__(self, values):
        self.values = values

    def tolist(self):
        return self.values


@pytest.mark.parametrize("scores", [
    torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([1, 2], dtype=torch.int16), np.array([1, 2], object),
    torch.tensor([1.0, 2.0], dtype=torch.bfloat16), torch.tensor([[1.0], [2.0]]), np.array([1, 2], np.float16),
    [torch.tensor([1.0]), torch.tensor([2.0])], Series([1.0, 2.0]), [Series(1), np.int64(2)], {"x": 1, "y": 2}.values(),
    map(float, (1, 2)), collections.deque([1, 2]), array.array("d", [1, 2]), range(1, 3), iter([1.0, torch.tensor(2)]),
    [decimal.Decimal(1), fractions.Fraction(2)], np.array([torch.tensor(1.0), 2.0], object)])
def test_scores_of_more_types(scores):
    again = [*scores] if isinstance(scores, Iterator) else scores
    for checked in (check_scores(iter(again) if again is not scores else scores, LENGTHS),
                    check_metrics({"a": again}, 2)["a"]):
        assert checked == [1.0, 2.0] and all(type(score) in (int, float) for score in checked)


def test_scores_of_one_sample_and_of_tokens():
    for scores in (1.0, torch.tensor(1.0), np.float32(1), [1.0], [[1.0]], torch.ones(1, 1)):
        assert check_scores(scores, [5]) == [1.0]
    dense = [[1.0, 2.0, 3.0], [4.0]]
    for scores in (dense, (np.array(dense[0]), torch.tensor(dense[1])), map(iter, dense), map(tuple, dense)):
        assert check_scores(scores, LENGTHS) == dense
    assert check_scores(torch.ones(2, 3), [3, 3]) == [[1.0] * 3] * 2


@pytest.mark.parametrize("scores,line", [
    ([1.0, "2.0"], "str '2.0' for sample 1"), ([1.0, b"2"], "bytes b'2' for sample 1"),
    ([None, 1.0], "NoneType None for sample 0"), ([1.0, 1j], "complex 1j for sample 1"),
    ([1.0, 10**400], "int 1000.* for sample 1"),
    ([1.0, 1e39], "float 1e[+]39 for sample 1"), ([[1, 2, None], 1.0], "NoneType None for sample 0, token 2"),
    ([[1, [2], 3], 1.0], "list .2. for sample 0, token 1"), ([1.0, {1}], "set .1. for sample 1"),
    ({1.0, 2.0}, "a set for 2 samples"), ({"a": 1, "b": 2}, "a dict for 2 samples"), ("12", "a str for 2 samples"),
    (iter([1.0] * 3), "3 values for 2 samples"), (torch.ones(3, 1), "3 values for 2 samples"),
    ([[1.0, 2.0], 1.0], "2 token rewards for sample 0, whose output has 3 tokens: return a number for each token in "),
    ([1.0, [1.0, 2.0]], "2 token rewards for sample 1, whose output has 1 tokens: return a number for each token in "),
    (torch.ones(2, 3), "3 token rewards for sample 1, whose output has 1 tokens")])
def test_scores_that_mean_nothing_are_one_line(scores, line):
    with pytest.raises(UserError, match=f"^the reward function returned {line}"):
        check_scores(scores, LENGTHS)


@pytest.mark.parametrize("metrics,line", [
    ({1: [1.0, 2.0]}, "a metric called int 1: a name is a text"), ({"a": "1"}, "str '1' as 'a': it must be a number"),
    ({"a": [1.0, "1"]}, "str '1' as 'a' of sample 1: it must be a number"), ({"a": None}, "NoneType None as 'a'"),
    ({"a": [1.0]}, "list .1.0. as 'a' of 2 samples, a list of 1"), ({"a": {1.0, 2.0}}, "set .* as 'a'"),
    ({"a": [[1.0, 2.0], [1.0]]}, "list .1.0, 2.0. as 'a' of sample 0"), (None, "NoneType None: return a dict"),
    ([1.0] * 3, "list .* as 'reward' of 2 samples, a list of 3"), (3.0, "float 3.0: return a dict"),
    ("ab", "str 'ab'")])
def test_metrics_that_mean_nothing_are_one_line(metrics, line):
    with pytest.raises(UserError, match=f"^the metric function returned {line}"):
        check_metrics(metrics, 2)


def test_a_metric_may_have_no_value_and_may_come_late(model_path, tmp_path):
    """NaN and infinity are logged as they are; a metric that was not there at the start is shown at the end."""
    names = iter("abcdef")
    args = ppo.Args(model=model_path("gpt2"), output_dir=f"{tmp_path}/run", **TINY)
    ppo.train(args, lambda samples: [0.0] * len(samples), prompts=["a", "b"],
              metric_fn=lambda samples: {"nan": [math.nan, 1.0], "inf": math.inf, next(names): 2.0})
    first, last = (json.loads(line) for line in open(f"{tmp_path}/run/metrics.jsonl"))
    for row in (first, last):
        assert math.isnan(row["eval/nan"]) and row["eval/inf"] == math.inf
    assert first["eval/a"] == last["eval/b"] == 2.0


# --- arguments --------------------------------------------------------------------------------------------------------


def test_functions_change_copies(model_path, tmp_path):
    """What a function does to its arguments changes nothing, nor does what it does to the tokenizer."""
    def tidy(samples, prompts, outputs, output_ids, tokenizer, words, notes):
        assert all(words == [3, 1, 2] and notes == {"x": {"y": 1}} for words, notes in zip(words, notes))
        return [[float(token % 5) for token in ids] for ids in output_ids]

    def untidy(samples, prompts, outputs, output_ids, tokenizer, words, notes):
        scores = tidy(samples, prompts, outputs, output_ids, tokenizer, words, notes)
        for row, note, ids in zip(words, notes, output_ids):
            row.sort()
            note["x"].clear()
            ids.reverse()
            ids.append(7)
        for column in (samples, prompts, outputs, output_ids, words, notes):
            column.clear()
        tokenizer.add_tokens(["<new>"])
        return scores

    prompts, found = [{"prompt": text, "words": [3, 1, 2], "notes": {"x": {"y": 1}}} for text in ("ab", "c", "de")], []
    given = copy.deepcopy(prompts)
    for function in (tidy, untidy):
        args = ppo.Args(model=model_path("gpt2"), output_dir=f"{tmp_path}/{function.__name__}", eval_samples=2,
                        **{**TINY, "total_episodes": 16})
        _, tokenizer = ppo.train(args, function, prompts, metric_fn=lambda **columns: {"n": [
            each for each in function(**columns) and [1.0] * 4]})
        assert prompts == given and len(tokenizer) == len(char_tokenizer())
        rows = [json.loads(line) for line in open(f"{tmp_path}/{function.__name__}/metrics.jsonl")]
        found.append([{name: value for name, value in row.items() if "perf/" not in name and name != "seconds"}
                      for row in rows])
    assert found[0] == found[1]


def test_each_sample_has_a_copy_of_its_own():
    """Evaluation repeats rows, and rollouts may: what a function takes from the one sample, the other still has."""
    rows = [{"prompt": "a", "numbers": [5.0, 3.0]}] * 4
    assert asked(lambda numbers: [each.pop() for each in numbers], rows=rows) == [3.0] * 4


def test_what_cannot_be_copied_is_passed_on():
    handle = open(os.devnull)
    rows = [{**row, "file": handle} for row in ROWS]
    assert asked(lambda file: [float(each is handle) for each in file], rows=rows) == [1.0] * 4


# --- time -------------------------------------------------------------------------------------------------------------


def ended(tmp_path, function, timeout, kind="reward") -> tuple[int, str]:
    """Exit code and what was printed of a child of this process that calls the function; killed after 20 seconds."""
    begun, path = time.monotonic(), tmp_path / "stderr"
    child = os.fork()
    if not child:
        with open(path, "w") as file:
            os.dup2(file.fileno(), 2)
        sys.__stderr__ = os.fdopen(2, "w")
        try:
            asked(function, kind, timeout)
        finally:
            os._exit(99)
    while not (found := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() - begun > 20:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
    return os.waitstatus_to_exitcode(found[1]), path.read_text()


def spins(number):
    while True:
        try:
            time.sleep(0)
        except BaseException:
            continue


def sleeps(number):
    time.sleep(60)


def listens(number):
    one, other = socket.socketpair()
    one.recv(1)


def drips(number):
    while True:
        yield 1.0
        time.sleep(0.01)


@pytest.mark.parametrize("function", [spins, sleeps, listens, drips])
def test_a_function_that_hangs_meets_its_time_limit(function, tmp_path):
    for kind in ("reward", "metric") if function is sleeps else ("reward",):
        code, text = ended(tmp_path, function, 0.3, kind)
        *stack, line = text.splitlines()
        assert code == 2, text
        assert f"error: the {kind} function {function.__name__} has not returned after 0.3 seconds, for a batch" in line
        assert "--reward-timeout" in line and stack[0].startswith("Stack") and f"in {function.__name__}" in stack[1]


def test_c_code_that_holds_the_interpreter_meets_it_too(tmp_path, monkeypatch):
    monkeypatch.setattr(common.functions, "GRACE_SECONDS", 0.3)
    code, text = ended(tmp_path, lambda number: re.match("(a+)+$", "a" * 60 + "b"), 0.3)
    assert code == 1 and "Timeout" in text and "test_user_functions.py" in text


def test_a_search_that_hangs_does_not(tmp_path, monkeypatch):
    monkeypatch.setattr(common.functions, "SEARCH_SECONDS", 0.1)
    code, text = ended(tmp_path, lambda number: inverse(0.0) if len(number) > 1 else time.sleep(60), None)
    assert code == 2 and "Stack" not in text
    assert text.splitlines()[-1].endswith("failed on a batch of 4 samples: ZeroDivisionError: float division by zero")


def test_a_time_limit_that_is_kept_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(common.functions, "GRACE_SECONDS", 0.1)

    def quick(number):
        time.sleep(0.1)
        return number

    def then_waits(number):
        for _ in range(3):
            assert asked(quick, timeout=1.5) == [0.0, 1.0, 2.0, 3.0]
        time.sleep(2.0)
        os._exit(0)

    assert ended(tmp_path, then_waits, None)[0] == 0
    assert asked(quick, timeout=1e15) == [0.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize("script,data", [
    (sft, ["ab c", "de f"]), (ilql, [["a", "b"], ["c", "d"]]),
    (dpo, [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "d", "chosen": "b", "rejected": "c"}])])
def test_every_script_passes_its_time_limit_on(script, data, model_path, tmp_path, monkeypatch):
    class Seen(Exception):
        pass

    def evaluate_samples(*_, reward_timeout, **__):
        assert reward_timeout == 7.5
        raise Seen

    more = dict(rewards=[1.0, 0.0]) if script is ilql else {}
    args = dict(model=model_path("gpt2"), output_dir=f"{tmp_path}/run", max_length=32, max_new_tokens=4)
    monkeypatch.setattr(script, "evaluate_samples", evaluate_samples)
    with pytest.raises(Seen):
        script.train(script.Args(reward_timeout=7.5, **args), data, eval_prompts=["a"], metric_fn=len, **more)
    with pytest.raises(UserError, match="^--reward-timeout 0[.]0: must be more than 0"):
        script.train(script.Args(reward_timeout=0.0))


def test_a_time_limit_may_change_on_resume():
    assert all("reward_timeout" in script.RESUMABLE for script in (ppo, sft, ilql, dpo))
    with pytest.raises(UserError, match="^--reward-timeout -1"):
        ppo.train(ppo.arguments(reward_timeout=-1))


# --- processes --------------------------------------------------------------------------------------------------------

USERS = '''
import os, time

def inverse(number):
    return 1 / number

def fails_on_1(outputs, number):
    return [inverse(0 if each == 1 and os.environ.get("RANK", "1") == "1" else 1) for each in number]

def hangs(outputs):
    while True:
        time.sleep(1)
'''


@pytest.fixture(scope="module")
def flags(model_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("users")
    (folder / "users.py").write_text(USERS)
    rows = [{"prompt": text, "number": number} for number, text in enumerate(("ab", "c", "de", "xyz"))]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = dict(TINY, num_eval_prompts=4, model=model_path("gpt2"), prompts=f"{folder}/prompts.jsonl")
    return folder, [word for name, value in words.items() for word in (f"--{name.replace('_', '-')}", str(value))]


@pytest.mark.parametrize("processes", [0, 2])
def test_a_function_that_fails_ends_the_run(processes, flags, tmp_path):
    """On one of two processes, which ends the other, too: without a word, and the line stands last."""
    folder, words = flags
    done = run_script("ppo.py", *words, "--reward", f"{folder}/users.py:fails_on_1", "--output-dir", f"{tmp_path}/run",
                      processes=processes)
    said = re.split(r"\n[WE]\d{4} ", done.stderr)[0]  # what follows is torchrun's
    *above, line = said.strip().splitlines()
    rank, place = ("[rank 1] ", "on rank 1 failed on sample 0 of 2") if processes else ("", "failed on sample 1 of 4")
    assert line.startswith(f"{rank}ppo.py: error: the reward function fails_on_1 {place}, prompt 'c', output '")
    assert line.endswith(": ZeroDivisionError: division by zero"), done.stderr
    shown = "\n".join(above)
    assert set(re.findall('File "(.*?)"', shown)) == {f"{folder}/users.py"} and "in fails_on_1" in shown, shown
    assert "Connection closed" not in done.stderr and "common/" not in done.stderr
    assert done.returncode == 2 if not processes else (done.returncode and "exitcode  : 2" in done.stderr)


def test_a_function_that_hangs_on_rank_0_ends_all(flags, tmp_path):
    folder, words = flags
    done = run_script("ppo.py", *words, "--reward", f"{folder}/users.py:hangs", "--reward-on", "rank0", "--output-dir",
                      f"{tmp_path}/run", "--reward-timeout", "1.5", processes=2)
    assert "ppo.py: error: the reward function hangs on rank 0 has not returned after 1.5 seconds" in done.stderr
    assert "in hangs" in done.stderr and "common/" not in done.stderr and "exitcode  : 2" in done.stderr
    assert done.returncode


PATIENCE = '''
import datetime, os, sys, time
sys.path[:0] = ["{tests}", "{tests}/.."]
import torch, torch.distributed as dist
torch.set_num_threads(1)
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=3))
from conftest import char_tokenizer, tiny_lm
import ppo
from common.distributed import init
from common.generation import evaluate_samples
from common.models import LanguageModel, LogitRules, prepare
init(0)
model = prepare(LanguageModel(tiny_lm("gpt2")), torch.float32, torch.device("cpu"))

def slow(samples):
    if dist.get_rank() == 0:
        time.sleep(5)
    return [1.0] * len(samples)

items = [dict(sample="ab", prompt="a", output="b", tokens=[5])] * 3
for reward_on in ("all", "rank0"):
    assert ppo.compute_scores(slow, items, [dict(prompt="a")] * 3, None, ppo.Args(reward_on=reward_on)) == [1.0] * 3
rows = [dict(prompt="a")] * 2
metrics, _ = evaluate_samples(model, char_tokenizer(), [[5], [6]], rows, LogitRules(), slow, repeats=1, seed=0,
                              max_new_tokens=2, options=dict(temperature=[1.0]), batch_size=2)
assert metrics["eval/reward"] == 1.0
dist.barrier()
print("DONE", flush=True)
os._exit(0)
'''


def test_ranks_wait_for_a_slow_function_longer_than_for_each_other(tmp_path):
    """Collectives give up after the group's timeout, here three seconds; a function may take longer."""
    (tmp_path / "patience.py").write_text(PATIENCE.replace("{tests}", os.path.dirname(__file__)))
    done = run_forked(f"{tmp_path}/patience.py", processes=2)
    assert done.stdout.count("DONE") == 2, done.stderr
