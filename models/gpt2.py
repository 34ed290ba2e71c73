"""GPT-2: learned positions, matrices that are stored [in, out], one for queries, keys and values."""

from deltapatch.errors import DeltapatchError
from deltapatch.models.architecture import Architecture
from deltapatch.models.config import Config
from deltapatch.models.spec import ModelSpec, RopeSpec


def read_spec(config: Config) -> ModelSpec:
    """The spec of a config.json with model_type "gpt2".

    Raises:
        DeltapatchError: a field is missing, broken, or asks for what is not supported.
    """
    if config.flag("add_cross_attention", default=False):
        raise DeltapatchError(f"{config.where}: 'add_cross_attention' is not supported in a gpt2 model")
    d_model = config.integer("n_embd", "hidden_size")
    n_heads = config.integer("n_head", "num_attention_heads")
    d_head = config.heads(n_heads, d_model)
    config.find("n_ctx")  # of older configs; the table of positions says how long a prompt may be
    return ModelSpec(
        architecture="gpt2",
        n_layers=config.integer("n_layer", "num_hidden_layers"),
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=n_heads,
        d_head=d_head,
        d_mlp=config.integer("n_inner", default=4 * d_model, null=True),
        d_vocab=config.integer("vocab_size"),
        context=config.integer("n_positions", "max_position_embeddings", default=1024),
        norm="layer",
        norm_eps=config.number("layer_norm_epsilon", default=1e-5),
        parallel=False,
        gated=False,
        activation=config.activation("activation_function", default="gelu_new"),
        rope=RopeSpec(dim=0),
        tied_embeddings=config.flag("tie_word_embeddings", default=True),
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        learned_positions=True,
        scores_by_depth=config.flag("scale_attn_by_inverse_layer_idx", default=False),
        attention_scale=None if config.flag("scale_attn_weights", default=True) else 1.0,
    )


ARCHITECTURE = Architecture(
    name="gpt2",
    read_spec=read_spec,
    prefix="transformer.",
    names={
        "wte.weight": "embedding.weight",
        "wpe.weight": "positions.weight",
        "h.{l}.ln_1.weight": "norm1.weight",
        "h.{l}.ln_1.bias": "norm1.bias",
        "h.{l}.attn.c_attn.weight": ("qkv.0.weight", "qkv.1.weight", "qkv.2.weight"),
        "h.{l}.attn.c_attn.bias": ("qkv.0.bias", "qkv.1.bias", "qkv.2.bias"),
        "h.{l}.attn.c_proj.weight": "out.weight",
        "h.{l}.attn.c_proj.bias": "out.bias",
        "h.{l}.ln_2.weight": "norm2.weight",
        "h.{l}.ln_2.bias": "norm2.bias",
        "h.{l}.mlp.c_fc.weight": "up.weight",
        "h.{l}.mlp.c_fc.bias": "up.bias",
        "h.{l}.mlp.c_proj.weight": "down.weight",
        "h.{l}.mlp.c_proj.bias": "down.bias",
        "ln_f.weight": "norm.weight",
        "ln_f.bias": "norm.bias",
        "lm_head.weight": "unembedding.weight",
        # The causal mask and its filler: buffers of older versions.
        "h.{l}.attn.bias": None,
        "h.{l}.attn.masked_bias": None,
    },
    transposed=frozenset(
        {"qkv.0.weight", "qkv.1.weight", "qkv.2.weight", "out.weight", "up.weight", "down.weight"}
    ),
    ignored=frozenset({"reorder_and_upcast_attn", "n_ctx"}),
)
