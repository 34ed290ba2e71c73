"""Result files: one JSON object a run, with the machine, the versions and every repeat.

    format, kind         "deltapatch bench"; compare, growth, precision, stream, edges, edge-peers or edits
    versions, machine, date
    model, workload      shapes; pairs, length, metric, batches (sizes that are tried), device
    options, limits      how it was measured; the best product rates by precision, copy bandwidth, threads
    quiet                others: the most that other processes took of a side's CPUs; note: a line about it
    sides                name -> what it is, versions, import and load seconds, threads, the CPUs that it is
                         pinned to, or why it is missing
    sweeps               [name, interventions, necessary_flops, oracle, columns]
      columns            side -> status (measured, missing, lacks, failed, disagrees), reason, rate, spread,
                         first_seconds, peak_bytes, agreement, sampled, of_product_rate
        of every repeat  seconds, rates, product_rate (measured after it), others
        of every run     batch (the size it chose), trials (size -> seconds a cell), times_as_fast (as the
                         fastest exact peer of that run)

A comparison of several models has `cases` in place of these, each with all of them.
A result of kind "edge-peers" has `models` instead: of each its edges, and of each peer what its process said.
A result of kind "stream" has `runs` instead: what was swept, what `forecast` predicted, and what it took, as
`stream.carry_out` returns it.

A result of kind "edits" has `rows`, `rates` and `ratios` of each sweep, as `edits.measure` returns them, and
`peers`: the same edits by other tools, a comparison.

A side that disagrees with the oracle has no times and no rates in the file either.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deltapatch.errors import DeltapatchError
from deltapatch.models.header import check_file

FORMAT = "deltapatch bench"
KINDS = ("compare", "growth", "precision", "stream", "edges", "edge-peers", "edits")


def stamp(kind: str, result: dict[str, Any]) -> dict[str, Any]:
    """A result as it is written."""
    found: dict[str, Any] = _plain({"format": FORMAT, "format_version": 1, "kind": kind, **result})
    return found


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for them."""
    if isinstance(value, dict):
        return {key: _plain(own) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(own) for own in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def cases(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The comparisons in a result, one for each model."""
    found: list[dict[str, Any]] = result.get("cases", [result])
    return found


def joined(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Comparisons as one result, which `cases` takes apart."""
    return found[0] if len(found) == 1 else {"cases": found}


def check_free(path: Path | None) -> None:
    """Raise DeltapatchError where a result could not be written after a long measurement."""
    if path is None:
        return
    if path.is_dir():
        raise DeltapatchError(f"{path} is a folder: give the file that the result should go to")
    if not path.resolve().parent.is_dir():
        raise DeltapatchError(f"the folder of {path} does not exist: make it first")


def write(path: Path, result: dict[str, Any]) -> None:
    """Write a result file; one that is there is replaced."""
    try:
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise DeltapatchError(f"cannot write {path}: {error.strerror}") from error


def read(path: Path) -> dict[str, Any]:
    """Read a result file.

    Raises:
        DeltapatchError: there is none, or it is not one.
    """
    try:
        check_file(path)
        found = json.loads(path.read_text(encoding="utf-8"))
    except DeltapatchError:
        raise
    except OSError as error:
        raise DeltapatchError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise DeltapatchError(f"{path} is not a result of deltapatch bench: it is not JSON") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT or found.get("kind") not in KINDS:
        raise DeltapatchError(f"{path} is not a result of deltapatch bench: run `deltapatch bench compare`")
    return found


def read_all(paths: Sequence[Path]) -> list[tuple[Path, dict[str, Any]]]:
    """The results in files, and in the JSON files of folders; those of other programs are left out there."""
    found = []
    for path in paths:
        if not path.is_dir():
            found.append((path, read(path)))
            continue
        for file in sorted(path.glob("*.json")):
            try:
                found.append((file, read(file)))
            except DeltapatchError:
                continue
    if not found:
        raise DeltapatchError(
            f"no results in {', '.join(map(str, paths))}: run `deltapatch bench compare --out RESULT.json`"
        )
    return found
