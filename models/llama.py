"""LLaMA: RMSNorm, gated MLP, grouped-query heads, sequential blocks, scaled rotary."""

from deltapatch.errors import DeltapatchError
from deltapatch.models.architecture import Architecture
from deltapatch.models.config import Config, Setting
from deltapatch.models.spec import ModelSpec


def read_spec(config: Config) -> ModelSpec:
    """The spec of a config.json with model_type "llama".

    Raises:
        DeltapatchError: a field is missing, broken, or asks for what is not supported.
    """
    d_model, n_heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    n_kv_heads = config.integer("num_key_value_heads", default=n_heads, null=True)
    if n_heads % n_kv_heads:
        raise DeltapatchError(f"{config.where}: {n_heads} heads cannot share {n_kv_heads} key-value heads")
    given = config.find("head_dim", null=True) is not None
    d_head = config.integer("head_dim") if given else config.heads(n_heads, d_model)
    context = config.integer("max_position_embeddings", default=2048)
    rope = config.rope(
        d_head,
        context,
        theta=Setting("rope_theta", 10_000.0),
        partial=Setting("partial_rotary_factor", 1.0, null=True),
    )
    if rope.dim != d_head:
        raise DeltapatchError(
            f"{config.where}: a 'partial_rotary_factor' other than 1 is not supported in a llama model"
        )
    return ModelSpec(
        architecture="llama",
        n_layers=config.integer("num_hidden_layers"),
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        d_head=d_head,
        d_mlp=config.integer("intermediate_size"),
        d_vocab=config.integer("vocab_size"),
        context=context,
        norm="rms",
        norm_eps=config.number("rms_norm_eps", default=1e-6),
        parallel=False,
        gated=True,
        activation=config.activation("hidden_act", default="silu"),
        rope=rope,
        tied_embeddings=config.flag("tie_word_embeddings", default=False),
        qkv_bias=config.flag("attention_bias", default=False),
        out_bias=config.flag("attention_bias", default=False),
        mlp_bias=config.flag("mlp_bias", default=False),
    )


ARCHITECTURE = Architecture(
    name="llama",
    read_spec=read_spec,
    prefix="model.",
    names={
        "embed_tokens.weight": "embedding.weight",
        "layers.{l}.input_layernorm.weight": "norm1.weight",
        "layers.{l}.post_attention_layernorm.weight": "norm2.weight",
        "layers.{l}.self_attn.q_proj.weight": "qkv.0.weight",
        "layers.{l}.self_attn.q_proj.bias": "qkv.0.bias",
        "layers.{l}.self_attn.k_proj.weight": "qkv.1.weight",
        "layers.{l}.self_attn.k_proj.bias": "qkv.1.bias",
        "layers.{l}.self_attn.v_proj.weight": "qkv.2.weight",
        "layers.{l}.self_attn.v_proj.bias": "qkv.2.bias",
        "layers.{l}.self_attn.o_proj.weight": "out.weight",
        "layers.{l}.self_attn.o_proj.bias": "out.bias",
        "layers.{l}.mlp.gate_proj.weight": "gate.weight",
        "layers.{l}.mlp.gate_proj.bias": "gate.bias",
        "layers.{l}.mlp.up_proj.weight": "up.weight",
        "layers.{l}.mlp.up_proj.bias": "up.bias",
        "layers.{l}.mlp.down_proj.weight": "down.weight",
        "layers.{l}.mlp.down_proj.bias": "down.bias",
        "norm.weight": "norm.weight",
        "lm_head.weight": "unembedding.weight",
        # The rotary frequencies: buffers of older versions.
        "layers.{l}.self_attn.rotary_emb.inv_freq": None,
        "rotary_emb.inv_freq": None,
    },
)
