"""The entrance of the command line. Torch and matplotlib load inside the commands that need them."""

import click

from deltapatch import __version__
from deltapatch.cli.app import App
from deltapatch.cli.bench import bench
from deltapatch.cli.circuit import circuit
from deltapatch.cli.convert import convert
from deltapatch.cli.demo import demo
from deltapatch.cli.directions import directions
from deltapatch.cli.effects import effects
from deltapatch.cli.explore import explore
from deltapatch.cli.features import features
from deltapatch.cli.info import info
from deltapatch.cli.interactions import interactions
from deltapatch.cli.merge import merge
from deltapatch.cli.pairs import pairs
from deltapatch.cli.part_sets import shapley, smallest_set
from deltapatch.cli.plot import plot
from deltapatch.cli.reproduce import reproduce
from deltapatch.cli.sweep import edges, sweep

EXAMPLES = """\b
Examples:
  deltapatch demo --out demo
  deltapatch pairs --task arithmetic --model MODEL --out pairs.jsonl
  deltapatch sweep --model MODEL --pairs pairs.jsonl --sites mlp_out,attn_out --out RUN
  deltapatch effects RUN --site mlp_out --by layer,class
  deltapatch edges --model MODEL --pairs pairs.jsonl --out EDGES
  deltapatch features --model MODEL --pairs pairs.jsonl --sae SAE --out FEATURES
  deltapatch interactions RUN --top 50 --model MODEL --pairs pairs.jsonl --out INTERACTIONS
  deltapatch plot RUN
  deltapatch explore RUN
  deltapatch reproduce --model MODEL --out STUDY
"""


@click.group(cls=App, epilog=EXAMPLES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="deltapatch")
def cli() -> None:
    """Exact activation patching of language models: thousands of interventions in one pass."""


for command in (
    demo, pairs, sweep, edges, features, directions, interactions, shapley, smallest_set, merge, effects,
    plot, explore, circuit, info, convert, reproduce, bench,
):  # fmt: skip
    cli.add_command(command)


def main() -> None:
    """Run the command line."""
    cli.main(prog_name="deltapatch")
