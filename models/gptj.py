"""GPT-J: interleaved partial rotary, one norm for both branches of a parallel block, a bias on the output."""

from deltapatch.models.architecture import Architecture
from deltapatch.models.config import Config
from deltapatch.models.spec import ModelSpec, RopeSpec


def read_spec(config: Config) -> ModelSpec:
    """The spec of a config.json with model_type "gptj".

    Raises:
        DeltapatchError: a field is missing, broken, or asks for what is not supported.
    """
    d_model, n_heads = (
        config.integer("n_embd", "hidden_size"),
        config.integer("n_head", "num_attention_heads"),
    )
    d_head = config.heads(n_heads, d_model)
    rotary_dim = config.integer("rotary_dim", default=64)
    config.check_rotary(rotary_dim, d_head)
    return ModelSpec(
        architecture="gptj",
        n_layers=config.integer("n_layer", "num_hidden_layers"),
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=n_heads,
        d_head=d_head,
        d_mlp=config.integer("n_inner", default=4 * d_model, null=True),
        d_vocab=config.integer("vocab_size"),
        context=config.integer("n_positions", "max_position_embeddings", default=2048),
        norm="layer",
        norm_eps=config.number("layer_norm_epsilon", default=1e-5),
        parallel=True,
        gated=False,
        activation=config.activation("activation_function", default="gelu_new"),
        rope=RopeSpec(dim=rotary_dim, interleaved=True),
        tied_embeddings=config.flag("tie_word_embeddings", default=False),
        shared_norm=True,
        mlp_bias=True,
        unembedding_bias=True,
    )


ARCHITECTURE = Architecture(
    name="gptj",
    read_spec=read_spec,
    prefix="transformer.",
    names={
        "wte.weight": "embedding.weight",
        "h.{l}.ln_1.weight": "norm1.weight",
        "h.{l}.ln_1.bias": "norm1.bias",
        "h.{l}.attn.q_proj.weight": "qkv.0.weight",
        "h.{l}.attn.k_proj.weight": "qkv.1.weight",
        "h.{l}.attn.v_proj.weight": "qkv.2.weight",
        "h.{l}.attn.out_proj.weight": "out.weight",
        "h.{l}.mlp.fc_in.weight": "up.weight",
        "h.{l}.mlp.fc_in.bias": "up.bias",
        "h.{l}.mlp.fc_out.weight": "down.weight",
        "h.{l}.mlp.fc_out.bias": "down.bias",
        "ln_f.weight": "norm.weight",
        "ln_f.bias": "norm.bias",
        "lm_head.weight": "unembedding.weight",
        "lm_head.bias": "unembedding.bias",
        # The causal mask, its filler and the rotary tables: buffers of older versions.
        "h.{l}.attn.bias": None,
        "h.{l}.attn.masked_bias": None,
        "h.{l}.attn.embed_positions": None,
    },
    # Of other families; transformers reads none of them here.
    ignored=frozenset(
        {
            "rotary",
            "scale_attn_weights",
            "rope_theta",
            "rotary_pct",
            "rope_scaling",
            "intermediate_size",
            "hidden_act",
            "layer_norm_eps",
            "head_dim",
        }
    ),
)
