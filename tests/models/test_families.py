"""The later families: logits over any options, as they are saved, their configs, their adapters."""

import json
import re

import pytest
import torch
import transformers
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deltapatch import DeltapatchError, PromptPair, from_transformers, load_model, sweep
from deltapatch.cli.main import cli
from deltapatch.models.tensors import SafetensorsFiles

FAMILIES = (
    "gpt2", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "olmo2", "olmo3", "phi3",
    "granite", "smollm3", "stablelm",
)  # fmt: skip
FAMILY = pytest.mark.parametrize("kind", FAMILIES)


YARNS = (
    {},
    {"attention_factor": 1.3},
    {"beta_fast": 8, "beta_slow": 2},
    {"truncate": False},
    {"mscale": 0.7, "mscale_all_dim": 1.2},
)
KINDS = ("full_attention", "sliding_attention")


@st.composite
def ropes(draw, d_head, context, kinds=("default", "linear", "dynamic", "llama3", "yarn")):
    """`rope_parameters`, for prompts on both sides of the original context."""
    kind = draw(st.sampled_from(kinds))
    out = {"rope_type": kind, "rope_theta": draw(st.sampled_from([50.0, 1e4, 5e5]))}
    if kind != "default":
        out["factor"] = draw(st.sampled_from([1.5, 4.0]))
    if kind == "llama3":
        out |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if kind in ("llama3", "yarn", "longrope"):
        out["original_max_position_embeddings"] = draw(st.sampled_from([4, 6, context]))
    if kind == "yarn":
        out |= draw(st.sampled_from(YARNS))
    if kind == "longrope":
        factors = st.lists(st.floats(0.5, 4), min_size=d_head // 2, max_size=d_head // 2)
        out |= {"short_factor": draw(factors), "long_factor": draw(factors)}
    return out


@st.composite
def options(draw, kind):
    """Options of a family, small."""
    heads, d_head, layers = draw(st.integers(1, 4)), 2 * draw(st.integers(2, 4)), draw(st.integers(1, 4))
    shared = {"vocab_size": draw(st.integers(5, 60)), "tie_word_embeddings": draw(st.booleans())}
    if kind == "gpt2":
        names = ("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn")
        shared |= {name: draw(st.booleans()) for name in names}
        return shared | {"n_embd": heads * d_head, "n_head": heads, "n_layer": layers, "n_positions": 16}
    context = draw(st.sampled_from([8, 48]))
    types = draw(st.lists(st.sampled_from(KINDS), min_size=layers, max_size=layers))
    window = draw(st.integers(1, 6))
    shared |= {
        "hidden_size": heads * d_head,
        "num_attention_heads": heads,
        "num_key_value_heads": draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0])),
        "num_hidden_layers": layers,
        "intermediate_size": draw(st.integers(3, 40)),
        "max_position_embeddings": context,
    }
    if kind in ("qwen3", "mistral", "gemma", "gemma2", "gemma3_text"):
        shared["head_dim"] = d_head = draw(st.sampled_from([4, 6]))
    if kind in ("qwen3", "gemma", "gemma2", "gemma3_text", "olmo2", "olmo3", "granite", "smollm3"):
        shared["attention_bias"] = draw(st.booleans())
    if kind in ("granite", "smollm3"):
        shared["mlp_bias"] = draw(st.booleans())
    if kind in ("gemma2", "gemma3_text", "olmo3"):
        shared |= {"sliding_window": window, "layer_types": types}
    if kind in ("qwen2", "qwen3") and draw(st.booleans()):
        first = draw(st.integers(0, layers))
        shared |= {"use_sliding_window": True, "sliding_window": window, "max_window_layers": first}
    if kind in ("mistral", "phi3"):
        shared["sliding_window"] = draw(st.sampled_from([None, window]))
    if kind in ("gemma2", "gemma3_text"):
        shared["query_pre_attn_scalar"] = draw(st.sampled_from([5, 9]))
        for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
            shared[cap] = draw(st.sampled_from([None, 0.7, 5.0]))
    if kind.startswith("gemma"):
        shared["hidden_size"] = 144  # its root, which transformers keeps in float32, is exact
    if kind == "granite":
        names = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
        shared |= {name: draw(st.sampled_from([0.3, 1.0, 2.5])) for name in names}
    if kind == "smollm3":
        shared["no_rope_layers"] = draw(st.lists(st.integers(0, 1), min_size=layers, max_size=layers))
    if kind == "stablelm":
        shared |= {"use_parallel_residual": draw(st.booleans()), "use_qkv_bias": draw(st.booleans())}
        shared["qk_layernorm"] = draw(st.booleans())
        part = draw(st.sampled_from([0.5, 1.0]))
        rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": part}
        return shared | {"hidden_size": heads * 8, "rope_parameters": rope}
    if kind == "phi3":
        rope = draw(ropes(d_head, context, ("default", "longrope")))
        shared["original_max_position_embeddings"] = rope.get("original_max_position_embeddings", 4)
    else:
        rope = draw(ropes(d_head, context))
    if kind in ("gemma3_text", "olmo3"):
        local = {"rope_type": "default", "rope_theta": 100.0}
        rope = {"full_attention": rope, "sliding_attention": local}
        # transformers itself keeps tables of one length for dynamic scaling by type of layer.
        if rope["full_attention"]["rope_type"] == "dynamic":
            rope["full_attention"] = dict(local)
    return shared | {"rope_parameters": rope}


