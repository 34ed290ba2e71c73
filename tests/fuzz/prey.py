"""Reads what it is told to, in a process that may die: prey.py BYTES, one request a line, one answer a line.

An answer says what came of it: "ok" with a digest of the result, "refused" with the sentence, or "raised".
The process may take so many bytes of memory more than it has once all is imported, and no more.
"""

import hashlib
import json
import os
import resource
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers  # noqa: F401  # before memory is limited
from transformers import AutoTokenizer  # noqa: F401

import deltapatch
from deltapatch.interventions.encode import encode_pairs
from deltapatch.interventions.pairs_file import read_named_pairs, write_pairs
from deltapatch.models.convert import convert
from deltapatch.results.merge import merge
from deltapatch.tasks.facts import read_facts
from deltapatch.tasks.problem_file import read_problems


def model(path: Path, **options: object) -> bytes:
    loaded = deltapatch.load_model(path, device="cpu", **options)  # type: ignore[arg-type]
    logits = loaded.logits([1, 2, 3])
    assert logits.shape == (3, loaded.spec.d_vocab)
    return loaded.fingerprint().encode() + logits.numpy().tobytes()


def tokenizer(path: Path) -> bytes:
    loaded = deltapatch.load_model(path, device="cpu")
    pair = deltapatch.PromptPair("3 + 4 =", "5 + 4 =", " 7", " 9")
    return repr(encode_pairs([pair], loaded.tokenizer, loaded.spec.d_vocab)).encode()


def pairs(path: Path) -> bytes:
    loaded = deltapatch.load_model(path / "model", device="cpu")
    named = read_named_pairs(path / "pairs.jsonl")
    write_pairs(path / "again.jsonl", [pair for _, pair in named])
    assert [p for _, p in read_named_pairs(path / "again.jsonl")] == [p for _, p in named]
    encoded = encode_pairs(
        [p for _, p in named], loaded.tokenizer, loaded.spec.d_vocab, [n for n, _ in named]
    )
    return repr(encoded).encode()


def run(path: Path) -> bytes:
    effects = deltapatch.load_effects(path)
    digest = hashlib.sha256(repr((effects.pairs, effects.direction, effects.accuracy())).encode())
    for site in effects.sites:
        digest.update(repr((site, effects.layers_of(site).tolist(), effects.positions(site))).encode())
        for metric in effects.metrics:
            digest.update(np.nan_to_num(effects.values(metric, site)).tobytes())
    effects.columns(effects.metrics)
    return digest.digest()


def outcome(path: Path) -> bytes:
    found = deltapatch.load_outcome(path)
    found.columns(found.metrics)
    return repr(
        (found, found.pair.tolist(), [found.values(metric).tolist() for metric in found.metrics])
    ).encode()


def edges(path: Path) -> bytes:
    found = deltapatch.load_edges(path)
    told = [found.edges, found.positions, found.direction, found.accuracy(), found.pairs]
    numbers = [found.values(m, e).tobytes() for m in found.metrics for e in found.grid.effects]
    found.columns(found.metrics)
    return repr((told, numbers)).encode()


def merged(path: Path) -> bytes:
    merge(path)
    return (path / "effects.safetensors").read_bytes() + (path / "pairs.jsonl").read_bytes()


def converted(path: Path) -> bytes:
    return model(convert(path, path.with_name("converted")))


def autoencoder(path: Path) -> bytes:
    found = deltapatch.load_sae(path)
    features, scale = found.encode(torch.linspace(-1, 1, 3 * found.d_in).view(3, -1))
    rows = found.rows(torch.arange(min(2, found.d_sae)))
    return repr((found, features.tolist(), scale.tolist(), rows.tolist())).encode()


TARGETS: dict[str, Callable[[Path], bytes]] = {
    "model": model,
    "streamed": lambda path: model(path, stream=True),
    "adapter": lambda path: model(path / "model", adapter=path / "adapter"),
    "tokenizer": tokenizer,
    "pairs": pairs,
    "run": run,
    "outcome": outcome,
    "listed": outcome,
    "autoencoder": autoencoder,
    "edges": edges,
    "merge": merged,
    "convert": converted,
    "facts": lambda path: repr(read_facts(path / "facts.jsonl", None)).encode(),
    "problems": lambda path: repr(read_problems(path / "problems.jsonl")).encode(),
}


def answer(target: str, path: Path) -> dict[str, str]:
    try:
        return {"outcome": "ok", "text": hashlib.sha256(TARGETS[target](path)).hexdigest()}
    except deltapatch.DeltapatchError as error:
        return {"outcome": "refused", "text": str(error)}
    except BaseException:
        return {"outcome": "raised", "text": traceback.format_exc()[-3000:]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + int(sys.argv[1]),) * 2)
    # The tokenizers library tells stdout of keys that it does not know.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(answer(request["target"], Path(request["path"]))), file=answers, flush=True)
