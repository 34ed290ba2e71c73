"""Reading config.json: typed access to its fields, and the parts that several architectures spell alike."""

import math
import re
from collections.abc import Collection, Mapping, Sequence
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
    "yarn": "yarn",
    "longrope": "longrope",
    "su": "longrope",
}
# Fields that change what a model computes and that no supported architecture has. A value that is not
# empty is refused.
_UNSUPPORTED = {
    "quantization_config": "quantised weights",
    "num_local_experts": "a mixture of experts",
    "num_experts": "a mixture of experts",
    "n_routed_experts": "a mixture of experts",
}

# Fields that say nothing about what a trained model computes: of training, generation, tokens, and
# transformers' own. `auto_map` names code of the checkpoint's, which is never run: the model is computed as
# its model_type says. What architectures have of such fields is in `Architecture.ignored`.
_HARMLESS_WORDS = """
    architectures auto_map bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id
    cls_token_id mask_token_id decoder_start_token_id forced_bos_token_id forced_eos_token_id
    bos_token eos_token pad_token unk_token tokenizer_class prefix name model_name finetuning_task
    problem_type id2label label2id torch_dtype dtype transformers_version transformers.js_config
    model_type use_cache use_cash cache_implementation output_attentions output_hidden_states
    output_scores return_dict return_dict_in_generate torchscript is_encoder_decoder is_decoder
    chunk_size_feed_forward initializer_range gradient_checkpointing use_bfloat16
    use_flash_attention use_flash_attn attn_implementation pretraining_tp max_length min_length
    do_sample temperature top_k top_p typical_p num_beams num_beam_groups num_return_sequences
    repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
    diversity_penalty early_stopping remove_invalid_values exponential_decay_length_penalty
    bad_words_ids badwordsids suppress_tokens begin_suppress_tokens task_specific_params
    unsloth_version unsloth_fixed tokenizer_path max_sequence_length internal_version
    is_llama_config custom_pipelines num_steps
"""
_HARMLESS = frozenset(_HARMLESS_WORDS.split())
_HARMLESS_NAMES = re.compile(r"_.*|.*drop(out)?(_.*)?|.*pdrop|summary_.*")

# What no model reaches: beyond it, numbers are not allocated for or computed with, but refused.
_LARGEST_INTEGER, LARGEST_NUMBER = 2**31 - 1, 1e30


class Config:
    """The fields of one config.json, read with a sentence for every way in which they can be wrong."""

    def __init__(self, fields: dict[str, Any], where: str) -> None:
        self.fields = fields
        self.where = where  # what a sentence calls it: the path of config.json
        self.read: set[str] = set()  # the fields that were asked for

    def find(self, *names: str, null: bool = False) -> Any:
        """The value of a field that has these spellings, or None where none of them is there.

        Args:
            names: spellings of one field.
            null: whether null means that the field is not there. Of others it has no meaning.

        Raises:
            DeltapatchError: a null that means nothing, or two spellings with different values.
        """
        self.read.update(names)
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

    def integer(self, *names: str, default: int | None = None, null: bool = False, zero: bool = False) -> int:
        """A positive integer, or with `zero` 0 as well; without a default it has to be there."""
        value = self.find(*names, null=null)
        if value is None:
            if default is None:
                raise DeltapatchError(f"{self.where} has no field {names[0]!r}")
            return default
        if zero and type(value) is int and value == 0:
            return 0
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

    def refuse_unread(self, architecture: str, ignored: Collection[str]) -> None:
        """Raise where a field is left that was not asked for, and that may change what the model computes."""
        for name, value in self.fields.items():
            known = name in self.read or name in ignored or name in _HARMLESS or not value
            if not known and not _HARMLESS_NAMES.fullmatch(name):
                raise DeltapatchError(
                    f"{self.where} has a field {shown(name)} ({shown(value)}), which models of type "
                    f"{architecture!r} are not known to have, and which may change what this one computes: "
                    "take it out if it does not, or give the 'model_type' that has it"
                )

    def window(self, *, default: int | None = None) -> int | None:
        """`sliding_window`: None where it is null, the default where it is not there."""
        return self.optional_integer("sliding_window") if "sliding_window" in self.fields else default

    def layer_types(self, n_layers: int, types: Sequence[str] | None = None) -> list[str]:
        """Which layers have a window, [layer]: "full_attention" or "sliding_attention"."""
        given = self.find("layer_types", null=True)
        found = list(types or ["full_attention"] * n_layers) if given is None else given
        kinds = ("full_attention", "sliding_attention")
        if not isinstance(found, list) or len(found) < n_layers or any(kind not in kinds for kind in found):
            raise DeltapatchError(
                f"{self.where}: 'layer_types' must say full_attention or sliding_attention for each of the "
                f"{n_layers} layers, not {shown(given)}"
            )
        return found[:n_layers]

    def optional_integer(self, name: str) -> int | None:
        """A positive integer, or None where it is null or not there."""
        return None if self.find(name, null=True) is None else self.integer(name)

    def optional_number(self, name: str) -> float | None:
        """A positive number, or None where it is null or not there."""
        return None if self.find(name, null=True) is None else self.number(name)

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

    def ropes(
        self, d_head: int, context: int, theta: Mapping[str, "Setting"], partial: "Setting"
    ) -> dict[str, RopeSpec]:
        """Rotary embeddings by the type of a layer; what `rope_scaling` says is of full attention alone.

        Args:
            theta: type -> the base, where its dictionary does not give it. Others are as for `rope`.
        """
        given = self.find("rope_parameters", null=True) or {}
        scaling = self.find("rope_scaling", null=True) or {}
        if (
            not isinstance(given, dict)
            or not all(isinstance(given.get(kind) or {}, dict) for kind in theta)
            or set(given) - set(theta)
        ):
            raise DeltapatchError(
                f"{self.where}: 'rope_parameters' must hold an object for each of {', '.join(theta)}, not "
                f"{shown(given)}"
            )
        found = {}
        for kind, base in theta.items():
            own = given.get(kind) or {}
            if kind == "full_attention" and scaling:
                if not isinstance(scaling, dict):
                    raise DeltapatchError(f"{self.where}: 'rope_scaling' must be an object")
                own = {**own, **scaling}
            # transformers looks for it beside the types, where nobody writes it.
            own = {name: value for name, value in own.items() if name != "truncate"}
            found[kind] = self._rope(own, d_head, context, base, partial)
        return found

    def _rope(self, given: Any, d_head: int, context: int, theta: "Setting", partial: "Setting") -> RopeSpec:
        if not isinstance(given, dict) or any(isinstance(v, dict) for v in given.values()):
            raise DeltapatchError(
                f"{self.where}: rotary settings {shown(given)} are not supported: one set for all layers"
            )
        rope = Config(given, f"{self.where}, rotary settings")
        self.read.add("original_max_position_embeddings")  # of some scalings
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
        if given.get("factor") is None and scaling in ("yarn", "longrope"):
            # What a prompt may be long, over what it could be before.
            before = self.find("original_max_position_embeddings", null=True)
            before = rope.integer("original_max_position_embeddings", default=before or context)
            factor = context / before
        elif "factor" not in given:
            raise DeltapatchError(f"{self.where}: rotary scaling {kind!r} needs a 'factor'")
        else:
            factor = rope.number("factor")
        if scaling == "linear":
            return replace(spec, factor=factor)
        if scaling == "dynamic":
            if dim <= 2:
                raise DeltapatchError(
                    f"{self.where}: dynamic rotary scaling needs more than 2 rotary coordinates"
                )
            return replace(spec, factor=factor, original_context=context)
        original = self.integer(
            "original_max_position_embeddings",
            default=rope.integer("original_max_position_embeddings", default=context),
            null=True,
        )
        if scaling == "yarn":
            return _yarn(rope, replace(spec, factor=factor, original_context=original))
        if scaling == "longrope":
            return _longrope(rope, replace(spec, factor=factor, original_context=original))
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if high <= low:
            raise DeltapatchError(f"{self.where}: 'high_freq_factor' must be larger than 'low_freq_factor'")
        return replace(
            spec, factor=factor, low_freq_factor=low, high_freq_factor=high, original_context=original
        )


