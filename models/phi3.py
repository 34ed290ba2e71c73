"""Phi 3, 3.5 and 4-mini: LLaMA with fused matrices, partial rotary, and longrope."""

from deltapatch.models.architecture import Architecture
from deltapatch.models.config import Config
from deltapatch.models.llama import NAMES, read_llama
from deltapatch.models.spec import ModelSpec


def read_spec(config: Config) -> ModelSpec:
    """The spec of a config.json with model_type "phi3".

    Raises:
        DeltapatchError: a field is missing, broken, or asks for what is not supported.
    """
    # As transformers reads them: the field has a default of its own, and two types are old names of one.
    fields = {"original_max_position_embeddings": 4096} | config.fields
    scaling = fields.get("rope_scaling")
    if isinstance(scaling, dict) and "yarn" in (scaling.get("type"), scaling.get("rope_type")):
        kinds = {name: "longrope" for name in ("type", "rope_type") if name in scaling}
        fields["rope_scaling"] = scaling | kinds
    here = Config(fields, config.where)
    window = here.optional_integer("sliding_window")
    windows = () if window is None else (window,) * here.integer("num_hidden_layers")
    eps = here.number("rms_norm_eps", default=1e-5)
    spec = read_llama(here, "phi3", context=4096, norm_eps=eps, windows=windows)
    config.read |= here.read
    return spec


_FUSED = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")

ARCHITECTURE = Architecture(
    name="phi3",
    read_spec=read_spec,
    prefix="model.",
    names={name: slot for name, slot in NAMES.items() if not any(part in name for part in _FUSED)}
    | {
        "layers.{l}.self_attn.qkv_proj.weight": ("qkv.0.weight", "qkv.1.weight", "qkv.2.weight"),
        "layers.{l}.mlp.gate_up_proj.weight": ("gate.weight", "up.weight"),
    },
)
