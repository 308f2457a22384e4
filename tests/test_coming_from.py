"""docs/coming-from.md: its flags exist, what trlX and TRL call a setting is in it, each once, and its examples run."""

import importlib
import re
import runpy
import shlex

import pytest
import yaml
from conftest import ROOT, char_tokenizer, tiny_lm
from test_repository import args_of

from common.cli import parse

TEXT = (ROOT / "docs" / "coming-from.md").read_text()
TRLX, TRL = TEXT.split("\n## From trlX\n")[1].split("\n## From TRL\n")
# every name that trlX (3340c2f) has, by the heading that its rows stand under
TRLX_NAMES = {
    "trlx.train": """model_path reward_fn samples dataset rewards prompts eval_prompts metric_fn config
        stop_sequences""",
    "TrainConfig": """total_steps seq_length epochs batch_size minibatch_size checkpoint_interval eval_interval pipeline
        trainer trainer_kwargs project_name run_name entity_name group_name checkpoint_dir rollout_logging_dir save_best
        save_optimizer resume_from_checkpoint tracker logging_dir tags seed model_arch_type num_layers_unfrozen
        peft_config model_extra_configs tokenizer_path padding_side truncation_side tokenizer_extra_configs
        optimizer.name optimizer.kwargs scheduler.name scheduler.kwargs""",
    "PPOConfig": """ppo_epochs num_rollouts chunk_size init_kl_coef target horizon gamma lam cliprange cliprange_value
        vf_coef scale_reward ref_mean ref_std cliprange_reward gen_kwargs gen_experience_kwargs
        num_value_layers_unfrozen""",
    "ILQLConfig": "tau gamma cql_scale awac_scale alpha beta steps_for_target_q_sync two_qs gen_kwargs",
    "SFTConfig": "gen_kwargs start_percentile end_percentile n_improve_steps n_generations_per_prompt",
}
# every name that TRL (1.16.0, PPO 1.12.0) adds to transformers' TrainingArguments, and those of these that are used
TRL_NAMES = {
    "TrainingArguments": """output_dir per_device_train_batch_size gradient_accumulation_steps learning_rate
        lr_scheduler_type lr_scheduler_kwargs warmup_steps num_train_epochs max_steps bf16 fp16 gradient_checkpointing
        save_strategy save_steps save_total_limit eval_strategy eval_steps logging_steps report_to run_name seed
        resume_from_checkpoint fsdp deepspeed optim max_grad_norm weight_decay adam_beta1 adam_beta2 adam_epsilon
        use_liger_kernel torch_empty_cache_steps push_to_hub model_name_or_path model_revision dtype
        attn_implementation use_peft lora_r lora_alpha lora_dropout lora_target_modules lora_target_parameters
        lora_modules_to_save lora_task_type use_rslora use_dora load_in_8bit load_in_4bit bnb_4bit_quant_type
        use_bnb_nested_quant bnb_4bit_quant_storage dataset_name dataset_config dataset_train_split dataset_test_split
        dataset_streaming ignore_bias_buffers datasets streaming test_split_size model_init_kwargs trust_remote_code""",
    "SFTConfig": """router_aux_loss_coef chat_template_path dataset_text_field dataset_kwargs dataset_num_proc eos_token
        max_length truncation_mode shuffle_dataset packing packing_strategy padding_free pad_to_multiple_of eval_packing
        completion_only_loss assistant_only_loss loss_type activation_offloading pad_token train_dataset eval_dataset
        formatting_func""",
    "DPOConfig": """router_aux_loss_coef disable_dropout dataset_num_proc max_length truncation_mode padding_free
        pad_to_multiple_of precompute_ref_log_probs precompute_ref_batch_size loss_type loss_weights ld_alpha
        f_divergence_type f_alpha_divergence_coef label_smoothing beta use_weighting discopop_tau activation_offloading
        sync_ref_model ref_model_mixup_alpha ref_model_sync_steps pad_token ref_model train_dataset eval_dataset""",
    "PPOConfig": """dataset_num_proc num_mini_batches total_episodes local_rollout_forward_batch_size
        num_sample_generations response_length stop_token stop_token_id temperature missing_eos_penalty sft_model_path
        world_size num_total_batches micro_batch_size local_batch_size batch_size local_mini_batch_size mini_batch_size
        push_to_hub reward_model_path model_adapter_name ref_adapter_name num_ppo_epochs whiten_rewards kl_coef
        kl_estimator cliprange vf_coef cliprange_value gamma lam ds3_gather_for_generation ref_model reward_model
        value_model train_dataset eval_dataset""",
}
# what makes the examples small, by the names of their arguments
SMALL = dict(total_episodes=4, rollout_batch_size=4, batch_size=4, ppo_epochs=1, num_layers_unfrozen=1, epochs=1,
             max_length=64, max_new_tokens=4)


