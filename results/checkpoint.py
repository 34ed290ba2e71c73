"""An unfinished run: what its passes found, kept in the run folder until all of them are there.

    RUN/unfinished/manifest.json       the plan (see manifest.py)
    RUN/unfinished/pairs.jsonl         the pairs, as they will stand in RUN
    RUN/unfinished/interventions.safetensors   those of a run of given interventions, likewise
    RUN/unfinished/0.safetensors ...   a shard for each pass that is done (see shards.py)
    RUN/unfinished/*.lock              who is at work
    RUN/unfinished/rounds/1 ...        in the place of all but locks, of a sweep in rounds: a run folder each

When all is there, the files of a run folder are written into RUN, run.json as the last, and `unfinished` is
removed. So a folder with run.json is whole, whatever lies beside it.
"""

import re
import secrets
import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np

from deltapatch.errors import DeltapatchError
from deltapatch.interventions.pairs import EncodedPair
from deltapatch.models.header import check_regular
from deltapatch.results.folder import (
    INTERVENTIONS,
    LOCK,
    MANIFEST,
    PAIRS,
    ROUNDS,
    RUN,
    UNFINISHED,
    check_output,
    is_begun,
    pairs_as_text,
    plain_errors,
    put_files,
)
from deltapatch.results.kept import DamagedPass, KeptPasses
from deltapatch.results.lock import held
from deltapatch.results.manifest import Manifest, read_manifest
from deltapatch.results.measured import Found, Gathered, PassEffects
from deltapatch.results.tensorfile import save_file
from deltapatch.results.truth import Truth
from deltapatch.results.wholefile import flush, write_new, write_whole

GO_ON = "the same sweep with --resume (in Python resume=True) goes on from there"


