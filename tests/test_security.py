"""What comes from others is data: weights, model folders, chat templates, settings and checkpoints run nothing. And
what is the user's own, tokens and environment, stays out of the run directory."""

import ast
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from conftest import ROOT, char_tokenizer, run_forked, tiny_lm

import dpo
import ilql
import ppo
import sft
from common import cli
from common.cli import UserError
from common.data import encode_prompts
from common.models import load_classifier, load_config, load_lm, load_tokenizer


class Payload:
    """Makes a file where it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A path that must not come to be, whatever is read. Who asks on the terminal gets a yes."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    yield tmp_path / "ran"
    assert not (tmp_path / "ran").exists(), "what was read has run"


def classifier():
    return transformers.GPT2ForSequenceClassification(transformers.GPT2Config(
        n_embd=16, n_layer=1, n_head=2, n_positions=32, vocab_size=61, num_labels=1, pad_token_id=0))


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bin", "shards", "plain pickle"])
def test_a_pickle_in_a_weight_file_does_not_run(kind, trap, tmp_path):
    for model, load in ((tiny_lm("gpt2"), load_lm), (tiny_lm("t5"), load_lm),
                        (classifier(), lambda path: load_classifier(path, "--model", "cpu", 2))):
        folder = tmp_path / type(model).__name__
        model.save_pretrained(folder)
        char_tokenizer().save_pretrained(folder)
        (folder / "model.safetensors").unlink()
        name = "pytorch_model-00001-of-00001.bin" if kind == "shards" else "pytorch_model.bin"
        if kind == "shards":
            index = {"metadata": {}, "weight_map": dict.fromkeys(model.state_dict(), name)}
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        if kind == "plain pickle":
            (folder / name).write_bytes(pickle.dumps(Payload(trap)))
        else:
            torch.save({**model.state_dict(), "more": Payload(trap)}, folder / name)
        with pytest.raises(UserError, match="^--model .*pickle of more than tensors, which is not read.*safetensors$"):
            load(str(folder))
    with pytest.raises(FileExistsError):  # the trap works
        trap.mkdir()
        pickle.loads(pickle.dumps(Payload(trap)))
    trap.rmdir()


def test_old_weight_files_of_tensors_alone_are_read(tmp_path):
    lm = tiny_lm("gpt2")
    lm.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(lm.state_dict(), tmp_path / "pytorch_model.bin")
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(load_lm(str(tmp_path))(ids).logits, lm(ids).logits)


# --- code in a model's folder -----------------------------------------------------------------------------------------


def with_code(folder: Path, trap: Path, model_type: str) -> str:
    """A model folder whose config, tokenizer and model are said to be classes of a file in it."""
    tiny_lm("gpt2").save_pretrained(folder)
    char_tokenizer().save_pretrained(folder)
    (folder / "mine.py").write_text(f"import os\nos.mkdir({str(trap)!r})\n"
                                    "from transformers import GPT2Config as C, GPT2LMHeadModel as M\n"
                                    "from transformers import PreTrainedTokenizerFast as T\n")
    for name, found in (("config.json", {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M",
                                         "AutoModelForSequenceClassification": "mine.M"}),
                        ("tokenizer_config.json", {"AutoTokenizer": ["mine.T", "mine.T"]})):
        settings = json.loads((folder / name).read_text()) | {"auto_map": found}
        if name == "config.json":
            settings |= {"model_type": model_type, "architectures": ["MineForSequenceClassification"]}
        else:
            settings["tokenizer_class"] = "T"
        (folder / name).write_text(json.dumps(settings))
    return str(folder)


@pytest.mark.parametrize("model_type", ["gpt2", "mine"])
def test_code_in_a_model_folder_does_not_run(model_type, trap, tmp_path):
    """Where transformers has the architecture it is left aside, else the folder is refused: nobody is asked."""
    path = with_code(tmp_path / "model", trap, model_type)
    for load in (load_lm, load_config, lambda path: load_classifier(path, "--model", "cpu", 2), load_tokenizer):
        try:
            load(path)
        except UserError as error:
            assert model_type == "mine" or load is not load_lm
            assert str(error).count("custom code") or model_type == "gpt2"
        else:
            assert model_type == "gpt2"


def test_a_script_refuses_code_in_one_line(trap, tmp_path):
    path = with_code(tmp_path / "model", trap, "mine")
    (tmp_path / "rows.jsonl").write_text('{"text": "ab"}\n')
    done = run_forked(f"{ROOT}/sft.py", "--model", path, "--dataset", "rows.jsonl", cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]  # transformers may warn of the type before
    assert line.startswith("sft.py: error: --model") and "custom code" in line


@pytest.mark.parametrize("template", [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ cycler.__init__.__globals__.os.mkdir('PATH') }}",
    "{{ messages.append(messages[0]) }}", "{% include 'PATH' %}", "{{ self.__init__.__globals__ }}"])
def test_a_chat_template_cannot_reach_beyond_its_messages(template, trap):
    """It is a program of the model's maker, in transformers' sandbox; what it tries is refused in one line."""
    tokenizer = char_tokenizer()
    tokenizer.chat_template = template.replace("PATH", str(trap))
    rows = [{"prompt": [{"role": "user", "content": "a"}]}]
    with pytest.raises(UserError, match="^the tokenizer's chat template refuses list "):
        encode_prompts(rows, tokenizer, 9, "left", False)
    assert rows == [{"prompt": [{"role": "user", "content": "a"}]}]


# --- settings and checkpoints -----------------------------------------------------------------------------------------


def test_yaml_makes_no_objects(trap, tmp_path):
    for text in (f"model: !!python/object/apply:os.mkdir ['{trap}']", f"!!python/object/apply:os.mkdir ['{trap}']"):
        (tmp_path / "run.yaml").write_text(text)
        with pytest.raises(UserError, match="--config .*run.yaml: not valid YAML: .*could not determine a constructor"):
            cli.parse(ppo.Args, ppo.preset, ["--config", f"{tmp_path}/run.yaml"])


def files_of(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def test_a_checkpoint_is_read_as_tensors_and_json(trap, model_path, tmp_path):
    """Not even the pickle that torch's own checkpoints have beside them, were one put there."""
    flags = dict(model=model_path("gpt2"), output_dir=f"{tmp_path}/run", save_every=1, batch_size=1, max_length=16,
                 num_eval_prompts=0)
    sft.train(sft.Args(max_steps=1, **flags), samples=["abc", "defg", "hij"])
    folder = tmp_path / "run" / "checkpoints" / "step-1"
    written = {path.suffix for path in files_of(tmp_path / "run")}
    assert written <= {".safetensors", ".json", ".jsonl", ".yaml", ".jinja", ""}  # the last of the lock
    assert {path.suffix for path in files_of(folder)} == {".safetensors", ".json"}
    for name in (".metadata", "optimizer.pt", "random-0.pkl", "__0_0.distcp"):
        (folder / name).write_bytes(pickle.dumps(Payload(trap)))
    sft.train(sft.Args(max_steps=2, resume="auto", **flags), samples=["abc", "defg", "hij"])
    assert (tmp_path / "run" / "checkpoints" / "step-2").exists()


