"""LoRA adapters merged on load agree with PEFT's own merge; what is not supported is refused."""

import json
import os

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from deltapatch import DeltapatchError, load_model
from deltapatch.models.convert import convert

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True:UserWarning"),
]

LLAMA_ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = {
    "llama-all": ("llama", {"target_modules": LLAMA_ALL, "r": 3, "lora_alpha": 7}),
    "llama-rslora": ("llama", {"target_modules": ["q_proj", "v_proj"], "r": 4, "use_rslora": True}),
    "llama-patterns": (
        "llama",
        {
            "target_modules": LLAMA_ALL,
            "rank_pattern": {"q_proj": 2, r"model.layers.1.mlp.\w+_proj": 5},
            "alpha_pattern": {"layers.0.self_attn.v_proj": 3, "down_proj": 40},
        },
    ),
    "llama-fan-in-fan-out": ("llama", {"target_modules": ["o_proj"], "fan_in_fan_out": True}),
    "llama-regex": ("llama", {"target_modules": r".*layers\.1\..*(q_proj|up_proj)"}),
    "llama-output": ("llama", {"target_modules": ["lm_head", "k_proj"]}),
    "llama-one-layer": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "llama-layer-number": ("llama", {"target_modules": LLAMA_ALL, "layers_to_transform": 0}),
    "llama-layers-pattern": (
        "llama",
        {"target_modules": LLAMA_ALL, "layers_to_transform": [1], "layers_pattern": "layers"},
    ),
    "llama-more-than-it-has": ("llama", {"target_modules": ["q_proj", "c_attn", "experts.0.up_proj"]}),
    "llama-excluded": (
        "llama",
        {"target_modules": LLAMA_ALL, "exclude_modules": ["layers.0.mlp.up_proj", "k_proj", "lm_head"]},
    ),
    "llama-excluded-by-pattern": (
        "llama",
        {"target_modules": LLAMA_ALL, "exclude_modules": r".*layers\.0\.(self_attn|mlp).*"},
    ),
    "llama-all-linear": ("llama", {"target_modules": "all-linear"}),
    "llama-all-linear-but": ("llama", {"target_modules": "all-linear", "exclude_modules": ["mlp.up_proj"]}),
    "llama-ahead": ("llama", {"target_modules": r"^(?!.*layers\.0).*(q_proj|up_proj)"}),
    "llama-default": ("llama", {"target_modules": None}),
    "gptj-default": ("gptj", {"target_modules": None}),
    "neox-default": ("gpt_neox", {"target_modules": None}),
    "neox-all-linear": ("gpt_neox", {"target_modules": "all-linear"}),
    "neox-output": ("gpt_neox", {"target_modules": ["lm_head", "dense"]}),
    "neox-fused": ("gpt_neox", {"target_modules": ["query_key_value"], "r": 4, "lora_alpha": 16}),
    "neox-all": (
        "gpt_neox",
        {"target_modules": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]},
    ),
    "gptj": ("gptj", {"target_modules": ["q_proj", "v_proj", "out_proj", "fc_in", "fc_out"]}),
}


