"""GPT-NeoX and Pythia: fused per-head QKV, partial rotary, parallel or sequential blocks."""

from deltapatch.models.architecture import Architecture
from deltapatch.models.config import Config, Setting
from deltapatch.models.spec import ModelSpec


def read_spec(config: Config) -> ModelSpec:
    """The spec of a config.json with model_type "gpt_neox".

    Raises:
        DeltapatchError: a field is missing, broken, or asks for what is not supported.
    """
    d_model, n_heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    d_head = config.heads(n_heads, d_model)
    given = config.integer("head_dim", default=d_head, null=True)
    if given != d_head:  # transformers turns so many coordinates of heads that have others
        raise config.two_things("hidden_size / num_attention_heads", d_head, "'head_dim'", given)
    context = config.integer("max_position_embeddings", default=2048)
    return ModelSpec(
        architecture="gpt_neox",
        n_layers=config.integer("num_hidden_layers"),
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=n_heads,
        d_head=d_head,
        d_mlp=config.integer("intermediate_size"),
        d_vocab=config.integer("vocab_size"),
        context=context,
        norm="layer",
        norm_eps=config.number("layer_norm_eps", default=1e-5),
        parallel=config.flag("use_parallel_residual", default=True),
        gated=False,
        activation=config.activation("hidden_act", default="gelu"),
        rope=config.rope(
            d_head,
            context,
            theta=Setting("rotary_emb_base", 10_000.0, unread="rope_theta"),
            partial=Setting("rotary_pct", 0.25, unread="partial_rotary_factor"),
        ),
        tied_embeddings=config.flag("tie_word_embeddings", default=False),
        fused_qkv=True,
        qkv_bias=config.flag("attention_bias", default=True),
        out_bias=config.flag("attention_bias", default=True),
        mlp_bias=True,
    )


ARCHITECTURE = Architecture(
    name="gpt_neox",
    read_spec=read_spec,
    prefix="gpt_neox.",
    names={
        "embed_in.weight": "embedding.weight",
        "layers.{l}.input_layernorm.weight": "norm1.weight",
        "layers.{l}.input_layernorm.bias": "norm1.bias",
        "layers.{l}.post_attention_layernorm.weight": "norm2.weight",
        "layers.{l}.post_attention_layernorm.bias": "norm2.bias",
        "layers.{l}.attention.query_key_value.weight": "qkv.0.weight",
        "layers.{l}.attention.query_key_value.bias": "qkv.0.bias",
        "layers.{l}.attention.dense.weight": "out.weight",
        "layers.{l}.attention.dense.bias": "out.bias",
        "layers.{l}.mlp.dense_h_to_4h.weight": "up.weight",
        "layers.{l}.mlp.dense_h_to_4h.bias": "up.bias",
        "layers.{l}.mlp.dense_4h_to_h.weight": "down.weight",
        "layers.{l}.mlp.dense_4h_to_h.bias": "down.bias",
        "final_layer_norm.weight": "norm.weight",
        "final_layer_norm.bias": "norm.bias",
        "embed_out.weight": "unembedding.weight",  # in files
        "lm_head.weight": "unembedding.weight",  # in transformers' modules since 5.0
        # The causal mask, its filler and the rotary frequencies: buffers of older versions.
        "layers.{l}.attention.bias": None,
        "layers.{l}.attention.masked_bias": None,
        "layers.{l}.attention.rotary_emb.inv_freq": None,
        "rotary_emb.inv_freq": None,
    },
    # Of other families; transformers reads none of them here.
    ignored=frozenset({"num_key_value_heads", "n_positions", "rms_norm_eps"}),
)
