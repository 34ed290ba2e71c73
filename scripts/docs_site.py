"""Hooks of mkdocs: the README is the first page, the reference is made of what the package exports.

Links to files that are no pages, such as results and notebooks, become their text: a site has no such files.
"""

import inspect
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

import deltapatch

ROOT = Path(__file__).resolve().parent.parent
SHARING = (deltapatch.sweep, deltapatch.sweep_edges, deltapatch.run)
COMMANDS = """# Commands

::: mkdocs-click
    :module: deltapatch.cli.main
    :command: cli
    :prog_name: deltapatch
    :depth: 1
    :style: plain
"""


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made."""
    made = {
        "index.md": (ROOT / "README.md").read_text(encoding="utf-8").replace("](docs/", "]("),
        "reference/python.md": _python(),
        "reference/commands.md": COMMANDS,
    }
    for path, text in made.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Leave out links that lead out of the pages."""
    return re.sub(r"(?<!!)\[([^\]]+)\]\((?:\.\./|bench/|examples/|models/|scripts/)[^)]*\)", r"\1", markdown)


def _python() -> str:
    """A page of all that `deltapatch` exports, and of the options that sweeps and runs share.

    These come into docstrings when they are imported, where mkdocstrings, which reads the files, sees none.
    """
    named = (f"{getattr(deltapatch, name).__module__}.{name}" for name in deltapatch.__all__)
    pages = "\n\n".join(f"::: {name}" for name in named)
    known = {name: text for function in SHARING for name, text in _arguments(function).items()}
    listed = "\n".join(f"- **`{name}`**: {text}" for name, text in known.items())
    about = "Each says in `help()` which of them it takes; the shell has them under the same names."
    title = "## Options of `sweep`, `sweep_edges` and `run`"
    return "\n\n".join(["# Python", pages, title, about, listed])


def _arguments(function: Any) -> dict[str, str]:
    """The arguments that a docstring tells, but for the model and what is patched."""
    told = (inspect.getdoc(function) or "").split("Args:\n")[1].split("\n\n")[0]
    found = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", told, re.MULTILINE)
    given = ("model", "pairs", "interventions")
    return {name: " ".join(text.split()) for name, text in found if name not in given}
