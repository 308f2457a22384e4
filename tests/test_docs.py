"""The pages of docs/: their examples run, their links lead somewhere, their exercises still fit the code."""

import ast
import functools
import io
import platform
import re
import runpy
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, documented_metrics
from test_repository import args_of

import ppo
from common.cli import parse

sys.path.insert(0, str(ROOT / "benchmarks"))
import ablations  # noqa: E402
import sweep  # noqa: E402
import versus  # noqa: E402

SCRIPTS = ["ppo.py", "sft.py", "ilql.py", "dpo.py"]
HEADINGS = ["Use", "The code in order", "What it logs", "What breaks when it is wrong", "Results",
            "Differences from the papers"]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


def page(script: str) -> str:
    """The text of a script's page."""
    return (ROOT / "docs" / script.replace(".py", ".md")).read_text()


def section(text: str, heading: str) -> str:
    """What stands under `## heading`."""
    return text.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def examples(text: str) -> list[str]:
    """The Python blocks that are meant to be run: they begin with an import of a script, and assert something."""
    names = "|".join(script.removesuffix(".py") for script in SCRIPTS)
    return [code for language, code in FENCE.findall(text)
            if language == "python" and re.match(rf"(from|import) ({names})\b", code) and "assert" in code]


def links(text: str) -> list[tuple[str, str]]:
    """Words and target of each link and picture outside of code and formulas, but for those to other sites."""
    prose = re.sub(r"\$\$.*?\$\$", "", FENCE.sub("", text), flags=re.S)
    return [link for link in re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", prose) if not re.match(r"\w+:", link[1])]


def broken_links(page: Path, text: str) -> list[str]:
    """Links to files and headings that do not exist."""
    broken = []
    for _, link in links(text):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists():
            broken.append(link)
        elif anchor:
            titles = re.findall(r"^#+ (.*)$", FENCE.sub("", text if not path else target.read_text()), re.M)
            if anchor not in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]:
                broken.append(link)
    return broken