def change_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def adapt(hf, **options):
    """A PEFT model with random updates that are large enough to matter."""
    model = peft.get_peft_model(hf, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    generator = torch.Generator().manual_seed(9)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize("case", CASES)
def test_merge_agrees_with_peft(case, build, saved, tmp_path, ids, reference, relative):
    kind, options = CASES[case]
    hf = build(kind)
    folder = saved(hf)
    plain = reference(hf, ids)
    adapted = adapt(hf, **options)
    # Without the option, peft copies the whole output matrix into the adapter where that is a target.
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    merged = reference(adapted.merge_and_unload(), ids)
    assert relative(plain, merged) > 0.01
    for asked in (None, options.get("target_modules")):  # peft writes down what it has found
        if asked is not None:
            change_config(tmp_path / "adapter", target_modules=asked)
        for stream in (False, True):
            model = load_model(folder, device="cpu", stream=stream, adapter=tmp_path / "adapter")
            assert relative(model.logits(ids), merged) < 1e-5


@pytest.mark.parametrize(
    ("changes", "left_out"),
    [
        ({"exclude_modules": ["layers.0.self_attn.v_proj"]}, "model.layers.0.self_attn.v_proj"),
        ({"exclude_modules": r".*layers\.1.*q_proj"}, "model.layers.1.self_attn.q_proj"),
        ({"layers_to_transform": [1]}, "model.layers.0.self_attn.q_proj"),
        ({"target_modules": ["q_proj"]}, "model.layers.0.self_attn.v_proj"),
        ({"target_modules": r".*self_attn\.v_proj"}, "model.layers.0.self_attn.q_proj"),
    ],
)
def test_what_peft_would_leave_out_is_refused(pair, changes, left_out, ids, reference):
    hf = transformers.AutoModelForCausalLM.from_pretrained(pair[0])
    whole = reference(peft.PeftModel.from_pretrained(hf, pair[1]).merge_and_unload(), ids)
    change_config(pair[1], **changes)
    hf = transformers.AutoModelForCausalLM.from_pretrained(pair[0])
    part = reference(peft.PeftModel.from_pretrained(hf, pair[1]).merge_and_unload(), ids)
    assert not torch.equal(part, whole)
    fails(pair, f"holds an update of {left_out!r}, which adapter_config.json does not target, so PEFT leaves")


def test_what_peft_would_fill_with_nothing_is_refused(pair):
    change_config(pair[1], target_modules=["q_proj", "v_proj", "k_proj"])
    fails(pair, "targets 'model.layers.0.self_attn.k_proj', for which adapter_model.safetensors holds no")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"target_modules": 3}, "'target_modules' must be names or a pattern, not 3"),
        ({"exclude_modules": [None]}, "'exclude_modules' must be names or a pattern"),
        ({"target_modules": "(q_proj"}, "'target_modules' is .*, that is no pattern"),
        ({"layers_to_transform": ["1"]}, "'layers_to_transform' must be numbers, not .'1'"),
    ],
)
def test_broken_targets(pair, changes, match):
    change_config(pair[1], **changes)
    fails(pair, match)


def test_merge_into_half_precision_and_wider(build, saved, tmp_path, ids, relative):
    hf = build("llama")
    folder = saved(hf.to(torch.bfloat16))
    adapt(hf, target_modules=LLAMA_ALL).save_pretrained(tmp_path / "adapter")
    exact = load_model(folder, device="cpu", dtype="float64", adapter=tmp_path / "adapter").logits(ids)
    single = load_model(folder, device="cpu", dtype="float32", adapter=tmp_path / "adapter").logits(ids)
    kept = load_model(folder, device="cpu", adapter=tmp_path / "adapter")
    assert relative(single, exact) < 1e-5
    assert kept.dtype == torch.bfloat16
    assert kept.layer(0, torch.bfloat16).qkv[0].weight.dtype == torch.bfloat16
    assert 1e-4 < relative(kept.logits(ids), exact) < 3e-2


def test_fingerprint_tells_adapters_apart(build, saved, tmp_path):
    hf = build("llama")
    folder = saved(hf)
    adapted = adapt(hf, target_modules=["q_proj"])
    prints = {load_model(folder, device="cpu").fingerprint()}
    for i in range(2):
        adapted.save_pretrained(tmp_path / str(i))
        prints.add(load_model(folder, device="cpu", adapter=tmp_path / str(i)).fingerprint())
        with torch.no_grad():
            adapted.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight[0, 0] += 1
    assert len(prints) == 3


@pytest.fixture
def pair(build, saved, tmp_path):
    """Folders of a model and of an adapter for its q_proj and v_proj."""
    hf = build("llama")
    folder = saved(hf)
    adapt(hf, target_modules=["q_proj", "v_proj"]).save_pretrained(tmp_path / "adapter")
    return folder, tmp_path / "adapter"


def fails(pair, match):
    with pytest.raises(DeltapatchError, match=match) as caught:
        load_model(pair[0], device="cpu", adapter=pair[1])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"use_dora": True}, "option 'use_dora' is not supported: merge the adapter with peft first"),
        ({"modules_to_save": ["lm_head"]}, "option 'modules_to_save' is not supported"),
        ({"layer_replication": [[0, 2]]}, "option 'layer_replication' is not supported"),
        ({"trainable_token_indices": [1]}, "option 'trainable_token_indices' is not supported"),
        ({"bias": "all"}, "'bias' is 'all', and only 'none' is supported"),
        ({"peft_type": "IA3"}, "adapters of type 'IA3' are not supported: LORA is"),
        ({"init_lora_weights": "pissa"}, "'init_lora_weights' is 'pissa', which changes the base weights"),
        ({"r": 5}, "'model.layers.0.self_attn.q_proj' has rank 8, but adapter_config.json says 5"),
        ({"lora_alpha": "x"}, "'lora_alpha' must be a number, not 'x'"),
    ],
)
def test_options_that_are_not_supported(pair, changes, match):
    change_config(pair[1], **changes)
    fails(pair, match)


