"""Checkpoints as they are and as they go wrong: every mistake gets one sentence that names it."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltapatch import DeltapatchError, load_model
from deltapatch.models.convert import convert
from deltapatch.models.tensors import check_finite

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(build, saved):
    return saved(build("gpt_neox"))


@pytest.fixture
def shards(build, saved):
    return saved(build("llama"), max_shard_size="20KB")


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def fails(folder, match, **options):
    with pytest.raises(DeltapatchError, match=match) as caught:
        load_model(folder, device="cpu", **options)
    assert "\n" not in str(caught.value)


def test_no_such_folder(tmp_path):
    fails(tmp_path / "nothing", "model folder .*nothing does not exist")


def test_hub_errors_become_a_sentence(monkeypatch):
    import huggingface_hub

    def offline(name, allow_patterns):
        raise OSError("no network\nand a traceback")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    fails(
        "some/model",
        "no folder some/model, and the Hugging Face hub gives no model of that name: no network$",
    )


def test_a_hub_id_downloads_what_is_needed(monkeypatch, folder, ids):
    import huggingface_hub

    asked = {}

    def download(name, allow_patterns):
        asked.update(name=name, patterns=allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model = load_model("some/model", device="cpu")
    assert asked["name"] == model.name == "some/model"
    assert {"config.json", WEIGHTS, "tokenizer.json"} <= set(asked["patterns"])
    assert not [p for p in asked["patterns"] if p.endswith((".bin", ".py"))]
    assert torch.equal(model.logits(ids), load_model(folder, device="cpu").logits(ids))


@pytest.fixture
def hub(monkeypatch, build, tmp_path):
    """A model of the hub with a checkpoint in training: what was asked for, and the commits of both."""
    import huggingface_hub

    asked, commits = [], {"main": "a" * 40, "step1000": "b" * 40}
    for seed, commit in enumerate(commits.values()):
        build("gpt_neox", seed=seed).save_pretrained(tmp_path / "snapshots" / commit)

    def download(name, allow_patterns, revision="main"):
        asked.append(revision)
        if revision not in commits:
            raise OSError("404")
        return str(tmp_path / "snapshots" / commits[revision])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked, commits


def test_a_revision_of_a_hub_model(hub, folder, tmp_path):
    asked, commits = hub
    main, early = load_model("some/model", "cpu"), load_model("some/model", "cpu", revision="step1000")
    assert asked == ["main", "step1000"]
    assert (early.name, early.revision, early.commit) == ("some/model", "step1000", commits["step1000"])
    assert (main.revision, main.commit) == (None, commits["main"])
    assert main.fingerprint() != early.fingerprint()
    assert "'some/model at step1000'" in repr(early)
    with pytest.raises(DeltapatchError, match="no revision 'step7' of such a model: 404"):
        load_model("some/model", "cpu", revision="step7")
    for local in (folder, "builtin:gpt-neox-arithmetic"):
        with pytest.raises(DeltapatchError, match="is not a model of the hub, and has no revision 'step7'"):
            load_model(local, "cpu", revision="step7")
    with pytest.raises(DeltapatchError, match="a revision is a branch, tag or commit of the hub, not ''"):
        load_model("some/model", "cpu", revision="")


def test_a_revision_is_converted(hub, tmp_path):
    asked, _ = hub
    with pytest.raises(DeltapatchError, match=f"snapshots/{'b' * 40} holds safetensors already"):
        convert("some/model", tmp_path / "out", revision="step1000")
    assert asked == ["step1000"]


def test_a_hub_model_without_safetensors(monkeypatch, folder):
    import huggingface_hub

    (folder / WEIGHTS).unlink()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: str(folder))
    fails("some/model", "some/model has no safetensors.*`deltapatch convert some/model --out OUT`")


def test_a_file_is_no_folder(folder):
    fails(folder / WEIGHTS, "is a file: give the folder")


def test_no_config(folder):
    (folder / "config.json").unlink()
    fails(folder, "has no config.json: it is not a model folder")
    (folder / "adapter_config.json").write_text("{}")
    fails(folder, "holds a LoRA adapter")


def test_broken_config(folder):
    (folder / "config.json").write_text('{"model_type": "llama",\n oops')
    fails(folder, r"config.json, line 2: not valid JSON")
    (folder / "config.json").write_text("[]")
    fails(folder, "must hold a JSON object, not a list")
    (folder / "config.json").write_bytes(b"\xff\xfe")
    fails(folder, "is not a text file")


@pytest.mark.parametrize("keep", [0, 5, 300, -1])
@pytest.mark.parametrize("sharded", [False, True])
def test_truncated_weights(keep, sharded, build, saved):
    folder = saved(build("llama"), **({"max_shard_size": "20KB"} if sharded else {}))
    path = sorted(folder.glob("*.safetensors"))[-1]
    path.write_bytes(path.read_bytes()[:keep])
    fails(folder, f"{path} is not a whole safetensors file .* it may be truncated")


def test_no_weights_and_bin_only(folder):
    (folder / WEIGHTS).unlink()
    fails(folder, "has no weights: neither model.safetensors nor")
    torch.save({}, folder / "pytorch_model.bin")
    fails(folder, f"`deltapatch convert {folder} --out OUT`")


@pytest.mark.parametrize("stream", [False, True])
def test_numbers_that_the_dtype_does_not_hold(stream, folder, tmp_path):
    edit_weights(folder, lambda t: t["gpt_neox.layers.1.mlp.dense_h_to_4h.bias"].fill_(7e4))
    said = r"dense_h_to_4h.bias' has numbers larger than float16 holds \(65504\): load the model with"
    with pytest.raises(DeltapatchError, match=said):
        load_model(folder, device="cpu", dtype="float16", stream=stream).logits([1])
    assert load_model(folder, device="cpu", dtype="bfloat16", stream=stream).logits([1]).isfinite().all()


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_files_that_are_none(file, folder, ids):
    """A FIFO would never end; nobody writes to it here."""
    (folder / file).unlink(missing_ok=True)
    os.mkfifo(folder / file)
    fails(folder, f"{file} is a FIFO .a pipe., not a regular file: save what it gives to a file")
    (folder / file).unlink()
    (folder / file).symlink_to("/dev/zero")
    fails(folder, f"{file} is a device, not a regular file")
    (folder / file).unlink()
    (folder / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1f\nsize 44\n")
    fails(folder, f"{file} is a git-lfs pointer, not the file itself: run `git lfs pull`")


def test_missing_tensor(folder):
    edit_weights(folder, lambda t: t.pop("gpt_neox.layers.1.mlp.dense_h_to_4h.bias"))
    fails(folder, "lacks tensor 'gpt_neox.layers.1.mlp.dense_h_to_4h.bias'")


def test_missing_output_matrix(build, tmp_path):
    build("llama").model.save_pretrained(tmp_path / "base")
    fails(tmp_path / "base", "lacks tensor 'lm_head.weight'")


def test_wrong_shape(folder):
    name = "gpt_neox.layers.0.attention.dense.weight"
    edit_weights(folder, lambda t: t.update({name: torch.zeros(32, 31)}))
    fails(
        folder,
        rf"model.safetensors: tensor '{name}' has shape \[32, 31\], but config.json asks for \[32, 32\]",
    )


def test_unknown_tensors(folder):
    edit_weights(folder, lambda t: t.update({"gpt_neox.layers.0.attention.q_norm.weight": torch.ones(8)}))
    fails(folder, "'gpt_neox.layers.0.attention.q_norm.weight' that a model of type 'gpt_neox' does not have")


def test_tensors_at_odds_with_the_config(folder):
    edit_config(folder, num_hidden_layers=1)
    fails(folder, "holds tensor 'gpt_neox.layers.1..*', for which its config.json has no place")
    edit_config(folder, num_hidden_layers=2, attention_bias=False)
    fails(folder, "holds tensor '.*bias', for which its config.json has no place")


def test_the_same_weight_under_two_names(folder):
    def add(tensors):
        tensors["embed_in.weight"] = tensors["gpt_neox.embed_in.weight"].clone()

    edit_weights(folder, add)
    fails(folder, "'embed_in.weight' and 'gpt_neox.embed_in.weight', which are the same weight|same weight")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nan_in_weights(value, dtype, build, saved):
    folder = saved(build("gpt_neox").to(dtype))
    name = "gpt_neox.layers.1.mlp.dense_4h_to_h.weight"

    def spoil(tensors):
        tensors[name][3, 5] = value

    edit_weights(folder, spoil)
    overflowed = dtype == torch.float16 and value == value
    held = "infinity, which float16 makes of numbers above 65504" if overflowed else "NaN or infinity"
    fails(folder, f"model.safetensors: tensor '{name}' holds {held}")
    streamed = load_model(folder, device="cpu", stream=True)
    streamed.layer(0)
    with pytest.raises(DeltapatchError, match=f"tensor '{name}' holds {held}"):
        streamed.layer(1)


def test_check_finite_passes_what_is_finite():
    check_finite(torch.tensor([3e38, -3e38]), "x", "here")
    check_finite(torch.empty(0), "x", "here")


def test_quantised_weights(folder):
    edit_weights(
        folder, lambda t: t.update({"gpt_neox.final_layer_norm.weight": torch.ones(32, dtype=torch.int8)})
    )
    fails(
        folder, "'gpt_neox.final_layer_norm.weight' is of dtype I8, and quantised weights are not supported"
    )


def test_shards_that_do_not_fit_together(shards):
    index_path = shards / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    name, file = next(iter(index["weight_map"].items()))
    tensors = load_file(shards / file)
    value = tensors.pop(name)
    save_file(tensors or {"lm_head.bias": value}, shards / file)
    fails(shards, f"{file} lacks tensor '{name}', which the index promises")
    (shards / file).unlink()
    fails(shards, f"{file} is missing: the checkpoint is incomplete")
    index["weight_map"][name] = "../elsewhere.safetensors"
    index_path.write_text(json.dumps(index))
    fails(shards, "'../elsewhere.safetensors' is not the name of a file in the same folder")
    index_path.write_text("{}")
    fails(shards, "index.json has no 'weight_map'")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"model_type": "mixtral"},
            r"is of model_type 'mixtral', which is not supported: supported are gpt_neox, .* \(mistral is",
        ),
        ({"model_type": None}, "names no 'model_type': supported are"),
        ({"sliding_window": 64}, r"has a field 'sliding_window' \(64\), which models of type 'gpt_neox' are"),
        ({"residual_multiplier": 0.2}, "has a field 'residual_multiplier' .*: take it out if it does not"),
        ({"quantization_config": {"bits": 4}}, "asks for quantised weights"),
        ({"num_local_experts": 8}, "asks for a mixture of experts"),
        ({"hidden_act": "quick_gelu"}, "activation 'quick_gelu' is not supported: it must be one of gelu, "),
        ({"hidden_size": None}, "'hidden_size' is null, which is no value of it: give one, or leave it out"),
        ({"num_hidden_layers": "2"}, "'num_hidden_layers' must be a positive integer, not '2'"),
        ({"num_attention_heads": 0}, "'num_attention_heads' must be a positive integer, not 0"),
        ({"num_attention_heads": 5}, "the hidden size 32 is not divisible by the 5 attention heads"),
        ({"layer_norm_eps": -1}, "'layer_norm_eps' must be a positive number, not -1"),
        ({"use_parallel_residual": "yes"}, "'use_parallel_residual' must be true or false, not 'yes'"),
        ({"rope_parameters": {"rope_type": "ntk", "factor": 2}}, "rotary scaling 'ntk' is not supported"),
        ({"rope_parameters": {"rope_type": ["yarn"]}}, "rotary scaling .* is not supported"),
        ({"model_type": ["llama"]}, "is of model_type .*, which is not supported"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rotary scaling 'linear' needs a 'factor'"),
        ({"rope_parameters": {"full": {"rope_type": "default"}}}, "rotary settings .* are not supported"),
        ({"rope_parameters": {"partial_rotary_factor": 0.4}}, "3 rotary coordinates of 8 are not supported"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2, "partial_rotary_factor": 0.25}},
            "dynamic rotary scaling needs more than 2",
        ),
        (
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "factor": 2,
                    "low_freq_factor": 4,
                    "high_freq_factor": 4,
                }
            },
            "'high_freq_factor' must be larger",
        ),
    ],
)
def test_configs_that_are_not_supported(folder, changes, match):
    edit_config(folder, **changes)
    fails(folder, match)


def test_llama_options_that_are_not_supported(build, saved):
    folder = saved(build("llama"))
    edit_config(folder, num_key_value_heads=3)
    fails(folder, "4 heads cannot share 3 key-value heads")
    edit_config(folder, num_key_value_heads=2, head_dim=0)
    fails(folder, "'head_dim' must be a positive integer, not 0")
    edit_config(folder, head_dim=None, rope_parameters={"partial_rotary_factor": 0.5})
    fails(folder, "'partial_rotary_factor' other than 1 is not supported in a llama model")


def test_gptj_rotary_dim(build, saved):
    folder = saved(build("gptj"))
    edit_config(folder, rotary_dim=10)
    fails(folder, "10 rotary coordinates of 8 are not supported")


OLD_NAMES = {
    "gpt_neox": {
        "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool),
        "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9),
        "gpt_neox.layers.1.attention.rotary_emb.inv_freq": torch.ones(2),
    },
    "gptj": {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8),
        "transformer.h.1.attn.masked_bias": torch.tensor(-float("inf")),
    },
    "llama": {"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4)},
}


@pytest.mark.parametrize("kind", OLD_NAMES)
def test_buffers_of_older_versions_are_ignored(kind, build, saved, ids):
    folder = saved(build(kind))
    before = load_model(folder, device="cpu").logits(ids)
    edit_weights(folder, lambda t: t.update(OLD_NAMES[kind]))
    assert torch.equal(load_model(folder, device="cpu").logits(ids), before)


@pytest.mark.parametrize(
    ("kind", "prefix"), [("gpt_neox", "gpt_neox."), ("gptj", "transformer."), ("llama", "model.")]
)
def test_names_with_and_without_the_prefix(kind, prefix, build, saved, ids):
    folder = saved(build(kind))
    before = load_model(folder, device="cpu").logits(ids)

    def rename(tensors):
        for name in list(tensors):
            assert name.startswith((prefix, "lm_head", "embed_out"))
            tensors[name.removeprefix(prefix)] = tensors.pop(name)

    edit_weights(folder, rename)
    assert torch.equal(load_model(folder, device="cpu").logits(ids), before)


def test_both_names_of_the_output_matrix_of_gpt_neox(folder, ids):
    before = load_model(folder, device="cpu").logits(ids)
    found = []

    def rename(tensors):
        old = "embed_out.weight" if "embed_out.weight" in tensors else "lm_head.weight"
        new = "lm_head.weight" if old == "embed_out.weight" else "embed_out.weight"
        tensors[new] = tensors.pop(old)
        found.append(old)

    edit_weights(folder, rename)
    assert torch.equal(load_model(folder, device="cpu").logits(ids), before)
    edit_weights(folder, rename)
    assert torch.equal(load_model(folder, device="cpu").logits(ids), before)
    assert set(found) == {"embed_out.weight", "lm_head.weight"}


def test_a_tied_output_matrix_in_the_file(build, saved, ids):
    folder = saved(build("llama", tie_word_embeddings=True))
    before = load_model(folder, device="cpu").logits(ids)
    same = load_file(folder / WEIGHTS)["model.embed_tokens.weight"].clone()
    edit_weights(folder, lambda t: t.update({"lm_head.weight": same}))
    assert torch.equal(load_model(folder, device="cpu").logits(ids), before)
    edit_weights(folder, lambda t: t.update({"lm_head.weight": same + 1}))
    fails(
        folder, "'lm_head.weight' differs from the embedding, though config.json says 'tie_word_embeddings'"
    )