# --- what the user keeps to herself -----------------------------------------------------------------------------------

SECRETS = {"HF_TOKEN": "hf_SecretSecretSecretSecretSecret", "WANDB_API_KEY": "f00dfeedf00dfeedf00dfeedf00dfeedf00dfeed",
           "OPENAI_API_KEY": "sk-SecretSecretSecret", "SOME_SETTING": "a-value-of-the-environment"}


def assert_no_secrets(folder: Path):
    found = files_of(folder)
    assert len(found) > 5
    for path in found:
        content = path.read_bytes()
        for secret in SECRETS.values():
            assert secret.encode() not in content, f"{path} has {secret}"


@pytest.mark.parametrize("script,given", [
    (sft, ["ab", "cd", "ef"]), (dpo, [dict(prompt="a", chosen=c, rejected="d") for c in "abc"]),
    (ilql, [dict(text="ab", reward=1), dict(text="cd", reward=2)]), (ppo, ["a", "b"]),
], ids=["sft", "dpo", "ilql", "ppo"])
def test_a_run_directory_has_no_secrets(script, given, model_path, tmp_path, monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    sizes = dict(total_episodes=2, rollout_batch_size=2) if script is ppo else {}
    task = dict(prompts=given, reward_fn=lambda samples: [1.0] * len(samples)) if script is ppo else {
        "pairs" if script is dpo else "samples": given}
    script.train(script.Args(model=model_path("gpt2"), output_dir=f"{tmp_path}/run", save_every=1, max_steps=1,
                             batch_size=2, max_length=16, max_new_tokens=4, num_eval_prompts=2, **sizes), **task)
    assert_no_secrets(tmp_path / "run")


def test_a_tracked_run_has_no_secrets_either(model_path, tmp_path):
    """Weights and Biases, offline, writes files of its own into the run directory."""
    (tmp_path / "rows.jsonl").write_text('{"text": "ab"}\n{"text": "cd"}\n')
    done = run_forked(f"{ROOT}/sft.py", "--model", model_path("gpt2"), "--dataset", "rows.jsonl", "--max-length", "16",
                      "--max-steps", "1", "--max-new-tokens", "4", "--output-dir", "run", "--track", cwd=tmp_path,
                      WANDB_MODE="offline", **SECRETS)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "run" / "wandb").rglob("*.wandb"))
    assert_no_secrets(tmp_path / "run")