def edit(pair, change):
    path = pair[1] / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def test_tensors_that_do_not_fit(pair):
    original = load_file(pair[1] / "adapter_model.safetensors")

    def put(name, tensor):
        save_file(original | {name: tensor}, pair[1] / "adapter_model.safetensors")

    put("base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector", torch.ones(3))
    fails(pair, "'.*lora_magnitude_vector' is not supported: only lora_A and lora_B")
    put(A, torch.ones(8, 31))
    fails(pair, r"is \[32, 8\] x \[8, 31\], but the model's matrix is \[32, 32\]")
    put(A, torch.full((8, 32), float("nan")))
    fails(pair, f"tensor '{A}' holds NaN or infinity")
    edit(pair, lambda t: t.pop(A))
    fails(pair, "only one of lora_A and lora_B of 'model.layers.0.self_attn.q_proj'")
    moved = {name.replace("layers.1", "layers.7"): tensor for name, tensor in original.items()}
    save_file(moved, pair[1] / "adapter_model.safetensors")
    fails(pair, "changes 'model.layers.7.self_attn.q_proj', which is not a matrix of this model")
    renamed = {name.replace("q_proj", "z_proj"): tensor.clone() for name, tensor in original.items()}
    save_file(renamed | original, pair[1] / "adapter_model.safetensors")
    fails(pair, "changes '.*z_proj', which is not a matrix of this model")
    save_file({}, pair[1] / "adapter_model.safetensors")
    fails(pair, "the adapter is empty")


def test_a_tied_output_matrix_cannot_be_changed_alone(build, saved, tmp_path):
    hf = build("llama", tie_word_embeddings=True)
    folder = saved(hf)
    untied = build("llama")
    adapted = adapt(untied, target_modules=["lm_head"])
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    fails((folder, tmp_path / "adapter"), "changes 'lm_head', which is not a matrix of this model")


def test_files_that_are_missing(pair):
    (pair[1] / "adapter_model.safetensors").rename(pair[1] / "elsewhere")
    fails(pair, "has no adapter_model.safetensors")
    torch.save({}, pair[1] / "adapter_model.bin")
    fails(pair, f"`deltapatch convert {pair[1]} --out OUT`")
    (pair[1] / "adapter_config.json").unlink()
    fails(pair, "has no adapter_config.json: it is not a LoRA adapter")


def test_an_update_that_the_dtype_does_not_hold(build, saved, tmp_path, ids):
    hf = build("llama")
    folder = saved(hf.to(torch.float16))
    adapted = adapt(hf.float(), target_modules=["q_proj"])
    adapted.base_model.model.model.layers[1].self_attn.q_proj.lora_B["default"].weight.data.fill_(1e6)
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(DeltapatchError, match=r"q_proj.weight' with the adapter's update has numbers larger"):
        load_model(folder, device="cpu", adapter=tmp_path / "adapter")
    wide = load_model(folder, device="cpu", dtype="float32", adapter=tmp_path / "adapter")
    assert wide.logits(ids).isfinite().all()


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_files_that_are_none(pair, file):
    (pair[1] / file).unlink()
    os.mkfifo(pair[1] / file)
    fails(pair, f"{file} is a FIFO .a pipe., not a regular file")
    (pair[1] / file).unlink()
    (pair[1] / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1f\nsize 44\n")
    fails(pair, f"{file} is a git-lfs pointer")


def test_a_bin_adapter_is_converted(pair, tmp_path, ids):
    logits = load_model(pair[0], device="cpu", adapter=pair[1]).logits(ids)
    path = pair[1] / "adapter_model.safetensors"
    torch.save(load_file(path), pair[1] / "adapter_model.bin")
    path.unlink()
    out = convert(pair[1], tmp_path / "converted")
    assert torch.equal(load_model(pair[0], device="cpu", adapter=out).logits(ids), logits)


def test_names_that_keep_the_name_of_the_adapter(pair, ids):
    logits = load_model(pair[0], device="cpu", adapter=pair[1]).logits(ids)
    path = pair[1] / "adapter_model.safetensors"
    renamed = {n.replace(".weight", ".default.weight"): t for n, t in load_file(path).items()}
    save_file(renamed, path)
    assert torch.equal(load_model(pair[0], device="cpu", adapter=pair[1]).logits(ids), logits)
