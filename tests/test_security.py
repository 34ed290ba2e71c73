"""Nothing that is read is run: no pickle, no eval, no code from checkpoints, anywhere in the sources."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("analysis", "bench", "cli", "engine", "kernels", "models", "scripts", "tasks")
SOURCES = sorted(
    [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))]
)
# Modules that make objects, and so run code, of what they read.
UNSAFE = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
    "jsonpickle",
    "yaml",
}
# `convert` names the error by which torch refuses a pickle with more than tensors in it.
ALLOWED = {("models/convert.py", "pickle")}
RUNS = {"eval", "exec", "compile", "__import__"}


def calls(tree: ast.AST) -> Iterator[tuple[str, dict[str, ast.expr]]]:
    """Of every call its name, with what comes before a dot, and its keywords."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg: k.value for k in node.keywords if k.arg}


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0]


def is_constant(node: ast.expr | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def faults(text: str, name: str) -> list[str]:
    """What a source does that it must not."""
    tree, found = ast.parse(text), []
    found += [f"imports {m}" for m in imports(tree) if m in UNSAFE and (name, m) not in ALLOWED]
    for called, keywords in calls(tree):
        last = called.split(".")[-1]
        if called in RUNS or called.startswith(("os.system", "os.popen", "pickle.", "builtins.")):
            found.append(f"calls {called}")
        if called in ("torch.load", "load_state_dict_from_url") and not is_constant(
            keywords.get("weights_only"), True
        ):
            found.append(f"{called} without weights_only=True")
        if last == "from_pretrained" and called.startswith("Auto") and "trust_remote_code" not in keywords:
            found.append(f"{called} without trust_remote_code=False")
        for keyword, right in (("trust_remote_code", False), ("allow_pickle", False), ("shell", False)):
            if keyword in keywords and not is_constant(keywords[keyword], right):
                found.append(f"{called} with {keyword} that is not {right}")
        if last in ("add_safe_globals", "safe_globals", "unsafe_load"):
            found.append(f"calls {called}")
    return found


def test_nothing_that_is_read_is_run():
    for path in SOURCES:
        name = path.relative_to(ROOT).as_posix()
        assert faults(path.read_text(encoding="utf-8"), name) == [], name


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from joblib import load",
        "eval('1')",
        "__import__(name)",
        "torch.load(path)",
        "torch.load(path, weights_only=flag)",
        "np.load(path, allow_pickle=True)",
        "AutoTokenizer.from_pretrained(path)",
        "AutoTokenizer.from_pretrained(path, trust_remote_code=True)",
        "subprocess.run(line, shell=True)",
        "torch.serialization.add_safe_globals([x])",
    ],
)
def test_the_search_finds(text):
    assert faults(text, "somewhere.py")