def sections(text: str) -> dict[str, tuple[list[str], list[list[str]]]]:
    """For each heading its first name: the scripts that it names, and the cells of the rows below it."""
    found = {}
    for part in text.split("\n### ")[1:]:
        heading, *lines = part.splitlines()
        name, scripts = re.fullmatch(r"`?([\w.]+)`?.* \((.*)\)", heading).groups()
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
        assert name not in found and all(len(row) == 3 for row in rows), f"{heading}: each row has three cells"
        found[name] = scripts.split(", "), rows[2:]
    return found


def names(cell: str) -> list[str]:
    """The names in a cell of the first column: without what follows them, such as the arguments of a function."""
    return re.findall(r"`([\w.]+)", cell)


def flags(cell: str, scripts: list[str]) -> list[tuple[str, str, str | None]]:
    """The flags of a cell, each with the script it is of and the value behind it, if there is one."""
    found = []
    for span in re.findall(r"`([^`]*)`", cell):
        own = re.match(r"(\w+\.py) ", span)
        for flag, value in re.findall(r"(--[a-z0-9-]+)(?: ([^-\s]\S*))?", span):
            found += [(script, flag, value or None) for script in ([own[1]] if own else scripts)]
    return found


@pytest.mark.parametrize("text, given", [(TRLX, TRLX_NAMES), (TRL, TRL_NAMES)], ids=["trlX", "TRL"])
def test_each_of_their_names_has_its_row(text, given):
    found = sections(text)
    assert set(found) == set(given)
    for heading, (_, rows) in found.items():
        theirs = [name for row in rows for name in names(row[0])]
        assert not (missing := set(given[heading].split()) - set(theirs)), f"{heading}: {sorted(missing)} are not there"
        again = {name for name in theirs if theirs.count(name) > 1} - {"loss_type"}  # which has a row for each value
        assert not again, f"{heading}: {sorted(again)} are there twice"
        assert len({row[0] for row in rows}) == len(rows), f"{heading}: a row is there twice"
        assert all(row[0] and row[1] for row in rows), f"{heading}: a row has an empty cell"


def test_our_flags_exist():
    """Of the scripts in the heading, or of the one that stands before a flag; and so do the values given as words."""
    known = {path.name: args_of(path.name) for path in ROOT.glob("*.py")}
    count = 0
    for heading, (scripts, rows) in [*sections(TRLX).items(), *sections(TRL).items()]:
        for row in rows:
            for script, flag, value in flags(row[1], scripts) + flags(row[2], scripts):
                count += 1
                name = flag[2:].replace("-", "_")
                kind = known[script].get(name) or known[script].get(name.removeprefix("no_"))
                assert kind and (name in known[script] or kind[0] == "bool"), f"{heading}: {script} has no {flag}"
                if value and kind[0].startswith("Literal"):
                    assert f"'{value}'" in kind[0], f"{heading}: {script} {flag} is not {value}"
    assert count > 300  # a table that is read wrongly has none


def test_our_defaults_are_those_told():
    """A last cell that begins with a number tells the default of its row's first flag, unless it is SFT's alone."""
    count = 0
    for heading, (scripts, rows) in [*sections(TRLX).items(), *sections(TRL).items()]:
        for _, ours, more in rows:
            told = re.match(r"(-?\d[\d.]*(?:e-\d+)?)(?:$|[ ,;](?!in SFT))", more)
            for script, flag, _ in flags(ours, scripts)[: len(scripts) if told else 0]:
                count += 1
                default = getattr(importlib.import_module(script[:-3]).Args(), flag[2:].replace("-", "_"))
                assert float(told[1]) == default, f"{heading}: {script} {flag} is {default}"
    assert count > 20


def test_commands_parse():
    """Each command of a code block, by the script's own parser."""
    commands = re.findall(r"^(?:python|torchrun) .*?\b(\w+)\.py (.*)$", TEXT.replace("\\\n", " "), re.M)
    assert len(commands) == 4
    for script, words in commands:
        module = importlib.import_module(script)
        module.check(parse(module.Args, module.preset, shlex.split(words)))


EXAMPLES = re.findall(r"```python\n# PlainRL\n(.*?)```", TEXT, re.S)


@pytest.mark.parametrize("code", EXAMPLES, ids=["trlX online", "trlX offline", "TRL"])
def test_our_examples_run(code, tmp_path, monkeypatch):
    """As they stand, but with a tiny model of the same kind, and fewer and smaller steps."""
    monkeypatch.chdir(tmp_path)
    tiny_lm("gpt2").save_pretrained("gpt2")
    char_tokenizer().save_pretrained("gpt2")
    for name, value in SMALL.items():
        code = re.sub(rf"\b{name}=\d+", f"{name}={value}", code)
    (tmp_path / "example.py").write_text(code)
    made = runpy.run_path("example.py")
    runs = sorted(path.parent for path in tmp_path.glob("**/args.yaml"))
    trained = {name for name in ("ppo", "ilql", "sft", "dpo") if name in made}
    assert len(runs) == len(trained) > 0
    for run in runs:
        assert (run / "model" / "model.safetensors").exists()
        assert yaml.safe_load((run / "args.yaml").read_text())["model"] == "gpt2"
    for folder in re.findall(r'save_pretrained\("(\w+)"\)', code):
        assert (tmp_path / folder / "model.safetensors").exists()
