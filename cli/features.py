"""`deltapatch features`: every feature of sparse autoencoders that a pair's prompts have differently."""

from functools import partial
from typing import Any

import click

from deltapatch.cli.listed import at_positions, carry_out, of_pairs, screening
from deltapatch.errors import DeltapatchError

EXAMPLES = """\b
Examples:
  deltapatch features --model MODEL --pairs pairs.jsonl --sae SAE --out FEATURES
  deltapatch features --model MODEL --pairs pairs.jsonl --sae SAE5 --sae SAE9 --positions last --out FEATURES
  deltapatch features --model MODEL --pairs pairs.jsonl --sae params.npz --at resid_post.20 --out FEATURES
  deltapatch features --model MODEL --pairs pairs.jsonl --sae params.npz --at mlp_in:mlp_out.20 --out FEATURES
  deltapatch features --model MODEL --pairs pairs.jsonl --sae SAE --screen attribution --top 500 --out TOP
  deltapatch effects FEATURES --by layer,feature --top 20
"""


@click.command(short_help="Patch every feature of sparse autoencoders.", epilog=EXAMPLES)
@of_pairs
@click.option(
    "--sae",
    "paths",
    multiple=True,
    required=True,
    help="A sparse autoencoder or transcoder: a folder of SAELens or an archive of Gemma Scope (params.npz). "
    "May be given several times.",
)
@click.option(
    "--at",
    "places",
    multiple=True,
    metavar="[READS:]SITE.LAYER",
    help="Where it reads, such as resid_post.20, for each --sae in turn; needed where a file does not say. "
    "Of a transcoder what it reads, too: mlp_in:mlp_out.20.",
)
@at_positions
@click.option(
    "--least",
    type=float,
    default=0.0,
    show_default=True,
    help="Leave out features whose activation changes by this much or less.",
)
@screening
def features(*, paths: tuple[str, ...], places: tuple[str, ...], least: float, **given: Any) -> None:
    """Patch every feature of sparse autoencoders that differs between the prompts of a pair, each alone.

    A feature moves what its autoencoder reads (its transcoder writes) by its change of activation times its
    decoder's row; what the autoencoder gets wrong stays as it is. With --source zero features are taken out
    of the base run.
    """
    if places and len(places) != len(paths):
        raise DeltapatchError(f"{len(places)} --at and {len(paths)} --sae: give one for each, or none")
    at = [_place(text) for text in places] or [{}] * len(paths)
    given["folder"].check()

    from deltapatch.analysis.features import sweep_features
    from deltapatch.models.autoencoder import load_sae

    saes = [load_sae(path, **place) for path, place in zip(paths, at, strict=True)]
    for sae in saes:
        given["folder"].say(repr(sae))
    carry_out(partial(sweep_features, autoencoders=saes, least=least), what="features", **given)


def _place(text: str) -> dict[str, Any]:
    """resid_post.20: a site and a layer; mlp_in:mlp_out.20: what a transcoder reads, too."""
    reads, _, place = text.rpartition(":")
    site, _, layer = place.rpartition(".")
    if not site or not layer.isdecimal():
        raise DeltapatchError(f"--at {text!r} is no place such as resid_post.20, a site and a layer")
    return {"site": site, "layer": int(layer), "reads": reads or None}