def _yarn(rope: Config, spec: RopeSpec) -> RopeSpec:
    """Yarn's numbers (arXiv 2309.00071); its betas stand for the factors of frequencies."""
    factor = rope.find("attention_factor", null=True)
    mscale, all_dim = (rope.find(name, null=True) for name in ("mscale", "mscale_all_dim"))
    if factor is not None:
        attention = rope.number("attention_factor")
    elif mscale and all_dim:
        one, other = (_mscale(spec.factor, rope.number(name)) for name in ("mscale", "mscale_all_dim"))
        attention = one / other
    else:
        attention = _mscale(spec.factor, 1)
    slow = rope.number("beta_slow", default=1, null=True)
    fast = rope.number("beta_fast", default=32, null=True)
    if fast <= slow:
        raise DeltapatchError(f"{rope.where}: 'beta_fast' must be larger than 'beta_slow'")
    return replace(
        spec,
        low_freq_factor=slow,
        high_freq_factor=fast,
        truncate=rope.flag("truncate", default=True),
        attention_factor=attention,
    )


def _mscale(factor: float, by: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * by * math.log(factor) + 1.0


def _longrope(rope: Config, spec: RopeSpec) -> RopeSpec:
    """Longrope's numbers (arXiv 2402.13753)."""
    factors = {}
    for name in ("short_factor", "long_factor"):
        given = rope.find(name)
        numbers = isinstance(given, list) and all(
            isinstance(x, int | float) and not isinstance(x, bool) and 0 < x < LARGEST_NUMBER for x in given
        )
        if not numbers or len(given) != spec.dim // 2:
            raise DeltapatchError(
                f"{rope.where}: longrope needs {name!r}, a list of {spec.dim // 2} positive numbers"
            )
        factors[name] = tuple(float(x) for x in given)
    if rope.find("attention_factor", null=True) is not None:
        attention = rope.number("attention_factor")
    elif spec.factor <= 1:
        attention = 1.0
    else:
        attention = math.sqrt(1 + math.log(spec.factor) / math.log(spec.original_context))
    return replace(
        spec,
        short_factors=factors["short_factor"],
        long_factors=factors["long_factor"],
        attention_factor=attention,
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
        config.read.update(name for name in (self.name, self.unread) if name is not None)
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


def windows_of(kinds: Sequence[str], window: int | None) -> tuple[int | None, ...]:
    """The window of each layer, of `Config.layer_types`; () where no layer has one."""
    return () if window is None else tuple(window if kind == "sliding_attention" else None for kind in kinds)
