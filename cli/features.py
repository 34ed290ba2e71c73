"""`deltapatch features`: every feature of sparse autoencoders that a pair's prompts have differently."""

from pathlib import Path
from typing import Any

import click

from deltapatch.cli.options import (
    as_json,
    asked,
    loading,
    print_json,
    quiet,
    read_asked,
    read_shard,
    say,
)
from deltapatch.engine.options import Options
from deltapatch.errors import DeltapatchError

EXAMPLES = """\b
Examples:
  deltapatch features --model MODEL --pairs pairs.jsonl --sae SAE --out FEATURES
  deltapatch features --model MODEL --pairs pairs.jsonl --sae SAE5 --sae SAE9 --positions last --out FEATURES
  deltapatch features --model MODEL --pairs pairs.jsonl --sae params.npz --at resid_post.20 --out FEATURES
  deltapatch effects FEATURES --by layer,feature --top 20
"""


@click.command(short_help="Patch every feature of sparse autoencoders.", epilog=EXAMPLES)
@loading
@click.option("--pairs", "pairs_file", required=True, help="Prompt pairs, one JSON object a line.")
@click.option(
    "--sae",
    "paths",
    multiple=True,
    required=True,
    help="A sparse autoencoder: a folder of SAELens or an archive of Gemma Scope (params.npz). May be given "
    "several times.",
)
@click.option(
    "--at",
    "places",
    multiple=True,
    metavar="SITE.LAYER",
    help="Where it reads, such as resid_post.20, for each --sae in turn; needed where a file does not say.",
)
@click.option(
    "--positions",
    default="all",
    show_default=True,
    help="all, last, numbers (from the end where negative) and labels.",
)
@click.option(
    "--least",
    type=float,
    default=0.0,
    show_default=True,
    help="Leave out features whose activation changes by this much or less.",
)
@asked(Options)
@click.option("--out", required=True, help="The run folder to make; it must not exist, unless resumed.")
@click.option("--resume", is_flag=True, help="Go on with the same run where it was cut off.")
@click.option("--shard", metavar="I/N", help="Do part I of N only: N processes share --out; then merge.")
@as_json
@quiet
def features(
    *,
    model: str,
    revision: str | None,
    device: str,
    dtype: str,
    adapter: str | None,
    stream: bool,
    pairs_file: str,
    paths: tuple[str, ...],
    places: tuple[str, ...],
    positions: str,
    least: float,
    out: str,
    resume: bool,
    shard: str | None,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Patch every feature of sparse autoencoders that differs between the prompts of a pair, each alone.

    A feature moves what its autoencoder reads by its change of activation times its decoder's row; what the
    autoencoder gets wrong stays as it is. With --source zero features are taken out of the base run.
    """
    if places and len(places) != len(paths):
        raise DeltapatchError(f"{len(places)} --at and {len(paths)} --sae: give one for each, or none")
    part = read_shard(shard)
    options = read_asked(Options, given)

    from deltapatch import arguments
    from deltapatch.results.folder import check_output

    if not resume and part is None:
        check_output(out)
    unknown: list[tuple[str | None, int | None]] = [(None, None)] * len(paths)
    at = [_place(text) for text in places] or unknown

    from deltapatch.analysis.features import sweep_features
    from deltapatch.models.autoencoder import load_sae
    from deltapatch.models.load import load_model

    saes = [load_sae(path, site=site, layer=l) for path, (site, l) in zip(paths, at, strict=True)]
    named = {} if revision is None else {"revision": revision}
    loaded = load_model(model, device=device, dtype=dtype, stream=stream, adapter=adapter, **named)
    say(repr(loaded), quiet)
    for sae in saes:
        say(repr(sae), quiet)
    found = sweep_features(
        loaded,
        Path(pairs_file),
        saes,
        positions=arguments.positions(positions),
        least=least,
        progress=not quiet,
        out=out,
        resume=resume,
        shard=part,
        **options,
    )
    if part is not None:
        say(f"part {shard} is done; when all are: deltapatch merge {out}", quiet)
    else:
        say(f"{len(found):,} features patched in {found.meta['seconds']:.1f} s", quiet)
    if as_json:
        print_json({"out": out, "features": len(found), "pairs": len(found.pairs), "run": found.meta})
    else:
        click.echo(out)


def _place(text: str) -> tuple[str | None, int | None]:
    """resid_post.20: a site and a layer."""
    site, _, layer = text.rpartition(".")
    if not site or not layer.isdecimal():
        raise DeltapatchError(f"--at {text!r} is no place such as resid_post.20, a site and a layer")
    return site, int(layer)
