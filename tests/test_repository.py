"""What holds for all scripts together: no dead flags, no drifted copies, pages whose commands exist."""

import ast
import io
import re
import tokenize

from conftest import ROOT

# flags that mean another thing in one script, and why
OWN = {("dpo.py", "dataset"): "its rows are pairs", ("dpo.py", "batch_size"): "counts pairs",
       ("dpo.py", "micro_batch_size"): "counts pairs", ("dpo.py", "beta"): "DPO's own beta, where ILQL has one too"}
SCRIPTS = sorted(path.name for path in ROOT.glob("*.py"))


def args_of(script: str) -> dict[str, tuple[str, str]]:
    """The fields of a script's Args: annotation and docstring of each."""
    node = next(node for node in ast.parse((ROOT / script).read_text()).body
                if isinstance(node, ast.ClassDef) and node.name == "Args")
    fields = {}
    for item, doc in zip(node.body, [*node.body[1:], None]):
        if isinstance(item, ast.AnnAssign):
            assert isinstance(doc, ast.Expr), f"{script}: {item.target.id} has no docstring"
            fields[item.target.id] = ast.unparse(item.annotation), ast.unparse(doc)
    return fields


def test_no_flag_is_unread():
    plumbing = "".join(path.read_text() for path in (ROOT / "common").glob("*.py"))
    for script in SCRIPTS:
        text = (ROOT / script).read_text()
        for name in args_of(script):
            read = re.search(rf"args\.{name}\b", text + plumbing) or f'"--{name}"' in plumbing
            assert read, f"{script}: the flag {name} is not read"


def test_same_names_are_the_same_code():
    """A function or class that stands in two scripts is the same there, and so are the flags of one name. Exempt is
    what each script must have of its own: flags, their defaults by task, their checks, its update and its loop."""
    seen, fields = {}, {}
    for script in SCRIPTS:
        for node in ast.parse((ROOT / script).read_text()).body:
            named = isinstance(node, (ast.FunctionDef, ast.ClassDef))
            if named and node.name not in {"Args", "preset", "check", "update", "train"}:
                assert seen.setdefault(node.name, ast.unparse(node)) == ast.unparse(node), f"{node.name} drifted"
    for script, name in OWN:
        assert args_of(script)[name] != args_of("sft.py").get(name), f"{script}: {name} need not be listed"
    for script in SCRIPTS:
        for name, kind in args_of(script).items():
            if (script, name) in OWN:
                continue
            assert fields.setdefault(name, kind) == kind, f"{script}: the flag {name} drifted"


def test_scripts_do_not_import_each_other():
    names = {script.removesuffix(".py") for script in SCRIPTS}
    for script in SCRIPTS:
        for node in ast.walk(ast.parse((ROOT / script).read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                found = {alias.name for alias in node.names} if isinstance(node, ast.Import) else {node.module}
                assert not found & names, f"{script} imports {found & names}"


def commands_of(script: str, text: str) -> list[str]:
    """What follows `script` in the commands of a page, those in blocks and those between backticks."""
    blocks = re.findall(r"^```\w*\n(.*?)^```$", text, re.M | re.S)
    spans = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S))
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()] + spans
    starts = rf"(?:^|\s)(?:\S*python[\d.]*|\S*torchrun(?:\s+--[\w-]+\s+\S+)*)\s+{re.escape(script)}(?!\S)(.*)"
    words = (re.search(starts, re.split(r"#|&&", part)[0], re.S)
             for line in lines for part in re.split(r"(?<=&&)", line.removeprefix("$ ")))
    return [found[1] for found in words if found]


def test_commands_of_the_readme_and_of_the_docs_use_flags_that_exist():
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    for script in SCRIPTS:
        names = {"--" + name.replace("_", "-") for name in args_of(script)} | {"--help"}
        commands = [(page.name, command) for page in pages for command in commands_of(script, page.read_text())]
        assert commands, f"no page has a command of {script}"
        for page, command in commands:
            for flag in re.findall(r"(?<=\s)--[a-z][a-z0-9-]*", command):
                assert {flag, flag.replace("--no-", "--", 1)} & names, f"{page}: {script} has no flag {flag}"


def flags_in(path) -> set[str]:
    """Flags of a script of benchmarks/ or examples/: the fields of its classes, or what it gives to argparse, it or the
    module that benchmarks share."""
    found = {"--" + node.target.id.replace("_", "-") for each in ast.parse(path.read_text()).body
             if isinstance(each, ast.ClassDef) for node in each.body if isinstance(node, ast.AnnAssign)}
    shared = path.with_name("versus.py") if "import versus" in path.read_text() else path
    return found | {node.value for source in {path, shared} for node in ast.walk(ast.parse(source.read_text()))
                    if isinstance(node, ast.Constant) and str(node.value).startswith("--")}


def test_commands_of_benchmarks_and_examples_use_flags_that_exist():
    pages = {page.name: page.read_text() for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
    for folder in ("benchmarks", "examples"):
        named = set(re.findall(rf"(?:python|nproc_per_node \d) ({folder}/[\w/]+\.py)", " ".join(pages.values())))
        assert len(named) > 3
        for script in named:
            commands = [(page, command) for page, text in pages.items() for command in commands_of(script, text)]
            assert commands, script
            for page, command in commands:
                for flag in re.findall(r"(?<=\s)--[a-z][a-z0-9-]*", command):
                    assert flag in flags_in(ROOT / script) | {"--help"}, f"{page}: {script} has no flag {flag}"


def code_lines(path) -> int:
    """Lines that hold code: no blank ones, comments or docstrings."""
    text, docs, lines = path.read_text(), set(), set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docs.update(range(node.lineno, node.end_lineno + 1))
    blank = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in blank:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - docs)


def test_the_readme_is_short_and_its_table_counts_the_lines():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 300
    for script in SCRIPTS:
        row = next(line for line in text.splitlines() if line.startswith(f"| [{script}]({script})"))
        assert int(row.split("|")[3]) == code_lines(ROOT / script), f"README: code lines of {script}"


def test_a_run_may_be_resumed_with_other_settings_of_the_machine():
    """Memory, speed, how often to evaluate and save: what one script lets a resumed run change, all do."""
    free = {script: set(ast.literal_eval(node.value)) for script in SCRIPTS
            for node in ast.parse((ROOT / script).read_text()).body
            if isinstance(node, ast.Assign) and node.targets[0].id == "RESUMABLE"}
    free["ppo.py"] -= {"reward_on", "reward_device", "reward_batch_size"}
    assert free["ppo.py"] == free["sft.py"] == free["ilql.py"] == free["dpo.py"]
