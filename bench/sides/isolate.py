"""Environments of their own for packages whose versions do not go together, made once and kept."""

import hashlib
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from deltapatch.errors import DeltapatchError


def default_cache() -> Path:
    """Where environments are kept unless the user says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deltapatch" / "bench"


def isolated_python(extra: str, cache: Path, say: Callable[[str], None]) -> str:
    """The interpreter of an environment with this deltapatch, the same torch, and what the extra names.

    The environment is made on the first call; later ones find it.

    Raises:
        DeltapatchError: it cannot be made.
    """
    return python_of(extra, requirements(extra), cache, say)


def python_of(name: str, wanted: Sequence[str], cache: Path, say: Callable[[str], None]) -> str:
    """The interpreter of an environment with the same torch and these packages alone.

    deltapatch can be imported there, but what it needs is not installed unless it is wanted.

    Args:
        name: of the environment, which is made on the first call.
        wanted: as pip takes them.
        cache, say: as in `isolated_python`.

    Raises:
        DeltapatchError: it cannot be made.
    """
    return _environment(name, [f"torch=={version('torch').split('+')[0]}", *wanted], cache, say)


def python_with(package: str, cache: Path, say: Callable[[str], None]) -> str:
    """The interpreter of an environment that is this one but for one package of another version.

    Args:
        package: as pip takes it, such as "triton==3.6.0". What it needs is not installed with it.
        cache, say: as in `isolated_python`.

    Raises:
        DeltapatchError: it cannot be made.
    """
    return _environment(package, [package, "--no-deps"], cache, say, above=site_packages())


def site_packages() -> str:
    """Where this interpreter's packages are."""
    return sysconfig.get_path("purelib")


def _environment(
    name: str, wanted: list[str], cache: Path, say: Callable[[str], None], above: str | None = None
) -> str:
    """Its interpreter; `above` is a folder of packages that it has too, where it has none of that name."""
    home = Path(__file__).resolve().parent.parent.parent  # this package: the environment uses it as it is
    told = [sys.version, str(home), *wanted, *([above] if above else [])]
    key = hashlib.sha256("\n".join(told).encode()).hexdigest()[:8]
    folder = cache.expanduser().resolve() / f"{name.replace('==', '-')}-{key}"
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    done = folder / "installed"
    if not done.exists():
        say(f"making an environment for {name} in {folder}; this takes a while the first time")
        _run([sys.executable, "-m", "venv", "--clear", str(folder)], name)
        _run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted], name)
        _link(python, home, name, above)
        done.touch()
    return str(python)


def requirements(extra: str) -> list[str]:
    """What deltapatch and its extra ask for; for an extra that is not known, the package of that name."""
    try:
        lines = requires("deltapatch") or []
    except PackageNotFoundError:
        lines = []
    plain, own = [], []
    for line in lines:
        what, _, marker = (part.strip() for part in line.partition(";"))
        named = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", marker)
        if named is None:
            plain.append(line)
        elif named[1] == extra:
            own.append(what)
    return [*plain, *(own or [extra])]


def _link(python: Path, home: Path, name: str, above: str | None) -> None:
    """Make `import deltapatch` in that environment find this very package, wherever it is installed."""
    script = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(_run([str(python), "-c", script], name).strip())
    if above is not None:
        (site / "above.pth").write_text(above + "\n")
    link = site / "deltapatch"
    if not link.exists():
        link.symlink_to(home, target_is_directory=True)


def _run(command: list[str], name: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        why = " ".join(lines[-1].split())[:300] if lines else f"exit code {done.returncode}"
        raise DeltapatchError(f"the environment for {name} cannot be made: {why}")
    return done.stdout
