"""`deltapatch info`: what a model is, what memory it takes, what sweeps of it would cost."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deltapatch.arguments import in_bytes, n_bytes
from deltapatch.cli.options import as_json, in_flops, in_seconds, print_json, revision, stream
from deltapatch.errors import DeltapatchError

if TYPE_CHECKING:
    from deltapatch.models.model import Model

EXAMPLES = """\b
Examples:
  deltapatch info builtin:gpt-neox-arithmetic
  deltapatch info EleutherAI/gpt-j-6b --length 24 --stream
  deltapatch info MODEL --n-pairs 1000 --json
"""

# site, positions and what a reader calls the sweep
SWEEPS = (
    ("mlp_out", "all", "MLP outputs, all positions"),
    ("attn_out", "all", "attention outputs, all positions"),
    ("z", "last", "heads, last position"),
    ("z", "all", "heads, all positions"),
    ("mlp_out.dim", "last", "coordinates of the MLP output, last position"),
    ("mlp_post", "last", "hidden neurons, last position"),
    ("mlp_post", "all", "hidden neurons, all positions"),
)


@click.command(short_help="Say what a model is and what sweeps cost.", epilog=EXAMPLES)
@click.argument("model", metavar="MODEL")
@click.option("--length", default=16, show_default=True, help="Tokens of a prompt, for what sweeps cost.")
@click.option("--n-pairs", default=1, show_default=True, help="Prompt pairs, for what sweeps cost.")
@click.option("--memory-budget", help="Memory that a sweep may use beside the model: 2GB, 512MiB.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@stream
@revision
@click.option("--untimed", is_flag=True, help="Do not time anything: say no times.")
@as_json
def info(
    *,
    model: str,
    length: int,
    n_pairs: int,
    memory_budget: str | None,
    device: str,
    stream: bool,
    revision: str | None,
    untimed: bool,
    as_json: bool,
) -> None:
    """Say what MODEL is: its shapes, its memory, and what sweeps over all layers take.

    Only config.json is needed; weights are read where they are streamed and here. Where a folder cannot be
    loaded, its sweeps are forecast from config.json, and what is wrong is said. FLOPs are the necessary
    ones: products of the layers after each patch, from its position on, and the read-out. Times are those of
    this machine: its rates at the model's shapes are measured.
    """
    for option, value in (("--length", length), ("--n-pairs", n_pairs)):
        if value < 1:
            raise DeltapatchError(f"{option} {value} is too few: give at least 1")
    budget = n_bytes(memory_budget, "--memory-budget")
    found, problem = _model(model, device, stream, revision)
    facts = {"model": model, "revision": revision, "cannot_be_loaded": problem}
    facts |= _facts(found, length, n_pairs, budget, not untimed)
    if as_json:
        print_json(facts)
    else:
        click.echo(_text(facts), nl=False)


def _facts(model: "Model", length: int, n_pairs: int, budget: int | None, timed: bool) -> dict[str, Any]:
    from deltapatch.engine.options import SweepOptions
    from deltapatch.engine.planning.costs import parameters
    from deltapatch.engine.planning.forecast import forecasts
    from deltapatch.engine.question import ask

    spec, pairs = model.spec, _pairs(n_pairs, length, model.spec.d_vocab)
    asked = [SweepOptions(sites=site, positions=at, memory_budget=budget) for site, at, _ in SWEEPS]
    found = forecasts([ask(model, pairs, each) for each in asked], timed)
    sweeps: list[dict[str, Any]] = [
        {"site": site, "positions": at} | one.as_dict()
        for (site, at, _), one in zip(SWEEPS, found, strict=True)
    ]
    by = {(s["site"], s["positions"]): s for s in sweeps}
    n = parameters(spec)
    return {
        "spec": asdict(spec),
        "parameters": n,
        "memory_bytes": {"float32": 4 * n, "bfloat16": 2 * n, "weights": model.n_bytes},
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "stream": model.stream,
        "length": length,
        "n_pairs": n_pairs,
        "sweeps": [{"what": what} | by[site, positions] for site, positions, what in SWEEPS],
    }


def _model(name: str, device: str, stream: bool, revision: str | None) -> tuple["Model", str | None]:
    """The model where it is streamed and its weights are here, else one of its shapes; why it cannot load.

    Of weights that are here the headers are looked at, not the numbers.
    """
    from deltapatch.models.folder import find_folder, read_json
    from deltapatch.models.load import choose_device, load_model
    from deltapatch.models.stand_in import stand_in

    folder = find_folder(name, ("config.json",), revision=revision)
    if not (folder / "config.json").is_file():
        raise DeltapatchError(f"{folder} has no config.json: it is not a model folder")
    config = folder / "config.json"
    model = stand_in(read_json(config), str(config), choose_device(device), stream)
    if not Path(name).is_dir() and not any(folder.glob("*.safetensors")):
        return model, None  # of a hub's model, whose weights are fetched when they are wanted
    try:
        streamed = load_model(folder, device=device, stream=True)
    except DeltapatchError as error:
        return model, str(error)
    return (streamed if model.stream else model), None


def _pairs(n: int, length: int, d_vocab: int) -> list[Any]:
    import numpy as np

    from deltapatch.interventions.pairs import PromptPair

    drawn = np.random.default_rng(0).integers(0, d_vocab, (n, 2, length)).tolist()
    return [PromptPair(clean, corrupted, 0, d_vocab - 1) for clean, corrupted in drawn]


def _text(facts: dict[str, Any]) -> str:
    import numpy as np

    from deltapatch.analysis.render import as_text
    from deltapatch.analysis.tables import Table

    spec = facts["spec"]
    rope = spec["rope"]
    memory = facts["memory_bytes"]
    kv = "" if spec["n_kv_heads"] == spec["n_heads"] else f" ({spec['n_kv_heads']} for keys and values)"
    scaling = "" if rope["scaling"] == "none" else f", {rope['scaling']} scaling by {rope['factor']:g}"
    turns = ", interleaved" if rope["interleaved"] else ""
    lines = {
        "architecture": spec["architecture"],
        "layers": f"{spec['n_layers']}, {'parallel' if spec['parallel'] else 'sequential'} block",
        "d_model": spec["d_model"],
        "heads": f"{spec['n_heads']}{kv} of {spec['d_head']}",
        "hidden neurons": f"{spec['d_mlp']}, {'gated ' if spec['gated'] else ''}{spec['activation']}",
        "vocabulary": f"{spec['d_vocab']}{', tied' if spec['tied_embeddings'] else ''}",
        "context": spec["context"],
        "norm": {"layer": "LayerNorm", "rms": "RMSNorm"}[spec["norm"]] + _where_norms_are(spec),
        "positions": "learned"
        if spec["learned_positions"]
        else f"rotary, {rope['dim']} of {spec['d_head']}{turns}{scaling}",
        **_attention(spec),
        "parameters": f"{facts['parameters']:,} in matrices",
        "memory": f"{in_bytes(memory['float32'])} in float32, {in_bytes(memory['bfloat16'])} in 16 bits",
        "here": f"{in_bytes(memory['weights'])} in {facts['dtype']} on {facts['device']}"
        + (", streamed: every pass reads the file" if facts["stream"] else ""),
    }
    sweeps = facts["sweeps"]
    columns = {
        "sweep": np.array([s["what"] for s in sweeps], dtype=object),
        "site": np.array([s["site"] for s in sweeps], dtype=object),
        "rows": np.array([s["rows"] for s in sweeps]),
        "passes": np.array([s["passes"] for s in sweeps]),
        "necessary": np.array([in_flops(s["necessary_flops"]) for s in sweeps], dtype=object),
        "memory": np.array([in_bytes(s["memory_bytes"]["pass"]) for s in sweeps], dtype=object),
    }
    if "predicted_seconds" in sweeps[0]:
        times = [f"about {in_seconds(s['predicted_seconds'])}" for s in sweeps]
        columns["time here"] = np.array(times, dtype=object)
    if facts["cannot_be_loaded"]:
        lines["loading"] = f"fails: {facts['cannot_be_loaded']}"
        lines[""] = "what follows is told by config.json"
    head = "".join(f"{name:<15} {value}\n" for name, value in lines.items())
    of = "one pair" if facts["n_pairs"] == 1 else f"{facts['n_pairs']:,} pairs"
    title = f"Sweeps over all layers, for {of} of {facts['length']} tokens"
    at = "" if facts["revision"] is None else f" at {facts['revision']}"
    return f"{facts['model']}{at}\n\n{head}\n{as_text(Table(columns, 'rows'), title)}"


def _where_norms_are(spec: dict[str, Any]) -> str:
    """Of norms that are elsewhere than before attention and MLP."""
    behind = {
        (True, True): ", behind attention and MLP too",
        (False, True): ", behind attention and MLP alone",
    }
    each = "; of each head's queries and keys"
    heads = {
        "head": each,
        "each": f"{each}, with weights of its own",
        "width": "; of all queries and of all keys",
    }
    return behind.get((spec["pre_norm"], spec["post_norm"]), "") + heads.get(spec["qk_norm"], "")


def _attention(spec: dict[str, Any]) -> dict[str, str]:
    """Windows and soft caps, where there are any."""
    said = []
    if spec["scores_by_depth"]:
        said.append("scores divided by the layer's number, from 1")
    windows = [window for window in spec["windows"] if window is not None]
    if windows:
        said.append(f"windows of {windows[0]:,} in {len(windows)} of {spec['n_layers']} layers")
    if spec["attention_softcap"] is not None:
        said.append(f"scores capped at {spec['attention_softcap']:g}")
    if spec["logit_softcap"] is not None:
        said.append(f"logits capped at {spec['logit_softcap']:g}")
    return {"attention": ", ".join(said)} if said else {}
