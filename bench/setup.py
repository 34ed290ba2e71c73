"""From what a user chooses to a workload: a model folder, pairs of one length, sides in processes."""

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from deltapatch.bench.compare import MakeSide
from deltapatch.bench.peers.registry import ONLY_EDITS, PEERS, ours
from deltapatch.bench.random_models import SHAPES, Shape, make_model, make_pairs
from deltapatch.bench.sides.isolate import default_cache, isolated_python
from deltapatch.bench.sides.job import Job
from deltapatch.bench.sides.process import Lines, lines_of
from deltapatch.bench.sides.workload import Workload, check_metric, one_length
from deltapatch.errors import DeltapatchError
from deltapatch.interventions.encode import encode_pairs
from deltapatch.interventions.pairs import PromptPair
from deltapatch.interventions.pairs_file import read_pairs
from deltapatch.models.builtin_models import BUILTIN
from deltapatch.models.folder import find_folder
from deltapatch.models.load import load_model
from deltapatch.models.model import Model
from deltapatch.tasks.arithmetic import arithmetic_pairs

RANDOM = "random"
# peer -> the extra that installs it, for those that --isolate gives an environment of their own
EXTRAS = {
    "tlens-patching": "transformer-lens",
    "tlens-hooks": "transformer-lens",
    "tlens-attribution": "transformer-lens",
    "nnsight": "nnsight",
    "nnsight-invokes": "nnsight",
    "pyvene": "pyvene",
    "pyvene-batched": "pyvene",
    "sae-lens": "sae-lens",
}


def make_workload(
    model: str,
    folder: Path,
    *,
    shape: Shape | None = None,
    pairs_file: str | None = None,
    n_pairs: int = 1,
    length: int = 16,
    metric: str = "ie",
    device: str = "cpu",
    batches: Sequence[int] = (16, 64, 256),
    threads: int = 0,
    seed: int = 0,
    revision: str | None = None,
) -> Workload:
    """The workload of a command.

    Args:
        model: `random`, `random:` and one of SHAPES, or what `load_model` takes.
        folder: where a random model is written.
        shape: of `random`; a small GPT-NeoX's unless given.
        pairs_file: prompt pairs, all of one length; without it built-in models get arithmetic, others
            random tokens.
        n_pairs, length: of pairs that are made.
        metric, device, batches, threads: of the workload.
        seed: of a random model and of pairs that are made.
        revision: of a model of the hub.

    Raises:
        DeltapatchError: something about the model, the shape or the pairs is wrong.
    """
    check_metric(metric)
    if n_pairs < 1 or not batches or min(batches) < 1 or threads < 0:
        raise DeltapatchError(
            f"{n_pairs} pairs in batches of {', '.join(map(str, batches))}: both must be at least 1"
        )
    kind, _, name = model.partition(":")
    if kind == RANDOM and revision is not None:
        raise DeltapatchError(f"a random model has no revision {revision!r}: leave it out")
    if kind == RANDOM and name and name not in SHAPES:
        raise DeltapatchError(f"unknown shape {name!r}: choose from {', '.join(SHAPES)}")
    if kind == RANDOM:
        path = make_model(SHAPES[name] if name else shape or Shape(), folder, seed)
    else:
        path = find_folder(model, revision=revision)
    loaded = load_model(path, device=device)
    pairs: Sequence[PromptPair]
    if pairs_file is not None:
        pairs = read_pairs(pairs_file)
    elif model.startswith(BUILTIN):
        drawn = arithmetic_pairs(loaded.tokenizer, per_template=max(2, n_pairs), shots=0, seed=seed)[0]
        pairs = _of_most_common_length(drawn, loaded)[:n_pairs]
    else:
        pairs = [PromptPair(*pair) for pair in make_pairs(loaded, n_pairs, length, seed)]
    encoded = encode_pairs(pairs, loaded.tokenizer, loaded.spec.d_vocab)
    for number, pair in enumerate(encoded):
        if pair.answer_tokens > 1:
            raise DeltapatchError(
                f"bench compares answers of one token, since its peers read one position, but pair {number} "
                f"has one of {pair.answer_tokens}: make pairs with --answers one"
            )
        if pair.clean_others or pair.corrupted_others:
            raise DeltapatchError(
                f"bench compares answers of one token, and pair {number} has any of several: give one"
            )
    ids = one_length([(p.clean, p.corrupted, p.clean_answer[0], p.corrupted_answer[0]) for p in encoded])
    return Workload(str(path), *ids, metric=metric, device=device, batches=batches, threads=threads)


def _of_most_common_length(pairs: Sequence[PromptPair], model: Model) -> list[PromptPair]:
    encoded = encode_pairs(pairs, model.tokenizer, model.spec.d_vocab)
    wanted = Counter(len(p.clean) for p in encoded).most_common(1)[0][0]
    return [pair for pair, e in zip(pairs, encoded, strict=True) if len(e.clean) == wanted]


def all_names() -> list[str]:
    """Every peer of a comparison of sweeps, then deltapatch in each precision."""
    return [*(name for name in PEERS if name not in ONLY_EDITS), *ours()]


def check_names(names: Sequence[str]) -> list[str]:
    """The names of peers, each once; nothing is imported beside deltapatch."""
    known = all_names()
    for name in names:
        if name not in known:
            raise DeltapatchError(f"unknown peer {name!r}: choose from {', '.join(known)}")
    if not names:
        raise DeltapatchError(f"no peers were given: choose from {', '.join(known)}")
    return list(dict.fromkeys(names))


def side_maker(isolate: bool, cache: Path | None, say: Callable[[str], None]) -> MakeSide:
    """Starts sides as processes; with `isolate`, peers with an extra get an environment of their own."""

    def make(name: str, job: Job) -> Lines:
        python = sys.executable
        if isolate and name in EXTRAS:
            try:
                python = isolated_python(EXTRAS[name], cache or default_cache(), say)
            except DeltapatchError as error:  # the others can still be measured
                return absent(str(error))
        log = Path(job.folder) / f"{name}.log"
        return lines_of(
            python, job.work.threads, "deltapatch.bench.sides.side", name, str(job.save()), log=log
        )

    return make


def absent(reason: str) -> Lines:
    """A side that could not even be started."""
    yield {"missing": reason}
