"""`deltapatch convert`: pickled weights and GGUF files into safetensors."""

import click

from deltapatch.cli.options import as_json, print_json, revision

EXAMPLES = """\b
Examples:
  deltapatch convert old-model --out old-model-safetensors
  deltapatch convert SmolLM2-135M-Instruct.Q4_1.gguf --out smollm2
"""


@click.command(short_help="Rewrite .bin or GGUF weights as safetensors.", epilog=EXAMPLES)
@click.argument("source", metavar="SOURCE")
@click.option("--out", required=True, type=click.Path(), help="The folder to make; it must not exist.")
@revision
@as_json
def convert(source: str, out: str, revision: str | None, as_json: bool) -> None:
    """Rewrite the .bin weights of SOURCE, a model or LoRA adapter (folder or hub id), as safetensors.

    Nothing in the files can run: they are read as tensors only. Config and tokenizer are copied along. A GGUF
    file becomes a model folder as well; its quantised values are dequantised to float32, and the folder's
    config.json says so. That needs the package gguf: pip install 'deltapatch[gguf]'.
    """
    from deltapatch.models.convert import convert as rewrite

    path = rewrite(source, out, revision=revision)
    if as_json:
        print_json({"source": source, "out": str(path)})
    else:
        click.echo(str(path))
