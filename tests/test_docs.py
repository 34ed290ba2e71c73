"""The documentation is built as a site, strictly: every link and name that it refers to is there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import deltapatch

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_the_site_is_built_without_a_network(tmp_path):
    for package in ("mkdocs", "material", "mkdocstrings", "mkdocs_click"):
        pytest.importorskip(package, reason="the extra `docs` is not installed here")
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.1:9")
    run = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, **nowhere, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert run.returncode == 0, run.stderr
    python = (tmp_path / "site" / "reference" / "python" / "index.html").read_text(encoding="utf-8")
    for name in deltapatch.__all__:
        assert f">{name}<" in python or f'.{name}"' in python, name
    assert "noise_sample" in python
    commands = (tmp_path / "site" / "reference" / "commands" / "index.html").read_text(encoding="utf-8")
    assert "--memory-budget" in commands
    assert "real_capitals.png" in (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