@functools.cache
def defined(path: Path) -> set[str]:
    """Functions, classes, methods (CLASS.METHOD) and constants of a module."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{item.name}" for item in node.body if isinstance(item, ast.FunctionDef)}
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def missing_functions(page: Path, text: str) -> list[str]:
    """Names in backticks that link to a module which does not have them."""
    missing = []
    for words, link in links(text):
        name = re.fullmatch(r"`([A-Za-z_][\w.]*?)(\(\))?`", words)
        if name and link.endswith(".py") and not name[1].endswith(".py") and (page.parent / link).exists():
            missing += [f"{name[1]} of {link}"] if name[1] not in defined(page.parent / link) else []
    return missing


def faults_block(script: str, text: str) -> str:
    """What stands between the marks of the table of faults."""
    return text.split("<!-- faults: by benchmarks/ablations.py --write -->\n")[1].split("<!-- end -->")[0]


@pytest.mark.parametrize("script", SCRIPTS)
def test_pages_have_the_same_headings(script):
    text = FENCE.sub("", page(script))
    assert re.findall(r"^# (.*)$", text, re.M) == [script.removesuffix(".py").upper()]
    assert re.findall(r"^## (.*)$", text, re.M) == HEADINGS


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_examples_come_out_as_written(path, tmp_path):
    codes = examples(path.read_text())
    assert codes or path.stem + ".py" not in SCRIPTS, f"{path.name} has no example that runs"
    for code in codes:
        (tmp_path / "example.py").write_text(code)
        runpy.run_path(str(tmp_path / "example.py"))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_to_files_headings_and_functions_that_exist(path):
    text = path.read_text()
    assert not broken_links(path, text)
    assert not missing_functions(path, text)


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_line_numbers_and_formulas_that_markdown_leaves_alone(script):
    text = FENCE.sub("", page(script))
    assert not re.search(r"\.py:\d+|\.py#L\d+", text)
    for formula in re.findall(r"\$\$(.*?)\$\$", text, re.S):
        assert not re.search(r"\\[^a-zA-Z\s]", formula), f"Markdown takes the backslash from {formula}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_table_of_faults_is_that_of_the_results(script):
    """`python benchmarks/ablations.py --write` writes it."""
    assert faults_block(script, page(script)).strip() == ablations.page(script, ablations.read_results()).strip()


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_walk_through_the_code_names_every_fault_and_no_other(script):
    """Words in bold and lower case are names of exercises."""
    bold = set(re.findall(r"\*\*([a-z]+(?:-[a-z]+)*)\*\*", section(page(script), "The code in order")))
    assert bold == {fault.name for fault in ablations.FAULTS[script]}


@pytest.mark.parametrize("script,fault", [(script, fault) for script in SCRIPTS for fault in ablations.FAULTS[script]],
                         ids=lambda value: getattr(value, "name", value))
def test_exercises_fit_the_code(script, fault):
    """What a fault changes is there, once, the changed code compiles, its flags exist, and so does the function."""
    assert ablations.changed(fault) or fault.flags
    for file, (before, after) in ablations.changed(fault).items():
        assert before != after
        compile(after, file, "exec")
    flags = {"--" + name.replace("_", "-") for name in args_of(script)}
    for word in f"{ablations.BASE[script]} {fault.flags}".split():
        assert not word.startswith("--") or {word, word.replace("--no-", "--", 1)} & flags, f"{script} has no {word}"
    known = {path: defined(path) for path in [ROOT / script, *(ROOT / "common").glob("*.py")]}
    for name in re.findall(r"`([\w.]+)`", fault.where):
        assert any(name in names for names in known.values()), f"{fault.name}: no function {name}"


def test_runs_that_stand_in_the_results_are_not_run_again_but_for_their_logs(tmp_path, monkeypatch, capsys):
    begun = []

    def run(script, fault, seed, work, keep):
        begun.append((fault.name, seed))
        if keep:
            ablations.kept_log(keep, script, fault.name, seed).mkdir(parents=True)
        return {"script": script, "fault": fault.name, "seed": seed, "eval/optimality": float(len(begun))}

    monkeypatch.setattr(ablations, "run", run)
    monkeypatch.setattr(ablations, "RESULTS", tmp_path / "results.json")
    wanted = dict(script="sft.py", faults=["as it is", "shifted"], seeds=[1, 2])
    ablations.run_all(ablations.Args(**wanted))
    assert len(begun) == 4
    ablations.run_all(ablations.Args(**wanted))
    assert len(begun) == 4 and "nothing to run" in capsys.readouterr().out
    for _ in range(2):
        ablations.run_all(ablations.Args(**{**wanted, "faults": ["shifted"]}, keep=f"{tmp_path}/kept"))
        assert begun[4:] == [("shifted", 1), ("shifted", 2)]
    rows = ablations.read_results()
    assert [(row["fault"], row["seed"], row["eval/optimality"]) for row in rows] == [
        ("as it is", 1, 1.0), ("as it is", 2, 3.0), ("shifted", 1, 5.0), ("shifted", 2, 6.0)]
    monkeypatch.setattr(ablations, "processor", lambda: "another")
    ablations.run_all(ablations.Args(**wanted))
    assert len(begun) == 6, "a second machine has nothing to add"
    ablations.run_all(ablations.Args(**{**wanted, "faults": ["shifted"]}, keep=f"{tmp_path}/again"))
    ablations.run_all(ablations.Args(**{**wanted, "faults": ["dropout"], "seeds": [3]}))
    every = [(name, seed) for seed in (1, 2) for name in ("as it is", "shifted")]
    assert begun[6:] == [*every, ("as it is", 3), ("dropout", 3)], "but with the script as it is beside its own"


def test_a_fault_is_compared_with_the_script_as_it_is_on_the_same_machine():
    """By seed, bold where chance does not explain it, also where the start has refused some of its seeds."""
    def rows(fault, machine, optimality, loss, seeds=(1, 2, 3, 4, 5)):
        return [{"script": "sft.py", "fault": fault, "seed": seed, "machine": machine, "commit": f"c-{machine}",
                 "eval/optimality": optimality + 0.1 * seed, "eval/invalid": 0.5 + 0.01 * (seed * seed % 3 - 1) * (
                     fault != "as it is"), "eval/length": 7.0, "eval/loss": loss} for seed in seeds]

    found = rows("as it is", "one", 0.0, 1.0) + rows("as it is", "other", 0.2, 2.0)
    found += rows("shifted", "other", 0.15, 2.5) + rows("dropout", "one", -0.1, 1.0, seeds=(2, 4, 5))
    found += [{**row, "refused": "sft.py: error: no"} for row in rows("dropout", "one", 0, 0, seeds=(1, 3))]
    table = ablations.page("sft.py", found).splitlines()
    assert "| as it is | 0.400 |  | 0.5 | 7 | 1.5 |" in table
    assert "| shifted | 0.450 | -0.050 (-0.050 to -0.050) | 0.498 | 7 | **2.5** |" in table
    (dropout,) = [line for line in table if line.startswith("| dropout")]
    assert dropout.startswith("| dropout, 2 of 5 seeds refused at the start | 0.267 | -0.100 (-0.100 to -0.100) |")
    assert table[-1].endswith("commits: c-one (one), c-other (other).")
    assert not any(line.startswith("| mean-of-means") for line in table), "too few seeds"


def test_a_processor_without_a_name_is_told_by_its_kind(monkeypatch):
    monkeypatch.setattr(versus, "open", lambda _: io.StringIO("processor: 0\nBogoMIPS: 50\n"), raising=False)
    assert versus.processor() == platform.machine()


def yaml_block(name: str) -> str:
    """The YAML block of docs/experiments.md whose first line names the file."""
    blocks = FENCE.findall((ROOT / "docs/experiments.md").read_text())
    return next(code for _, code in blocks if code.startswith(f"# {name}"))


def test_the_sweep_of_the_page_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweep.yaml").write_text(yaml_block("sweep.yaml").replace("ppo.py", f"{ROOT}/ppo.py"))
    settings, runs = sweep.plan(sweep.read_sweep("sweep.yaml"), "sweep.yaml")
    assert len(settings) == 4 and len(runs) == 12


def test_what_wandb_makes_of_its_file_are_flags_of_ours():
    """wandb's own code turns the parameters of a run into words; the service chooses their values."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    file = yaml.safe_load(yaml_block("wandb.yaml"))
    chosen = {name: {"value": space["values"][-1] if "values" in space else space["min"]}
              for name, space in file["parameters"].items()}
    words = create_sweep_command_args({"args": chosen})["args"]
    command = [word for part in file["command"] for word in (words if part == "${args}" else [part])]
    assert command[:2] == ["python", "${program}"] and file["program"] == "ppo.py"
    args = parse(ppo.Args, ppo.preset, command[2:])
    assert (args.learning_rate, args.kl_coef, args.seed, args.track, args.total_episodes) == (1e-5, 0.05, 3, True, 2560)
    assert file["metric"]["name"] in documented_metrics("ppo.py")
