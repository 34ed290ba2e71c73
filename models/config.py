"""Reading config.json: typed access to its fields, and the parts that several architectures spell alike."""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from deltapatch.errors import DeltapatchError, shown
from deltapatch.models.spec import Activation, RopeScaling, RopeSpec

_ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    # Spelled differently in transformers, one function: the tanh form.
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
}
_SCALINGS: dict[str, RopeScaling] = {
    "default": "none",
    "linear": "linear",
    "dynamic": "dynamic",
    "llama3": "llama3",
}
# Fields that change what a model computes and that no supported architecture has. A value that is not
# empty is refused.
_UNSUPPORTED = {
    "sliding_window": "sliding-window attention",
    "quantization_config": "quantised weights",
    "auto_map": "code of its own",
    "num_local_experts": "a mixture of experts",
    "num_experts": "a mixture of experts",
    "n_routed_experts": "a mixture of experts",
}

# What no model reaches: beyond it, numbers are not allocated for or computed with, but refused.
_LARGEST_INTEGER, LARGEST_NUMBER = 2**31 - 1, 1e30


class Config:
    """The fields of one config.json, read with a sentence for every way in which they can be wrong."""

    def __init__(self, fields: dict[str, Any], where: str) -> None:
        self.fields = fields
        self.where = where  # what a sentence calls it: the path of config.json

    def find(self, *names: str, null: bool = False) -> Any:
        """The value of a field that has these spellings, or None where none of them is there.

        Args:
            names: spellings of one field.
            null: whether null means that the field is not there. Of others it has no meaning.

        Raises:
            DeltapatchError: a null that means nothing, or two spellings with different values.
        """
        given = {name: self.fields[name] for name in names if name in self.fields}
        for name, value in given.items():
            if value is None and not null:
                raise DeltapatchError(
                    f"{self.where}: {name!r} is null, which is no value of it: give one, or leave it out"
                )
        said = {name: value for name, value in given.items() if value is not None}
        for (first, one), (name, value) in pairwise(said.items()):
            if value != one:
                raise self.two_things(repr(first), one, repr(name), value)
        return next(iter(said.values()), None)

    def two_things(self, one: str, value: Any, other: str, another: Any) -> DeltapatchError:
        """The error that a config which says two different things raises."""
        return DeltapatchError(
            f"{self.where} says two things: {one} is {shown(value)}, and {other} is {shown(another)}; "
            "keep the one that the model was trained with"
        )

    def integer(self, *names: str, default: int | None = None, null: bool = False) -> int:
        """A positive integer; without a default it has to be there."""
        value = self.find(*names, null=null)
        if value is None:
            if default is None:
                raise DeltapatchError(f"{self.where} has no field {names[0]!r}")
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= _LARGEST_INTEGER:
            limit = f" of at most {_LARGEST_INTEGER:,}" if type(value) is int and value > 0 else ""
            raise DeltapatchError(
                f"{self.where}: {names[0]!r} must be a positive integer{limit}, not {shown(value)}"
            )
        return value

    def number(self, *names: str, default: float | None = None, null: bool = False) -> float:
        """A positive number; without a default it has to be there."""
        value = self.find(*names, null=null)
        if value is None:
            if default is None:
                raise DeltapatchError(f"{self.where}: there is no {names[0]!r}, which is needed")
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < LARGEST_NUMBER:
            raise DeltapatchError(f"{self.where}: {names[0]!r} must be a positive number, not {shown(value)}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.find(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise DeltapatchError(f"{self.where}: {name!r} must be true or false, not {shown(value)}")
        return value

    def activation(self, *names: str, default: str) -> Activation:
        """The activation function, whatever it is called."""
        found = self.find(*names)
        value = str(default if found is None else found)
        if value not in _ACTIVATIONS:
            raise DeltapatchError(
                f"{self.where}: activation {shown(value)} is not supported: "
                f"it must be one of {', '.join(_ACTIVATIONS)}"
            )
        return _ACTIVATIONS[value]

    def refuse_unsupported(self) -> None:
        """Raise where the config asks for something that the forward does not do."""
        for name, what in _UNSUPPORTED.items():
            if self.fields.get(name):
                raise DeltapatchError(f"{self.where} asks for {what} ({name!r}), which is not supported")

    def heads(self, n_heads: int, d_model: int) -> int:
        """d_model / n_heads, which has to come out even."""
        if d_model % n_heads:
            raise DeltapatchError(
                f"{self.where}: the hidden size {d_model} is not divisible by the {n_heads} attention heads"
            )
        return d_model // n_heads

    def check_rotary(self, dim: int, d_head: int) -> None:
        """Raise unless `dim` coordinates of a head can turn in pairs."""
        if dim % 2 or not 0 < dim <= d_head:
            raise DeltapatchError(
                f"{self.where}: {dim} rotary coordinates of {d_head} are not supported: "
                "the number must be even, positive and no more than a head has"
            )

    def rope(self, d_head: int, context: int, theta: "Setting", partial: "Setting") -> RopeSpec:
        """Rotary embedding from `rope_parameters` (new spelling) or `rope_scaling` (old spelling).

        Args:
            d_head: coordinates of a head.
            context: max_position_embeddings.
            theta: the base, where the dictionary does not give it.
            partial: the fraction of the coordinates that turn, where the dictionary does not give it.

        Raises:
            DeltapatchError: it is broken or not supported, or its spellings contradict each other.
        """
        # Of two dictionaries transformers takes the old one, whole.
        given = {name: self.find(name, null=True) or {} for name in ("rope_scaling", "rope_parameters")}
        said = {name: fields for name, fields in given.items() if fields} or {"rope_parameters": {}}
        found = {name: self._rope(fields, d_head, context, theta, partial) for name, fields in said.items()}
        spec = next(iter(found.values()))
        for name, other in found.items():
            if other != spec:
                raise self.two_things("'rope_scaling'", said["rope_scaling"], repr(name), said[name])
        return spec

    def _rope(self, given: Any, d_head: int, context: int, theta: "Setting", partial: "Setting") -> RopeSpec:
        if not isinstance(given, dict) or any(isinstance(v, dict) for v in given.values()):
            raise DeltapatchError(
                f"{self.where}: rotary settings {shown(given)} are not supported: one set for all layers"
            )
        rope = Config(given, f"{self.where}, rotary settings")
        for name in ("rope_type", "type"):
            rope.find(name)  # none of them is null
        kind = str(given.get("rope_type", given.get("type", "default")))
        if kind not in _SCALINGS:
            raise DeltapatchError(
                f"{self.where}: rotary scaling {shown(kind)} is not supported: "
                f"it must be one of {', '.join(_SCALINGS)}"
            )
        scaling = _SCALINGS[kind]
        dim = int(d_head * partial.read(self, rope, "partial_rotary_factor"))
        self.check_rotary(dim, d_head)
        spec = RopeSpec(dim=dim, base=theta.read(self, rope, "rope_theta"), scaling=scaling)
        if scaling == "none":
            return spec
        if "factor" not in given:
            raise DeltapatchError(f"{self.where}: rotary scaling {kind!r} needs a 'factor'")
        factor = rope.number("factor")
        if scaling == "linear":
            return replace(spec, factor=factor)
        if scaling == "dynamic":
            if dim <= 2:
                raise DeltapatchError(
                    f"{self.where}: dynamic rotary scaling needs more than 2 rotary coordinates"
                )
            return replace(spec, factor=factor, original_context=context)
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if high <= low:
            raise DeltapatchError(f"{self.where}: 'high_freq_factor' must be larger than 'low_freq_factor'")
        original = rope.integer("original_max_position_embeddings", default=context)
        return replace(
            spec,
            factor=factor,
            low_freq_factor=low,
            high_freq_factor=high,
            original_context=self.integer("original_max_position_embeddings", default=original, null=True),
        )


@dataclass(frozen=True)
class Setting:
    """A number of the rotary embedding, which a config may say inside the rotary settings or beside them.

    Attributes:
        name: of the field beside them.
        default: what it is where neither says it.
        unread: a field beside them that older versions of transformers wrote, and the newest does not read.
        null: whether null beside them means that it is not there.
    """

    name: str
    default: float
    unread: str | None = None
    null: bool = False

    def read(self, config: Config, rope: Config, inside: str) -> float:
        """The number.

        Raises:
            DeltapatchError: it is broken, or what is said inside and beside differs.
        """
        within = rope.fields.get(inside)
        beside = config.number(self.name, default=self.default, null=inside in rope.fields or self.null)
        value = rope.number(inside, default=beside)
        for name in (self.name, self.unread):
            other = None if name is None else config.fields.get(name)
            if other is None or other == value:
                continue
            if within is not None:
                here = f"{inside!r} in the rotary settings"
            else:
                here = repr(self.name) + ("" if self.name in config.fields else " (by default)")
            raise config.two_things(here, value, repr(name), other)
        return value