class Unfinished:
    """The unfinished run in a folder, locked. `unfinished` makes it.

    Args:
        path: the run folder.
        part: (i, n), of n processes that share the passes, from 0; None where this one does all.
    """

    def __init__(self, path: Path, part: tuple[int, int] | None) -> None:
        self.path, self.part = path, part
        self.folder = path / UNFINISHED
        self.seconds_kept = 0.0
        self._began = False
        self.manifest: Manifest | None = None
        self.passes = KeptPasses(self.folder, "")
        if (self.folder / MANIFEST).exists():
            self._adopt(read_plan(path))

    @property
    def rounds(self) -> Path:
        """Where the run folders of rounds are."""
        return self.folder / ROUNDS

    @property
    def has_rounds(self) -> bool:
        """Whether it goes on in rounds, and has begun one."""
        return self.rounds.is_dir() and any(self.rounds.iterdir())

    @property
    def whole(self) -> bool:
        """Whether this process does all passes."""
        return self.part is None

    @property
    def truth(self) -> Truth | None:
        """Of a sample, from when the run began."""
        return None if self.manifest is None else self.manifest.truth

    @property
    def finished(self) -> bool:
        """Whether another process has finished it."""
        return (self.path / RUN).exists()

    @contextmanager
    def planning(self) -> Iterator[None]:
        """Wait for a process that decides the plan, and take what it decided."""
        with held(self.folder / "plan.lock", "", wait=True):
            if self.manifest is None and (self.folder / MANIFEST).exists():
                self._adopt(read_plan(self.path))
            yield

    def begin(
        self,
        manifest: Manifest,
        pairs: list[EncodedPair],
        interventions: dict[str, np.ndarray] | None = None,
    ) -> None:
        """Write the plan, or take over the one of a process that was faster where there are no locks.

        Args:
            manifest: the plan.
            pairs: what pairs.jsonl is to hold.
            interventions: the arrays of given ones.

        Raises:
            DeltapatchError: the disk is full.
        """
        with plain_errors(self.path):
            write_whole(self.folder / PAIRS, lambda p: p.write_text(pairs_as_text(pairs), encoding="utf-8"))
            if interventions is not None:
                arrays = interventions
                write_whole(self.folder / INTERVENTIONS, lambda p: save_file(arrays, p, {}))
            flush(self.path)  # a folder that is new is not yet seen to the disk either
            flush(self.path.absolute().parent)
            text = manifest.to_json()
            self._began = write_new(self.folder / MANIFEST, lambda p: p.write_text(text, encoding="utf-8"))
        self._adopt(manifest if self._began else read_plan(self.path))

    def wants(self, number: int) -> bool:
        """Whether this process does that pass."""
        return self.part is None or number % self.part[1] == self.part[0]

    def kept(self, number: int, out: np.ndarray, pairs: list[int], gathered: Gathered) -> PassEffects | None:
        """What the pass found earlier; None where it is to be done, perhaps again."""
        try:
            found = self.passes.read(number)
            if found is None:
                return None
            same = np.array_equal(found.out, out) and np.array_equal(found.pairs, pairs)
            kinds = {name: values.dtype for name, values in found.measured.items()}
            if not same or kinds != {name: values.dtype for name, values in gathered.measured.items()}:
                raise DamagedPass
        except DamagedPass:
            self._tell_of_damage(number)
            return None
        self.seconds_kept += found.seconds
        return found

    def missing(self, n_passes: int) -> list[int]:
        """Those of so many passes that have no whole shard."""
        out = []
        for number in range(n_passes):
            try:
                found = self.passes.read(number)
            except DamagedPass:
                self._tell_of_damage(number)
                found = None
            if found is None:
                out.append(number)
        return out

    def keep(self, number: int, found: PassEffects) -> None:
        """Keep what a pass found. DeltapatchError where the disk is full."""
        with plain_errors(self.path, self._on_a_full_disk()):
            self.passes.write(number, found)

    def finish(self, found: Found) -> None:
        """Write the files of a finished run folder. DeltapatchError where the disk is full."""
        with plain_errors(self.path, self._on_a_full_disk()):
            put_files(found.record(), self.folder / f".finished.{secrets.token_hex(8)}.partial", self.path)
        clean(self.path)

    def state(self) -> str:
        """What is kept, and how to go on."""
        n = len(self.passes.numbers())
        if self.has_rounds:
            return f"its rounds are kept in {self.path}, and {GO_ON}"
        if not n:
            return "nothing was kept, so run it again"
        total = "" if self.manifest is None else f" of {self.manifest.n_passes}"
        return f"{n}{total} passes are kept in {self.path}, and {GO_ON}"

    def drop_if_empty(self) -> bool:
        """Remove what this process began, where no pass is done and nobody else is at work."""
        mine = self._began or self.manifest is None
        if self.part is not None or not mine or self.passes.numbers() or self.has_rounds:
            return False
        clean(self.path)
        return True

    def parts(self, numbers: Iterable[int]) -> str:
        """Whose some passes are, for a message: the parts (--shard), where all were of as many."""
        named = (
            re.fullmatch(r"part-\d+-of-(\d{1,9})\.lock", p.name) for p in self.folder.glob("part-*.lock")
        )
        counts = {int(name[1]) for name in named if name}
        if len(counts) != 1:
            return _listed("pass", [str(n) for n in sorted(numbers)])
        (count,) = counts
        return _listed("part", [f"{i + 1}/{count}" for i in sorted({n % count for n in numbers})])

    def _tell_of_damage(self, number: int) -> None:
        warnings.warn(f"{self.passes.path(number)} is damaged: its pass is computed again", stacklevel=3)

    def _on_a_full_disk(self) -> str:
        return f"free some; {self.state()}"

    def _adopt(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.passes = KeptPasses(self.folder, manifest.digest())


@contextmanager
def unfinished(path: Path, resume: bool, part: tuple[int, int] | None = None) -> Iterator[Unfinished]:
    """Lock a run folder that is to be filled, and say how to go on when that is interrupted.

    Args:
        path: the run folder; it is made where it is missing.
        resume: it may hold an unfinished run.
        part: which part of the passes this process does.

    Raises:
        DeltapatchError: the path is taken, or another process works on it.
    """
    join, new = resume or part is not None, not path.exists()
    if not (join and (is_begun(path) or (path / RUN).is_file())):  # another process may just have finished it
        check_output(path)
    folder = path / UNFINISHED
    for link in (folder, folder / ROUNDS):
        if link.is_symlink():
            raise DeltapatchError(f"{link} is a link: what is written must stay in the run folder; remove it")
    finished = False
    busy = f"another process works on run folder {path}: wait until it is done, or choose another output path"
    with ExitStack() as locks:
        with plain_errors(path):
            locks.enter_context(held(folder / LOCK, busy, shared=part is not None))
            if part is not None:
                name = f"part-{part[0] + 1}-of-{part[1]}.lock"
                locks.enter_context(held(folder / name, busy))
        if not join and ((path / RUN).exists() or (folder / MANIFEST).exists()):
            check_output(path)  # another process took it just now
        if part is None:
            _remove_drafts(folder)
        run = Unfinished(path, part)
        try:
            yield run
        except KeyboardInterrupt:
            if run.finished:
                raise
            raise KeyboardInterrupt(f"Interrupted; {run.state()}") from None
        finally:
            finished = run.finished
            if not finished and run.drop_if_empty() and new:
                with suppress(OSError):  # something else may lie there by now
                    path.rmdir()
    if finished:
        tidy(path)


def tidy(path: Path) -> None:
    """Remove what a finished run no longer needs, unless another process is there, which will."""
    folder = path / UNFINISHED
    if folder.is_symlink() or not is_begun(path):
        return
    with suppress(DeltapatchError, OSError), held(folder / LOCK, ""):
        if (path / RUN).is_file():
            clean(path)


def read_plan(path: Path) -> Manifest:
    """The manifest of an unfinished run.

    Raises:
        DeltapatchError: it is missing or damaged.
    """
    file = path / UNFINISHED / MANIFEST
    try:
        check_regular(file)
        return read_manifest(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise DeltapatchError(
            f"unfinished run {path} cannot be resumed: its {UNFINISHED}/{MANIFEST} is damaged ({reason}); "
            "remove the folder and run the sweep again"
        ) from error


def clean(path: Path) -> None:
    """Remove what a finished run no longer needs, and nothing that is not its own; the locks go last."""
    folder = path / UNFINISHED
    _remove_drafts(folder)
    if not (folder / ROUNDS).is_symlink():
        shutil.rmtree(folder / ROUNDS, ignore_errors=True)
    for pattern in ("*.safetensors", MANIFEST, PAIRS, "*.lock"):
        for file in folder.glob(pattern):
            if file.is_symlink() or not file.is_dir():
                file.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def _remove_drafts(folder: Path) -> None:
    for draft in folder.glob(".*.partial"):
        if draft.is_dir() and not draft.is_symlink():
            shutil.rmtree(draft, ignore_errors=True)
        else:
            draft.unlink(missing_ok=True)


def _listed(word: str, names: list[str], most: int = 8) -> str:
    """part 3/8; passes 1, 2 and 5."""
    if len(names) == 1:
        return f"{word} {names[0]}"
    plural = f"{word}es" if word.endswith("s") else f"{word}s"
    if len(names) > most:
        return f"{plural} {', '.join(names[:most])} and {len(names) - most} more"
    return f"{plural} {', '.join(names[:-1])} and {names[-1]}"
