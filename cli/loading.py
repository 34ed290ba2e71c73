"""Which model a command takes, and how it is loaded: six options, one record."""

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import click

from deltapatch.cli import options
from deltapatch.cli.options import as_record, say

if TYPE_CHECKING:
    from deltapatch.models.model import Model

OPTIONS = (
    options.model,
    options.revision,
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."),
    click.option("--dtype", default="auto", show_default=True, help="Of the weights: float32, bfloat16, ..."),
    options.adapter,
    options.stream,
)


@dataclass(frozen=True, kw_only=True)
class Loading:
    """A model, and the arguments of `load_model` that go with it."""

    model: str
    revision: str | None
    device: str
    dtype: str
    adapter: str | None
    stream: bool

    def arguments(self) -> dict[str, Any]:
        """Those of `load_model` beside the model."""
        found = asdict(self)
        del found["model"]
        return found

    def load(self, *, quiet: bool) -> "Model":
        """The model, which is said on stderr."""
        from deltapatch.models.load import load_model

        loaded = load_model(self.model, **self.arguments())
        say(repr(loaded), quiet)
        return loaded

    def load_other(self, model: str, revision: str | None) -> "Model":
        """Another model, in the same way but without an adapter."""
        return replace(self, model=model, revision=revision, adapter=None).load(quiet=True)


#: The options that say which model is loaded, and how; the command gets them as its argument `loading`.
loading = as_record(Loading, "loading", OPTIONS)
