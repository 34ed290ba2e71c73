"""Reading config.json: typed access to its fields, and the parts that several architectures spell alike."""

from dataclasses import replace
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

    def find(self, *names: str) -> Any:
        """The value of the first of these spellings that is there and not null, else None."""
        return next((self.fields[n] for n in names if self.fields.get(n) is not None), None)

    def integer(self, *names: str, default: int | None = None) -> int:
        """A positive integer; without a default it has to be there."""
        value = self.find(*names)
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

    def number(self, *names: str, default: float) -> float:
        """A positive number."""
        value = self.find(*names)
        if value is None:
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
        value = str(self.find(*names) or default)
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

    def rope(self, d_head: int, context: int, theta: float, partial: float) -> RopeSpec:
        """Rotary embedding from `rope_parameters` (new spelling) or `rope_scaling` (old spelling).

        Args:
            d_head: coordinates of a head.
            context: max_position_embeddings.
            theta: the base, where the dictionary does not give it.
            partial: the fraction of the coordinates that turn, where the dictionary does not give it.
        """
        given = self.find("rope_scaling") or self.find("rope_parameters") or {}
        if not isinstance(given, dict) or any(isinstance(v, dict) for v in given.values()):
            raise DeltapatchError(
                f"{self.where}: rotary settings {shown(given)} are not supported: one set for all layers"
            )
        rope = Config(given, f"{self.where}, rotary settings")
        kind = str(rope.find("rope_type", "type") or "default")
        if kind not in _SCALINGS:
            raise DeltapatchError(
                f"{self.where}: rotary scaling {shown(kind)} is not supported: "
                f"it must be one of {', '.join(_SCALINGS)}"
            )
        scaling = _SCALINGS[kind]
        dim = int(d_head * rope.number("partial_rotary_factor", default=partial))
        self.check_rotary(dim, d_head)
        spec = RopeSpec(dim=dim, base=rope.number("rope_theta", default=theta), scaling=scaling)
        if scaling == "none":
            return spec
        if rope.find("factor") is None:
            raise DeltapatchError(f"{self.where}: rotary scaling {kind!r} needs a 'factor'")
        factor = rope.number("factor", default=1.0)
        if scaling == "linear":
            return replace(spec, factor=factor)
        if scaling == "dynamic":
            if dim <= 2:
                raise DeltapatchError(
                    f"{self.where}: dynamic rotary scaling needs more than 2 rotary coordinates"
                )
            return replace(spec, factor=factor, original_context=context)
        low, high = rope.number("low_freq_factor", default=1.0), rope.number("high_freq_factor", default=4.0)
        if high <= low:
            raise DeltapatchError(f"{self.where}: 'high_freq_factor' must be larger than 'low_freq_factor'")
        return replace(
            spec,
            factor=factor,
            low_freq_factor=low,
            high_freq_factor=high,
            original_context=self.integer(
                "original_max_position_embeddings",
                default=rope.integer("original_max_position_embeddings", default=context),
            ),
        )
