"""Effects of all edges by deltapatch and by the tools of others, on the same small models in one run.

    python -m deltapatch.bench.edge_compare --out bench/results/edge_peers_cpu.json

Models are GPT-2's, GPT-NeoX's (attention and MLP side by side) and LLaMA's (grouped queries) with random
weights; biases and norms' scales are random too, so that what is left out would show. The clean run is the
base. Every tool has a process of its own, and one that needs other versions an environment of its own; it
tries a few batch sizes on some edges, and does all edges at the best. deltapatch in float64 judges: no time
is told of effects that differ from its by more than a thousandth of the largest. The file is written after
every model.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PretrainedConfig,
)

from deltapatch.bench.edge_peers.base import Job
from deltapatch.bench.edge_peers.work import PEERS
from deltapatch.bench.random_models import make_tokenizer
from deltapatch.bench.results import check_free, stamp, write
from deltapatch.bench.sides.isolate import default_cache, isolated_python, python_of
from deltapatch.bench.sides.process import lines_of
from deltapatch.engine.sweep import sweep_edges
from deltapatch.errors import DeltapatchError
from deltapatch.interventions.nodes import Keys
from deltapatch.models.load import load_model
from deltapatch.results.folder import environment

KEYS: tuple[Keys, ...] = ("query", "kv")
MODELS = ("gpt2", "gpt_neox", "llama")
WORK = "deltapatch.bench.edge_peers.work"  # what each peer's process does
_WORST = 1e-3  # of the largest effect
# AutoCircuit wraps HookedTransformer, which version 4 has not; version 2 needs numpy before 2, as do these.
AUTO_CIRCUIT = ("auto-circuit==1.0.1", "transformer-lens<3", "datasets<4", "pyarrow<20")

Say = Callable[[str], None]


def config_of(architecture: str, *, layers: int, heads: int, d_model: int, vocab: int) -> PretrainedConfig:
    """The shape of a model; LLaMA's has two query heads for every key-value head."""
    ends: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}
    if architecture == "gpt2":
        return GPT2Config(
            n_layer=layers, n_head=heads, n_embd=d_model, vocab_size=vocab, n_positions=128,
            n_ctx=128, **ends,  # n_ctx: its old name, which TransformerLens reads
        )  # fmt: skip
    sizes: dict[str, Any] = {
        "num_hidden_layers": layers, "num_attention_heads": heads, "hidden_size": d_model,
        "intermediate_size": 4 * d_model, "vocab_size": vocab, "max_position_embeddings": 128,
    }  # fmt: skip
    if architecture == "gpt_neox":
        return GPTNeoXConfig(**sizes, **ends)
    return LlamaConfig(**sizes, num_key_value_heads=heads // 2, **ends)


def make_model(config: PretrainedConfig, folder: Path, *, seed: int = 0) -> Path:
    """Write a model with random weights, biases and norms' scales too, and a tokenizer of numbers."""
    model = AutoModelForCausalLM.from_config(config).float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 1:
                weight.copy_(0.1 * noise + (1 if name.endswith("weight") else 0))
            elif any(part in name for part in ("wte", "wpe", "embed")):
                weight.copy_(0.5 * noise)
            else:
                weight.copy_(noise * min(weight.shape) ** -0.5)
    model.save_pretrained(folder)
    make_tokenizer(config.vocab_size).save_pretrained(folder)
    return folder


def make_job(
    folder: Path,
    *,
    pairs: int,
    length: int,
    first: int,
    repeats: int = 1,
    seed: int = 0,
) -> tuple[Job, dict[Keys, np.ndarray]]:
    """The job on a model, and deltapatch's effects in float64: {how keys are counted: [pair, edge]}.

    Prompts are random tokens that differ from the first on; answers are the tokens whose logits change most.
    """
    model = load_model(folder, device="cpu")
    spec = model.spec
    rng = np.random.default_rng(seed)
    clean = rng.integers(0, spec.d_vocab, (pairs, length))
    corrupted = clean.copy()
    corrupted[:, first:] += rng.integers(1, spec.d_vocab, (pairs, length - first))
    corrupted %= spec.d_vocab
    prompts = clean.tolist(), corrupted.tolist()
    answers = []
    for a, b in zip(*prompts, strict=True):
        change = model.logits(a)[-1] - model.logits(b)[-1]
        answers.append([int(change.argmax()), int(change.argmin())])
    job = Job(
        str(folder), *prompts, answers, spec.n_layers, spec.n_heads, spec.n_kv_heads,
        parallel=spec.parallel, repeats=repeats,
    )  # fmt: skip
    true: dict[Keys, np.ndarray] = {}
    for keys in KEYS:
        found = sweep_edges(
            model,
            job.pairs,
            keys=keys,
            direction="noise",
            precision="fp64",
            metrics="logit_diff",
            progress=False,
        )
        job.edges[keys], true[keys] = found.edges, found.flat("logit_diff")
    return job, true


def python_for(name: str, cache: Path, say: Say) -> str:
    """The interpreter that a peer runs in. DeltapatchError where it cannot be made."""
    if name == "tlens":
        return isolated_python("transformer-lens", cache, say)
    if name == "auto-circuit":
        return python_of(name, AUTO_CIRCUIT, cache, say)
    return sys.executable


def together(lines: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """What the process of a peer said, as one object; `error` where it failed."""
    out: dict[str, Any] = {"seconds": [], "trials": {}}
    for line in lines:
        if "trial_seconds" in line:
            out["trials"][str(line["batch"])] = line["trial_seconds"]
        elif "seconds" in line:
            out["seconds"].append(line["seconds"])
        else:
            out.update(line)
    return out


def judged(said: dict[str, Any], effects: Path, true: np.ndarray) -> dict[str, Any]:
    """What a peer said, and how far its effects are from the true ones; without times where that is far."""
    if "error" in said:
        return {"status": "failed", **said, "seconds": []}
    apart = np.abs(np.load(effects) - true).max() / np.abs(true).max()
    if not apart <= _WORST:
        return {"status": "disagrees", **said, "seconds": [], "trials": {}, "difference": float(apart)}
    return {"status": "measured", **said, "difference": float(apart)}


def compare(
    models: Sequence[str], peers: Sequence[str], cache: Path, say: Say, *, sizes: dict[str, int],
    options: dict[str, int], keep: Callable[[dict[str, Any]], None] = lambda found: None,
) -> dict[str, Any]:  # fmt: skip
    """Everything: model -> its edges, and what each peer took and how far off it was.

    Args:
        models, peers: some of MODELS and PEERS.
        cache: where environments are kept.
        say: what is told meanwhile.
        sizes: of `config_of`.
        options: of `make_job`.
        keep: is given what there is after every model.
    """
    from deltapatch.bench.edge_peers.work import make_peer

    out: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="deltapatch-edges-") as temporary:
        for architecture in models:
            folder = make_model(config_of(architecture, **sizes), Path(temporary) / f"model-{len(out)}")
            job, true = make_job(folder, **options)
            job.save(folder / "job.json")
            found = {}
            for name in peers:
                peer, effects = make_peer(name), folder / f"{name}.npy"
                say(f"{architecture}: {peer.what}")
                told = name, str(folder / "job.json"), str(effects)
                try:
                    python = python_for(name, cache, say)
                    said = together(lines_of(python, 1, WORK, *told, log=effects.with_suffix(".log")))
                except DeltapatchError as error:
                    said = {"error": str(error)}
                found[name] = {
                    "what": peer.what, "keys": peer.keys, "edges": len(job.edges[peer.keys]),
                    **judged(said, effects, true[peer.keys]),
                }  # fmt: skip
            out[architecture] = {"edges": len(job.edges["query"]), "peers": found}
            keep(out)
    return out


def main() -> None:
    """Measure, and write the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--cache", type=Path, default=default_cache(), help="where environments are kept")
    sizes = {"layers": 3, "heads": 8, "d_model": 256, "vocab": 4096}
    options = {"pairs": 2, "length": 16, "first": 10, "repeats": 3}
    for name, value in {**sizes, **options}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    given = vars(parser.parse_args())
    check_free(given["out"])
    sizes, options = ({name: given[name] for name in some} for some in (sizes, options))

    def keep(found: dict[str, Any]) -> None:
        if given["out"]:
            told = {"shape": sizes, "options": options, "models": found}
            write(given["out"], stamp("edge-peers", {**environment(), **told}))

    found = compare(
        given["models"], given["peers"], given["cache"], lambda text: print(text, file=sys.stderr),
        sizes=sizes, options=options, keep=keep,
    )  # fmt: skip
    print(json.dumps({a: {n: p.get("difference") for n, p in m["peers"].items()} for a, m in found.items()}))


if __name__ == "__main__":
    main()
