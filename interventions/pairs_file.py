"""Prompt pairs as users bring them: objects, dictionaries, or a file of one JSON object a line."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from deltapatch.errors import DeltapatchError, path_of, shown
from deltapatch.interventions.alignment import ENDS
from deltapatch.interventions.encode import weighted
from deltapatch.interventions.pairs import AnyOf, PromptPair
from deltapatch.models.header import check_file

# What may be given as the pairs of a sweep or run.
Pairs = str | os.PathLike[str] | PromptPair | Mapping[str, Any] | Iterable[PromptPair | Mapping[str, Any]]

_REQUIRED = ("clean", "corrupted", "clean_answer", "corrupted_answer")
_ANSWERS = ("clean_answer", "corrupted_answer")
_FIELDS = tuple(f.name for f in fields(PromptPair))


def load_pairs(path: str | os.PathLike[str]) -> list[PromptPair]:
    """Read a pairs file. Empty lines are skipped.

    Raises:
        DeltapatchError: the file is missing, unreadable or empty; a line is broken JSON or no object;
            a field is missing, unknown or of the wrong type. The message names the file and the line.
    """
    return [pair for _, pair in read_named_pairs(path)]


read_pairs = load_pairs  # its name in 0.1


def read_named_pairs(path: str | os.PathLike[str]) -> list[tuple[str, PromptPair]]:
    """As `load_pairs`, each pair with its name for errors, for example "pairs.jsonl, line 7"."""
    path = path_of(path, "a pairs file")
    try:
        check_file(path)
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DeltapatchError(
            f"There is no pairs file {path}; `deltapatch pairs` writes one, or give the path of your own."
        ) from None
    except UnicodeDecodeError as error:
        raise DeltapatchError(
            f"The pairs file {path} is not UTF-8 text (byte {error.start}); save it as UTF-8."
        ) from None
    except OSError as error:
        raise DeltapatchError(f"The pairs file {path} cannot be read: {error.strerror}.") from None
    # Not splitlines(): JSON strings may hold characters that it takes for the end of a line.
    lines = [(f"{path}, line {n}", line) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise DeltapatchError(f"The pairs file {path} is empty; it needs one JSON object a line.")
    return [(name, _pair(line, name)) for name, line in lines]


def as_pairs(pairs: Pairs) -> tuple[list[PromptPair], list[str]]:
    """The pairs that an argument plainly means, and what errors call each of them.

    Args:
        pairs: one or several, each a `PromptPair`, a dictionary with its fields, or what has its fields as
            attributes; or the path of a pairs file.

    Raises:
        DeltapatchError: it is something else, or the file is wrong.
    """
    if isinstance(pairs, str | os.PathLike):
        names, found = zip(*read_named_pairs(pairs), strict=True)
        return list(found), list(names)
    given: Any = [pairs] if _is_pair(pairs) else pairs
    if not isinstance(given, Iterable):
        raise DeltapatchError(f"pairs must be prompt pairs or the path of a pairs file, not {shown(pairs)}")
    out: list[PromptPair] = []
    for one in given:
        name = f"pair {len(out)}"
        if not _is_pair(one):
            raise DeltapatchError(
                f"{name} must be a PromptPair or a dictionary with its fields, not {shown(one)}; a file is "
                "given by its path alone"
            )
        if isinstance(one, Mapping):
            _check_fields(one, name)
            one = _made(one)
        out.append(one)
    return out, [f"pair {i}" for i in range(len(out))]


def lasting(pairs: Pairs) -> Pairs:
    """The same, to be read several times: a file stays one, whose lines errors name, all else is a list."""
    return pairs if isinstance(pairs, str | os.PathLike) else as_pairs(pairs)[0]


def write_pairs(path: str | os.PathLike[str], pairs: Sequence[PromptPair]) -> None:
    """Write a pairs file, whole or not at all. Missing folders are made, an existing file is replaced.

    Raises:
        DeltapatchError: the file cannot be written, or a pair's meta holds what JSON cannot.
    """
    path = path_of(path, "a pairs file")
    try:
        text = "".join(json.dumps(_fields(p), ensure_ascii=False, allow_nan=False) + "\n" for p in pairs)
    except (TypeError, ValueError, RecursionError) as error:
        raise DeltapatchError(f"The pairs cannot be written to {path}: {error}.") from None
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Half a surrogate pair cannot be UTF-8; as an escape it is still JSON.
        part.write_bytes(text.encode("utf-8", errors="backslashreplace"))
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise DeltapatchError(f"The pairs file {path} cannot be written: {error.strerror}.") from None


def _fields(pair: PromptPair) -> dict[str, Any]:
    """What a line says of a pair; `align` and `weights` only where there is something to say."""
    found = asdict(pair)
    if isinstance(pair.weights, Mapping):  # keys of JSON are text, which ids are not
        found["weights"] = list(pair.weights.items())
    return {field: value for field, value in found.items() if value is not None}


def _pair(line: str, name: str) -> PromptPair:
    """The pair of one line."""
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise DeltapatchError(f"{name}: broken JSON at column {error.colno} ({error.msg}).") from None
    except RecursionError:
        raise DeltapatchError(f"{name}: broken JSON (nested too deeply).") from None
    except ValueError as error:  # a number of thousands of digits
        raise DeltapatchError(f"{name}: broken JSON ({error}).") from None
    if not isinstance(found, dict):
        raise DeltapatchError(
            f"{name}: a pair is a JSON object with the fields {', '.join(_REQUIRED)}, not {_kind(found)}."
        )
    _check_fields(found, name)
    for field in ("clean", "corrupted"):
        if not isinstance(found[field], str) and not _is_ids(found[field]) and not _is_chat(found[field]):
            raise DeltapatchError(
                f"{name}: {field!r} must be text or a list of token ids (whole numbers), or of messages as "
                '{"role": "user", "content": "..."}.'
            )
    for field in _ANSWERS:
        value = found[field]
        if isinstance(value, dict):
            _check_any(value, field, name)
        elif not isinstance(value, str) and not _is_int(value) and not _is_ids(value):
            kind = "a list of anything else" if isinstance(value, list) else _kind(value)
            raise DeltapatchError(
                f"{name}: {field!r} must be text, a token id or a list of them, not {kind}."
            )
    labels = found.get("labels", {})
    if not isinstance(labels, dict) or not all(_is_int(p) or isinstance(p, str) for p in labels.values()):
        raise DeltapatchError(
            f"{name}: 'labels' must be an object of positions or texts, for example {{\"op1\": 4}}."
        )
    if not isinstance(found.get("meta", {}), dict):
        raise DeltapatchError(f"{name}: 'meta' must be an object, not {_kind(found['meta'])}.")
    align = found.get("align")
    if align is not None and align != ENDS and not _is_map(align):
        raise DeltapatchError(
            f"{name}: 'align' must be {ENDS!r} or a list of [clean position, corrupted position]."
        )
    if found.get("weights") is not None:
        weighted(found["weights"], name)
    return _made(found)


def _check_any(value: dict[str, Any], field: str, name: str) -> None:
    """Check what stands for `AnyOf`."""
    several = value.get("any")
    if value.keys() != {"any"} or not isinstance(several, list):
        raise DeltapatchError(
            f"{name}: {field!r}, as an object, must be any of several answers, for example "
            '{"any": [" yes", " Yes"]}.'
        )
    if not all(isinstance(one, str) or _is_int(one) for one in several):
        raise DeltapatchError(f"{name}: each of {field!r} must be text or a token id.")


def _made(found: Mapping[str, Any]) -> PromptPair:
    """A pair of its fields, an object among the answers being any of several."""
    fields_ = dict(found)
    for field in _ANSWERS:
        if isinstance(fields_[field], Mapping) and fields_[field].keys() == {"any"}:
            fields_[field] = AnyOf(fields_[field]["any"])
    return PromptPair(**fields_)


def _check_fields(found: Mapping[str, Any], name: str) -> None:
    missing = [field for field in _REQUIRED if field not in found]
    if missing:
        raise DeltapatchError(f"{name}: the field {missing[0]!r} is missing.")
    unknown = [field for field in found if field not in _FIELDS]
    if unknown:
        raise DeltapatchError(
            f"{name}: the field {shown(unknown[0])} is unknown; a pair has {', '.join(_FIELDS)} "
            "(anything else belongs in meta)."
        )


def _is_pair(value: object) -> bool:
    return isinstance(value, Mapping) or all(hasattr(value, field) for field in _REQUIRED)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(_is_int(i) for i in value)


def _is_map(value: Any) -> bool:
    return isinstance(value, list) and all(_is_ids(one) and len(one) == 2 for one in value)


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)


def _kind(value: Any) -> str:
    """What a JSON value is, in JSON's words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, str):
        return "text"
    return "an object" if isinstance(value, dict) else "a list"
