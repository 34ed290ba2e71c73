"""`deltapatch directions`: each of some directions swapped, or added in several strengths, anywhere."""

from functools import partial
from typing import Any

import click

from deltapatch.cli.listed import at_positions, carry_out, listing, of_pairs
from deltapatch.cli.options import read_names
from deltapatch.errors import DeltapatchError

EXAMPLES = """\b
Examples:
  deltapatch directions --model MODEL --pairs pairs.jsonl --directions probes.safetensors --out RUN
  deltapatch directions --model MODEL --pairs pairs.jsonl --directions d.safetensors --layers 5-9 --out RUN
  deltapatch directions --model MODEL --pairs p.jsonl --directions d.safetensors --strengths -2,2 --out RUN
  deltapatch effects RUN --by layer,direction --top 20
"""


@click.command(short_help="Patch along directions, or steer with them.", epilog=EXAMPLES)
@of_pairs
@click.option(
    "--directions",
    "path",
    required=True,
    help="A safetensors file whose tensors are named after sites, such as resid_post, or after a site and a "
    "layer, resid_post.3; each [direction, d_model], or d_head at heads.",
)
@at_positions
@click.option("--layers", default="all", show_default=True, help="all, or numbers and ranges: 0-5,9.")
@click.option(
    "--strengths",
    help="Add so much of each direction to the base run, numbers with commas, and swap nothing: steering.",
)
@listing
def directions(*, path: str, layers: str, strengths: str | None, **given: Any) -> None:
    """Patch along each of some directions alone, at every chosen layer and position.

    What is swapped is the part of the difference between source and base run along the direction. With
    --strengths nothing is swapped: multiples of each direction are added to the base run.
    """
    wanted = None if strengths is None else _numbers(strengths)
    given["folder"].check()

    from deltapatch import arguments
    from deltapatch.analysis.directions import sweep_directions
    from deltapatch.interventions.directions import load_directions

    found = load_directions(path)
    own: dict[str, Any] = {"directions": found, "layers": arguments.layers(layers), "strengths": wanted}
    carry_out(partial(sweep_directions, **own), what="directions", **given)


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in read_names(text)]
    except ValueError:
        raise DeltapatchError(f"--strengths {text!r} must be numbers with commas, such as -2,0,2") from None
