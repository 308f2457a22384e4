"""Tiny random models of every kind of architecture, tokenizers made here, and scripts run as a user runs them."""

import copy
import functools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import HealthCheck, settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)

from common.distributed import init  # noqa: E402

# Property tests: a short slice, the same each time; all cases, other ones each time, with PLAINRL_LONG=1
LONG = os.environ.get("PLAINRL_LONG") == "1"
settings.register_profile("short", max_examples=25, derandomize=True)
settings.register_profile("long", max_examples=600, print_blob=True)
settings.register_profile("all", settings.get_profile("long" if LONG else "short"), deadline=None, database=None,
                          suppress_health_check=list(HealthCheck))
settings.load_profile("all")

VOCABULARY = 61
IDS = dict(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, pad_token_id=0)
LLAMA = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
             max_position_embeddings=64, **IDS)
_T5 = dict(d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4, decoder_start_token_id=0, vocab_size=VOCABULARY,
           eos_token_id=2, pad_token_id=0)
CONFIGS = {
    "gpt2": transformers.GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=64, **IDS),
    "gpt_neox": transformers.GPTNeoXConfig(**LLAMA),
    "opt": transformers.OPTConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, ffn_dim=64,
                                  max_position_embeddings=64, word_embed_proj_dim=16, **IDS),
    "llama": transformers.LlamaConfig(num_key_value_heads=2, **LLAMA),
    "mixtral": transformers.MixtralConfig(num_key_value_heads=2, num_local_experts=4, **LLAMA),
    "qwen3": transformers.Qwen3Config(num_key_value_heads=2, head_dim=8, **LLAMA),
    "gemma2": transformers.Gemma2Config(num_key_value_heads=2, head_dim=8, sliding_window=4, **LLAMA),
    "gemma3": transformers.Gemma3TextConfig(num_key_value_heads=2, head_dim=8, sliding_window=4, **LLAMA),
    "bloom": transformers.BloomConfig(hidden_size=32, n_layer=3, n_head=4, **IDS),
    "t5": transformers.T5Config(**_T5),
    "t5_v1_1": transformers.T5Config(tie_word_embeddings=False, feed_forward_proj="gated-gelu", **_T5),
    "bart": transformers.BartConfig(d_model=32, encoder_layers=3, decoder_layers=3, encoder_attention_heads=4,
                                    decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64,
                                    max_position_embeddings=64, decoder_start_token_id=2, forced_eos_token_id=None,
                                    **IDS),
}
ARCHITECTURES = [name for name in CONFIGS if name != "mixtral"]  # whose experts are no linear layers


def tiny_lm(architecture: str, seed: int = 0):
    """A random LM of 3 layers, width 32 and 61 tokens, its weights large enough that outputs differ between inputs."""
    config = copy.deepcopy(CONFIGS[architecture])
    torch.manual_seed(seed)
    auto = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    lm = auto.from_config(config).eval()
    for parameter in lm.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.15)
    return lm


def char_tokenizer(bos: bool = True):
    """A character tokenizer with 61 entries and distinct <pad>, <bos> and <eos> (ids 0, 1, 2)."""
    letters = " abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,!|\n"[: VOCABULARY - 3]
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(["<pad>", "<bos>", "<eos>", *letters])},
                                      unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>",
                                                **({"bos_token": "<bos>"} if bos else {}))


def bpe_tokenizer(texts: list[str], size: int = 60):
    """A small byte-level BPE tokenizer as GPT-2's: its end token is its BOS, and it has no pad token."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, special_tokens=["<|endoftext|>"]))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<|endoftext|>",
                                                eos_token="<|endoftext|>")


@pytest.fixture(scope="session", autouse=True)
def process_group():
    """The group of one process that a script without torchrun has."""
    return init(0)


@pytest.fixture(scope="session")
def model_path(tmp_path_factory):
    """A function from an architecture to a folder with a tiny model of it and a character tokenizer."""
    made = {}

    def path(architecture: str) -> str:
        if architecture not in made:
            folder = str(tmp_path_factory.mktemp(architecture))
            tiny_lm(architecture).save_pretrained(folder)
            char_tokenizer().save_pretrained(folder)
            made[architecture] = folder
        return made[architecture]

    return path


def environment_of(given: dict[str, str]) -> dict[str, str]:
    """One thread, offline, a terminal of 100 columns, and what is given; nothing that wandb has left in this process's
    own environment, such as the address of a service that is no more."""
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH" and not name.startswith("WANDB_")}
    return {**own, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "100", **given}


def run_script(*words: str, processes: int = 0, cwd=ROOT, timeout: int = 300, **environment):
    """Run `python WORDS`, or `torchrun --nproc_per_node PROCESSES WORDS`, one thread each, offline."""
    launcher = [sys.executable]
    if processes:
        launcher += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--rdzv-backend", "c10d",
                     "--rdzv-endpoint", "localhost:0"]
    return subprocess.run([*launcher, *words], cwd=cwd, env=environment_of(environment), capture_output=True,
                          text=True, timeout=timeout)


@functools.cache
def server() -> subprocess.Popen:
    """The process that scripts are forked from; it ends with this one."""
    return subprocess.Popen([sys.executable, "tests/forked.py", str(ROOT)], cwd=ROOT, env=environment_of({}),
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def run_forked(*words: str, processes: int = 0, cwd=ROOT, timeout: int = 300, **environment):
    """As `run_script`, for scripts, without the seconds that imports take: see tests/forked.py."""
    with tempfile.TemporaryDirectory() as folder:
        output = [Path(folder, "stdout"), Path(folder, "stderr")]
        for path in output:
            path.touch()
        job = dict(words=words, processes=processes, cwd=str(cwd), environment=environment_of(environment),
                   output=[*map(str, output)])
        print(json.dumps(job), file=server().stdin, flush=True)
        child = int(server().stdout.readline())
        late = threading.Timer(timeout, os.killpg, (child, signal.SIGKILL))
        late.start()
        code = int(server().stdout.readline())
        late.cancel()
        return subprocess.CompletedProcess(words, code, *(path.read_text() for path in output))


def documented_metrics(script: str) -> set[str]:
    """The metrics in the table of the page of `script`, under its heading "What it logs"."""
    page = (ROOT / "docs" / script.replace(".py", ".md")).read_text()
    section = page.split("\n## What it logs\n")[1].split("\n## ")[0]
    cells = re.findall(r"^\| (`.*?`) \|", section, re.M)
    return {name for cell in cells for name in re.findall(r"`([a-z_/0-9]+)`", cell)}