@FAMILY
@pytest.mark.filterwarnings("ignore:a prompt of .* tokens exceeds:UserWarning")
def test_float64_over_any_options(kind, build, exact, relative):
    @settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(options(kind), st.integers(1, 12), st.integers(0, 1000))
    def check(chosen, length, seed):
        hf = build(kind, seed=seed, attn_implementation="eager", **chosen).double()
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, chosen["vocab_size"], (length,), generator=generator).tolist()
        assert relative(from_transformers(hf).logits(ids), exact(hf, ids)) < 1e-9

    check()


@FAMILY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_what_transformers_saves_loads_and_streams(kind, dtype, build, saved, ids, relative):
    hf = build(kind).to(dtype)
    folder = saved(hf)
    kept, streamed = (load_model(folder, stream=stream) for stream in (False, True))
    assert kept.dtype == dtype
    assert torch.equal(kept.logits(ids), streamed.logits(ids))
    assert relative(kept.logits(ids), from_transformers(hf).logits(ids)) < 1e-6
    assert kept.fingerprint() == from_transformers(hf).fingerprint()


FACTORS = {"short_factor": [1.5] * 4, "long_factor": [3.0] * 4}
YARN = {"factor": 4.0, "original_max_position_embeddings": 8}
OLD = {  # what older configs say, and what the same is in newer ones
    "qwen2": (
        {"rope_theta": 50.0, "rope_scaling": None},
        {"rope_theta": 50.0, "rope_type": "default"},
    ),
    "gemma3_text": (
        {
            "rope_theta": 500.0,
            "rope_local_base_freq": 70.0,
            "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        },
        {
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 70.0},
        },
    ),
    "phi3": (
        {"rope_theta": 50.0, "rope_scaling": {"type": "su", **FACTORS}},
        {"rope_type": "longrope", "rope_theta": 50.0, **FACTORS},
    ),
    "qwen3": (
        {"rope_theta": 50.0, "rope_scaling": {"type": "yarn", **YARN}},
        {"rope_type": "yarn", "rope_theta": 50.0, **YARN},
    ),
}