# --- the source -------------------------------------------------------------------------------------------------------

SOURCES = [path for path in sorted(ROOT.rglob("*.py"))
           if not {".venv", "runs", "wandb", ".peers"} & set(path.relative_to(ROOT).parts)]


def calls_of(path: Path):
    """Each call in a file: its name, as written, and its named arguments, as written."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}, node


def test_nothing_reads_a_pickle_or_runs_a_text():
    """In the scripts, tests, benchmarks and examples: torch.load reads tensors, YAML is safe, nothing is evaluated."""
    assert len(SOURCES) > 20
    forbidden = {"eval", "exec", "pickle.load", "pickle.Unpickler", "yaml.load", "yaml.unsafe_load", "yaml.full_load",
                 "os.system", "os.popen", "joblib.load", "dill.load", "dill.loads", "cloudpickle.loads",
                 "marshal.loads"}
    for path in SOURCES:
        for name, named, node in calls_of(path):
            where = f"{path}:{node.lineno}: {name}"
            assert name not in forbidden, where
            assert name != "pickle.loads" or path.name == "test_security.py", where
            assert name != "torch.load" or named.get("weights_only") == "True", where
            assert named.get("allow_pickle", "False") == "False" and named.get("shell", "False") == "False", where
            assert named.get("trust_remote_code", "False") == "False", where
            assert named.get("weights_only", "True") == "True", where


def test_models_are_loaded_without_their_code():
    """All that the scripts load: transformers would otherwise ask on the terminal, and a script may have one."""
    seen = 0
    for path in [*ROOT.glob("*.py"), *(ROOT / "common").glob("*.py")]:
        for name, _, node in calls_of(path):
            loads = name.endswith((".from_pretrained", ".from_config")) and name != "GenerationConfig.from_pretrained"
            if loads or name == "pipeline":
                assert "**NO_CODE" in ast.unparse(node), f"{path}:{node.lineno}"
                seen += 1
    assert seen >= 7


def test_what_is_written_can_be_read_safely(model_path, tmp_path):
    """args.yaml holds plain values, whatever letters the flags have."""
    args = sft.Args(model=model_path("gpt2"), output_dir=f"{tmp_path}/grüße 🙂", max_steps=1, num_eval_prompts=0,
                    max_length=16, stop=["\n", "é", "a: b"])
    sft.train(args, samples=["ab", "cd"])
    settings = yaml.safe_load((tmp_path / "grüße 🙂" / "args.yaml").read_text(encoding="utf-8"))
    assert settings["stop"] == args.stop and settings["output_dir"] == args.output_dir
    shutil.rmtree(args.output_dir)
