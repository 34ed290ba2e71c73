"""What the layout must keep true: the root is the package, kernels shadows nothing, arrows point one way."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import deltapatch

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PARTS = (
    "kernels",
    "models",
    "interventions",
    "results",
    "engine",
    "tasks",
    "analysis",
    "explore",
    "study",
    "bench",
    "cli",
)
# cli -> bench -> study -> analysis, tasks -> engine -> results -> interventions -> models -> kernels
# cli -> explore -> analysis
MAY_IMPORT = {
    "kernels": {"kernels"},
    "models": {"models", "kernels"},
    "interventions": {"interventions", "models", "kernels"},
    "results": {"results", "interventions", "models", "kernels"},
    "engine": {"engine", "results", "interventions", "models", "kernels"},
}
MAY_IMPORT["tasks"] = MAY_IMPORT["engine"] | {"tasks"}
MAY_IMPORT["analysis"] = MAY_IMPORT["engine"] | {"analysis"}
MAY_IMPORT["explore"] = MAY_IMPORT["analysis"] | {"explore"}
MAY_IMPORT["study"] = MAY_IMPORT["tasks"] | MAY_IMPORT["analysis"] | {"study"}
MAY_IMPORT["bench"] = MAY_IMPORT["study"] | {"bench"}
MAY_IMPORT["cli"] = MAY_IMPORT["bench"] | {"explore", "cli"}


def python(code: str, **more) -> str:
    """What a fresh interpreter prints."""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **more)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_kernels_has_no_init_file():
    # With one, `kernels` from the repository's root would shadow the package of that name that
    # transformers looks for.
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert all((ROOT / part / "__init__.py").exists() for part in PARTS if part != "kernels")


def test_transformers_imports_from_the_root():
    assert python("import transformers; print(transformers.__name__)", cwd=ROOT) == "transformers"


def test_every_folder_with_code_is_a_package():
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    skipped = {"tests", "scripts"}
    found = {"deltapatch"}
    for path in ROOT.rglob("*.py"):
        folder = path.parent.relative_to(ROOT)
        hidden = any(part.startswith(".") for part in folder.parts)
        ours = folder.parts and folder.parts[0] not in skipped | {"build", "dist"}
        if ours and not hidden and "site-packages" not in folder.parts:
            found.add("deltapatch." + ".".join(folder.parts))
    assert found == listed


def test_type_checkers_see_every_package():
    links = ROOT / ".typing" / "deltapatch"
    for part in PARTS:
        assert (links / part).resolve() == ROOT / part
    for file in ("__init__.py", "__main__.py", "arguments.py", "errors.py", "markup.py", "py.typed"):
        assert (links / file).resolve() == ROOT / file


def test_the_wheel_has_the_code_and_the_built_in_models(tmp_path):
    wheel = (
        "import os, sys, setuptools.build_meta as build\n"
        "os.chdir(sys.argv[1])\n"
        "print(build.build_wheel(sys.argv[2]))\n"
    )
    # A copy of what matters: a build in the checkout would leave folders behind.
    copy = tmp_path / "copy"
    copy.mkdir()
    kept = (
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "__init__.py",
        "__main__.py",
        "arguments.py",
        "errors.py",
        "markup.py",
    )
    kept += ("py.typed",)
    for name in (*kept, *PARTS):
        if (ROOT / name).exists():
            _copy(ROOT / name, copy / name)
    (copy / "README.md").touch()
    run = subprocess.run(
        [sys.executable, "-c", wheel, str(copy), str(tmp_path)], capture_output=True, text=True
    )
    if "No module named 'setuptools" in run.stderr:
        pytest.skip("setuptools is not installed here")
    assert run.returncode == 0, run.stderr
    import zipfile

    names = set(zipfile.ZipFile(tmp_path / run.stdout.split()[-1]).namelist())
    for part in PARTS:
        for path in (ROOT / part).rglob("*"):
            if path.suffix in (".py", ".css", ".html", ".js") or (
                path.is_file() and path.parent.parent == ROOT / "models" / "builtin"
            ):
                assert f"deltapatch/{path.relative_to(ROOT)}" in names
    assert "deltapatch/py.typed" in names
    assert not any(name.startswith(("deltapatch/tests", "tests")) for name in names)


@pytest.mark.slow
def test_what_would_be_uploaded_is_built_and_checked(tmp_path):
    """The wheel is built from the source archive, so that the archive has all that a wheel needs."""
    pytest.importorskip("build", reason="build is not installed here")
    pytest.importorskip("twine", reason="twine is not installed here")
    pytest.importorskip("setuptools", reason="setuptools is not installed here")
    copy = tmp_path / "copy"
    copy.mkdir()
    files = ("pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE", "py.typed", "tests")
    for name in (*files, *(path.name for path in ROOT.glob("*.py")), *PARTS):
        _copy(ROOT / name, copy / name)

    def module(*words):
        run = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, cwd=copy)
        assert run.returncode == 0, run.stdout + run.stderr
        return run.stdout

    module("build", "--no-isolation", "--outdir", str(tmp_path / "dist"), ".")
    archive, wheel = sorted((tmp_path / "dist").iterdir(), key=lambda path: path.suffix)
    assert (archive.name, wheel.name) == (
        f"deltapatch-{deltapatch.__version__}.tar.gz",
        f"deltapatch-{deltapatch.__version__}-py3-none-any.whl",
    )
    assert module("twine", "check", "--strict", str(archive), str(wheel)).count("PASSED") == 2
    import tarfile
    import zipfile

    with tarfile.open(archive) as packed:
        names = {name.split("/", 1)[-1] for name in packed.getnames()}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "explore/edges.js"} <= names
    assert not any(name.startswith("tests") for name in names)
    inside = zipfile.ZipFile(wheel).namelist()
    for part in PARTS:
        for path in (ROOT / part).rglob("*.py"):
            assert f"deltapatch/{path.relative_to(ROOT)}" in inside


def _copy(source: Path, target: Path) -> None:
    import shutil

    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(source, target)


def test_importing_deltapatch_loads_nothing_heavy(tmp_path):
    code = "import sys, deltapatch; print([m for m in ('torch', 'numpy', 'matplotlib') if m in sys.modules])"
    assert python(code, cwd=tmp_path) == "[]"


def test_help_loads_nothing_heavy(tmp_path):
    code = (
        "import sys\n"
        "from deltapatch.cli.main import cli\n"
        "try:\n    cli.main(['--help'])\n"
        "except SystemExit as stop:\n    assert not stop.code\n"
        "heavy = ('torch', 'transformers', 'numpy', 'matplotlib', 'pandas', 'rich')\n"
        "print([m for m in heavy if m in sys.modules])\n"
    )
    assert python(code, cwd=tmp_path).splitlines()[-1] == "[]"


def test_reading_results_needs_no_torch(tmp_path):
    code = (
        "import sys\n"
        "import deltapatch.results.effects, deltapatch.results.folder, deltapatch.analysis.plots\n"
        "print('torch' in sys.modules)"
    )
    assert python(code, cwd=tmp_path) == "False"


@pytest.mark.parametrize("name", deltapatch.__all__)
def test_the_face_has_what_it_promises(name):
    assert getattr(deltapatch, name).__name__ == name
    assert name in dir(deltapatch)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'magic'"):
        _ = deltapatch.magic


def _imports(path: Path) -> set[str]:
    """The parts of deltapatch that a file imports, wherever in the file that happens."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            modules = [node.module or ""]
            if node.module == "deltapatch":
                modules = [f"deltapatch.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {m.split(".")[1] for m in modules if m.startswith("deltapatch.")}
    return found & set(PARTS)


@pytest.mark.parametrize("part", PARTS)
def test_arrows_point_one_way(part):
    for path in (ROOT / part).rglob("*.py"):
        wrong = _imports(path) - MAY_IMPORT[part]
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


# What the rooms of the engine may import of each other; the files beside them hold them together.
ROOMS = {
    "wavefront": set(),
    "screening": {"wavefront"},
    "planning": {"screening", "wavefront"},
    "cluster": {"planning", "screening", "wavefront"},
}


def test_rooms_of_the_engine_import_one_way():
    assert {path.parent.name for path in (ROOT / "engine").glob("*/__init__.py")} == set(ROOMS)
    for room, may in ROOMS.items():
        for path in (ROOT / "engine" / room).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and node.module.startswith("deltapatch.engine."):
                    other = node.module.split(".")[2]
                    assert other not in set(ROOMS) - may - {room}, f"{path.relative_to(ROOT)} imports {other}"


@pytest.mark.parametrize("part", PARTS)
def test_files_say_what_they_are_for(part):
    for path in (ROOT / part).rglob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path


def test_there_is_no_circle_of_imports():
    """Nor one that is hidden inside functions or behind TYPE_CHECKING."""
    files = {
        "deltapatch." + ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for part in PARTS
        for path in (ROOT / part).rglob("*.py")
    }
    arrows = {}
    for module, path in files.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
        arrows[module] = found & set(files) - {module}
    while leaves := [module for module, to in arrows.items() if not to & set(arrows)]:
        for module in leaves:
            del arrows[module]
    assert not arrows, f"among these are circles: {sorted(arrows)}"