@pytest.mark.parametrize("kind", OLD)
def test_old_spellings_mean_what_new_ones_do(kind, build, saved, ids):
    old, new = OLD[kind]
    options = {"head_dim": 8} if kind in ("qwen3", "gemma3_text") else {}
    folder = saved(build(kind, **options, rope_parameters=new))
    want = load_model(folder).logits(ids)
    path = folder / "config.json"
    fields = json.loads(path.read_text())
    del fields["rope_parameters"]
    path.write_text(json.dumps(fields | old))
    assert torch.equal(load_model(folder).logits(ids), want)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_a_window_that_is_not_asked_for_is_none(kind, build, saved, ids):
    folder = saved(build(kind))
    want = load_model(folder).logits(ids)
    path = folder / "config.json"
    published = {"sliding_window": 4, "use_sliding_window": False, "max_window_layers": 0}
    fields = {name: value for name, value in json.loads(path.read_text()).items() if name != "layer_types"}
    path.write_text(json.dumps(fields | published))
    assert torch.equal(load_model(folder).logits(ids), want)


def test_code_that_a_checkpoint_names_is_never_run(build, saved, ids, tmp_path):
    folder = saved(build("qwen2"))
    want = load_model(folder).logits(ids)
    (folder / "modeling_theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    path = folder / "config.json"
    named = {"auto_map": {"AutoModelForCausalLM": "modeling_theirs.Theirs"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | named))
    assert torch.equal(load_model(folder).logits(ids), want)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("kind", "changes", "match"),
    [
        ("granite", {"model_type": "llama"}, "has a field '.*_multiplier' .*'llama' are not known"),
        ("qwen2", {"layer_types": ["full_attention"]}, "'layer_types' must say .* for each of the 2 layers"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 2}, "'layer_types' must say full_attention or"),
        ("gpt2", {"add_cross_attention": True}, "'add_cross_attention' is not supported in a gpt2 model"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": 1}, "'scale_attn_by_inverse_layer_idx' must be true or"),
        ("gemma2", {"use_bidirectional_attention": True}, "'use_bidirectional_attention' is not supported"),
        ("stablelm", {"qk_layernorm": True}, r"lacks tensor '.*self_attn\.q_layernorm\.norms\.0\.weight'"),
        ("stablelm", {"qk_layernorm": True, "num_attention_heads": 2048, "hidden_size": 16384},
         "2,048 heads with LayerNorms of their own are not supported: at most 1,024 are"),
        ("smollm3", {"no_rope_layers": [1]}, "'no_rope_layers' must say 1 or 0 for each of the 2 layers"),
        ("qwen3", {"rope_parameters": {"rope_type": "yarn", "factor": 2, "beta_fast": 1, "beta_slow": 1}},
         "'beta_fast' must be larger than 'beta_slow'"),
        ("qwen3", {"rope_parameters": {"rope_type": "longrope", "factor": 2, "short_factor": [1.0]}},
         "longrope needs 'short_factor', a list of"),
        ("gemma3_text", {"rope_parameters": {"rope_type": "default"}}, "must hold an object for each of"),
        ("gemma2", {"attn_logit_softcapping": -1.0}, "'attn_logit_softcapping' must be a positive number"),
        ("mistral", {"quantization_config": {"bits": 4}}, "asks for quantised weights"),
    ],
)  # fmt: skip
def test_configs_that_are_refused(kind, changes, match, build, saved):
    folder = saved(build(kind, **({"embedding_multiplier": 3.0} if kind == "granite" else {})))
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(DeltapatchError, match=match):
        load_model(folder)


def test_prompts_longer_than_learned_positions_are_refused(build):
    model = from_transformers(build("gpt2", n_positions=6))
    assert model.logits(list(range(6))).shape == (6, 61)
    with pytest.raises(DeltapatchError, match="7 tokens is too long: the model knows 6 positions"):
        model.logits(list(range(7)))
    pair = PromptPair([1, 2, 3, 4, 5], [1, 2, 3, 4, 6], [7, 8, 9], 10)
    with pytest.raises(DeltapatchError, match="pair 0 has 7 tokens, and the model knows 6 positions"):
        sweep(model, pair, sites="mlp_out", progress=False)


def test_answers_that_cross_the_original_context_are_refused(build):
    rope = {"rope_type": "longrope", "rope_theta": 50.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    model = from_transformers(build("phi3", original_max_position_embeddings=6, rope_parameters=rope))

    def ask(length):
        prompt = list(range(1, length))
        pair = PromptPair([*prompt, 20], [*prompt, 30], [7, 8], 10)
        return sweep(model, pair, sites="mlp_out", positions="last", progress=False).values("ie")

    for length in (5, 7):  # on either side of it
        assert ask(length).shape == (1, 2, 1)
    with pytest.raises(DeltapatchError, match="a model with longrope rotary scaling, where"):
        ask(6)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("gpt2", ["c_attn", "c_fc", "c_proj"]),
        ("gpt2", None),
        ("phi3", ["qkv_proj", "gate_up_proj", "o_proj"]),
        ("gemma3_text", ["q_proj", "k_proj", "down_proj"]),
        ("olmo2", ["v_proj", "up_proj"]),
    ],
)
def test_adapters_merge_as_peft_merges_them(kind, targets, build, saved, tmp_path, ids, reference, relative):
    peft = pytest.importorskip("peft")
    hf = build(kind)
    folder, plain = saved(hf), reference(hf, ids)
    adapted = peft.get_peft_model(hf, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=targets, r=3))
    generator = torch.Generator().manual_seed(9)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    adapted.eval().save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    merged = reference(adapted.merge_and_unload(), ids)
    assert relative(plain, merged) > 0.01
    for stream in (False, True):
        model = load_model(folder, stream=stream, adapter=tmp_path / "adapter")
        assert relative(model.logits(ids), merged) < 1e-5


@pytest.mark.parametrize("kind", ["gpt2", "phi3"])
def test_a_fused_matrix_is_read_once_in_a_pass(kind, build, saved, ids, monkeypatch):
    model = load_model(saved(build(kind)), stream=True)
    model.logits(ids)
    got = []
    fetch = SafetensorsFiles.fetch
    monkeypatch.setattr(SafetensorsFiles, "fetch", lambda self, name: got.append(name) or fetch(self, name))
    model.logits(ids)
    assert got
    assert len(set(got)) == len(got)


def test_the_text_part_of_a_model_of_text_and_images(build, saved, ids, tmp_path):
    text = build("gemma3_text", head_dim=8, sliding_window=4)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = transformers.SiglipVisionConfig(**small, image_size=28, patch_size=14)
    both = transformers.Gemma3Config(text_config=text.config, vision_config=vision, mm_tokens_per_image=4)
    hf = transformers.Gemma3ForConditionalGeneration(both).eval()
    hf.model.language_model.load_state_dict(text.model.state_dict())
    hf.tie_weights()
    want = from_transformers(text).logits(ids)
    assert torch.equal(from_transformers(hf).logits(ids), want)
    folder = saved(hf)
    assert torch.equal(load_model(folder).logits(ids), want)
    path = folder / "config.json"
    fields = json.loads(path.read_text())
    del fields["text_config"]["num_attention_heads"]  # as published configs do, which have the default number
    fields["text_config"]["frobnicate"] = 3
    path.write_text(json.dumps(fields))
    with pytest.raises(DeltapatchError, match="text_config has a field 'frobnicate'"):
        load_model(folder)


def test_weights_are_shared_with_transformers(build):
    """What is fused or transposed there is a view here."""
    for kind in ("gpt2", "phi3"):
        hf = build(kind)
        model = from_transformers(hf)
        theirs = {p.untyped_storage().data_ptr() for p in hf.parameters()}
        layer = model.layer(0)
        assert {p.weight.untyped_storage().data_ptr() for p in (*layer.qkv, layer.out, layer.up)} <= theirs


def test_info_says_what_a_family_brings(build, saved):
    folder = saved(build("gemma2", sliding_window=4))
    said = CliRunner().invoke(cli, ["info", str(folder), "--untimed"]).stdout
    assert re.search(r"^norm +RMSNorm, behind attention and MLP too$", said, re.MULTILINE)
    assert re.search(r"^attention +windows of 4 in 1 of 2 layers, scores capped at 50", said, re.MULTILINE)
