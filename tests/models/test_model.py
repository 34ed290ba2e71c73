"""Loading, sharing, streaming, token checks, the tokenizer and the fingerprint."""

import os
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
import transformers
from safetensors.torch import save_file

from deltapatch import DeltapatchError, from_transformers, load_model
from deltapatch.models import fetch
from deltapatch.models.builtin_models import builtin_model_path
from deltapatch.models.model import Model

KINDS = ["gpt_neox", "gptj", "llama"]


def _tensors(part):
    if isinstance(part, torch.Tensor):
        yield part
    elif isinstance(part, tuple):
        for p in part:
            yield from _tensors(p)


@pytest.mark.parametrize("kind", KINDS)
def test_from_transformers_shares_every_weight(kind, build, ids, reference, relative):
    hf = build(kind)
    model = from_transformers(hf)
    theirs = {p.data_ptr() for p in hf.parameters()}
    ours = {t.data_ptr() for l in range(2) for t in _tensors(model.layer(l))}
    ours |= {t.data_ptr() for t in _tensors(model.ends())}
    assert ours == theirs
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.mul_(1.01)
    assert relative(model.logits(ids), reference(hf, ids)) < 1e-5


def test_from_transformers_sees_changes_in_other_dtypes_too(build, ids):
    hf = build("llama").to(torch.bfloat16)
    model = from_transformers(hf)
    before = model.logits(ids)
    with torch.no_grad():
        hf.model.layers[1].mlp.down_proj.weight.zero_()
    assert not torch.equal(model.logits(ids), before)
    assert not model.layer(1).down.weight.any()


def test_from_transformers_keeps_the_tokenizer_and_refuses_other_things(build):
    mark = object()
    assert from_transformers(build("gptj"), tokenizer=mark).tokenizer is mark
    assert from_transformers(build("gptj")).tokenizer is None
    with pytest.raises(DeltapatchError, match="needs a transformers model, not a Linear"):
        from_transformers(torch.nn.Linear(2, 2))
    opt = transformers.OPTConfig(
        hidden_size=8,
        ffn_dim=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        word_embed_proj_dim=8,
        vocab_size=9,
    )
    with pytest.raises(DeltapatchError, match="'opt', which is not supported: supported are gpt_neox"):
        from_transformers(transformers.OPTForCausalLM(opt))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_from_transformers_refuses_an_unmerged_adapter(build):
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(build("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(DeltapatchError, match="merge_and_unload"):
        from_transformers(wrapped)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_model_shares_its_tensors_and_a_streamed_one_reads_them(kind, build, saved, ids):
    folder = saved(build(kind))
    kept, streamed = load_model(folder, device="cpu"), load_model(folder, device="cpu", stream=True)
    assert {t.data_ptr() for t in _tensors(kept.layer(0))} == {t.data_ptr() for t in _tensors(kept.layer(0))}
    assert torch.equal(kept.logits(ids), streamed.logits(ids))
    assert kept.layer(0).up.weight.data_ptr() != streamed.layer(0).up.weight.data_ptr()
    for dtype in (torch.float64, torch.bfloat16):
        assert {t.dtype for t in _tensors(kept.layer(1, dtype))} == {dtype}
        assert {t.dtype for t in _tensors(streamed.ends(dtype))} == {dtype}


@pytest.mark.parametrize("kind", KINDS)
def test_tied_embeddings_are_one_tensor_in_every_dtype(kind, build, saved):
    model = load_model(saved(build(kind, tie_word_embeddings=True)), device="cpu")
    for dtype in (torch.float32, torch.float64):
        ends = model.ends(dtype)
        assert ends.embedding.data_ptr() == ends.unembedding.weight.data_ptr()


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        ("auto", torch.float32),
        ("float64", torch.float64),
        ("bfloat16", torch.bfloat16),
        (torch.float16, torch.float16),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_storage_dtype(dtype, stored, stream, build, saved, ids):
    model = load_model(saved(build("llama")), device="cpu", dtype=dtype, stream=stream)
    assert model.dtype == stored
    assert model.layer(0, stored).up.weight.dtype == stored
    assert model.layer(0).up.weight.dtype == torch.float32
    assert model.logits(ids).dtype == (torch.float64 if stored == torch.float64 else torch.float32)
    assert not model.logits(ids).requires_grad


def test_bad_arguments(build, saved):
    folder = saved(build("gptj"))
    with pytest.raises(DeltapatchError, match="unknown dtype 'int8': choose auto, float64"):
        load_model(folder, dtype="int8")
    with pytest.raises(DeltapatchError, match=r"unknown dtype 'torch\.int8'"):
        load_model(folder, dtype=torch.int8)
    with pytest.raises(DeltapatchError, match="unknown device 'gpu'"):
        load_model(folder, device="gpu")
    if not torch.cuda.is_available():
        with pytest.raises(DeltapatchError, match="device 'cuda:3' is not there: PyTorch sees 0 GPUs"):
            load_model(folder, device="cuda:3")
    model = load_model(folder, device="auto")
    assert model.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    for index in (-1, 2):
        with pytest.raises(IndexError, match="2 layers"):
            model.layer(index)


def test_token_checks(build):
    model = from_transformers(build("gpt_neox"))
    for empty in ([], torch.tensor([])):
        with pytest.raises(DeltapatchError, match="prompt is empty"):
            model.logits(empty)
    for outside in ([3, 61], [-1], torch.tensor([1, 99])):
        with pytest.raises(DeltapatchError, match="out of range: the vocabulary has 61 tokens"):
            model.logits(outside)
    for wrong in ([[1, 2]], [1.5], "text", torch.tensor(3), [True], None, [2**70]):
        with pytest.raises(DeltapatchError, match="list of ints or a 1-d tensor"):
            model.logits(wrong)
    as_list = model.logits([5, 6, 7])
    assert as_list.shape == (3, 61)
    assert torch.equal(as_list, model.logits(torch.tensor([5, 6, 7], dtype=torch.int32)))


@pytest.mark.parametrize("kind", ["gpt_neox", "llama"])
def test_prompts_beyond_the_context_warn_and_run(kind, build, reference, relative):
    hf = build(kind, max_position_embeddings=8)
    with pytest.warns(UserWarning, match="a prompt of 12 tokens exceeds the 8"):
        logits = from_transformers(hf).logits(list(range(12)))
    assert relative(logits, reference(hf, list(range(12)))) < 1e-5


def test_gptj_runs_beyond_its_table_of_positions(build):
    model = from_transformers(build("gptj", n_positions=8))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert model.logits(list(range(12))).isfinite().all()
    assert len(caught) == 1


def test_the_tokenizer_is_loaded_from_the_folder(build, saved, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = saved(build("llama"))
    assert load_model(folder, device="cpu").tokenizer is None
    words = Tokenizer(models.WordLevel({"one": 0, "two": 1, "[UNK]": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(folder)
    model = load_model(folder, device="cpu")
    assert model.tokenizer.encode("two one", add_special_tokens=False) == [1, 0]
    assert model.tokenizer is model.tokenizer
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(DeltapatchError, match=r"tokenizer\.json, line 1: not valid JSON"):
        _ = load_model(folder, device="cpu").tokenizer


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("tokenizer.json", '{\n"version": }', r"tokenizer\.json, line 2: not valid JSON"),
        ("tokenizer.json", "[]", r"tokenizer\.json must hold a JSON object, not a list"),
        (
            "tokenizer.json",
            '{"added_tokens": [], "version": "1.0"}',
            r"/tokenizer\.json cannot be loaded: .* at line 1",
        ),
        ("tokenizer_config.json", '{\n\n"a" 1}', r"tokenizer_config\.json, line 3: not valid JSON"),
        ("added_tokens.json", "{", r"added_tokens\.json, line 1: not valid JSON"),
        ("special_tokens_map.json", "", r"special_tokens_map\.json, line 1: not valid JSON"),
        (
            "tokenizer.json",
            "version https://git-lfs.github.com/spec/v1\n",
            r"tokenizer\.json is a git-lfs pointer, not the file itself",
        ),
    ],
)
def test_a_broken_tokenizer_is_told_by_file_and_line(file, text, said, build, saved):
    folder = saved(build("gpt_neox"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(builtin_model_path() / name, folder)
    (folder / file).write_text(text)
    with pytest.raises(DeltapatchError, match=said):
        _ = load_model(folder, device="cpu").tokenizer


def test_fingerprint(build, saved, tmp_path):
    one, two = build("gpt_neox"), build("gpt_neox", seed=1)
    folder = saved(one)
    print_one = load_model(folder, device="cpu").fingerprint()
    assert len(print_one) == 32
    assert load_model(folder, device="cpu", dtype="float64", stream=True).fingerprint() == print_one
    assert from_transformers(one).fingerprint() == print_one
    one.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert load_model(tmp_path / "shards", device="cpu").fingerprint() == print_one
    assert from_transformers(two).fingerprint() != print_one
    assert from_transformers(one.to(torch.bfloat16)).fingerprint() != print_one
    other_eps = build("gpt_neox", layer_norm_eps=1e-4)
    assert from_transformers(other_eps).fingerprint() != print_one


def test_any_value_of_any_tensor_counts(build, saved):
    hf = build("llama")
    folder = saved(hf)
    prints, state = {load_model(folder, device="cpu").fingerprint()}, hf.state_dict()
    for tensor in state.values():
        for at in (1, -2):  # neither is in a column or row that begins something
            before = tensor.view(-1)[at].clone()
            tensor.view(-1)[at] *= 1.001
            prints.add(from_transformers(hf).fingerprint())
            save_file(state, folder / "model.safetensors", {"format": "pt"})
            prints.add(load_model(folder, device="cpu", stream=True).fingerprint())
            tensor.view(-1)[at] = before
    assert len(prints) == 1 + 2 * len(state)


def test_a_changed_file_is_hashed_again_and_a_known_one_is_not(build, saved, monkeypatch):
    path = saved(build("gptj")) / "model.safetensors"
    hashed, really = [], fetch._hash_span
    monkeypatch.setattr(fetch, "_hash_span", lambda *a: hashed.append(a) or really(*a))
    monkeypatch.setattr(fetch, "_SETTLED", -1)  # as if it had been written long ago
    before = load_model(path.parent, device="cpu").fingerprint()
    n = len(hashed)
    assert n > 20
    assert load_model(path.parent, device="cpu").fingerprint() == before
    assert len(hashed) == n
    times, content = path.stat(), bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # only its inode's time tells
    assert load_model(path.parent, device="cpu").fingerprint() != before
    monkeypatch.setattr(fetch, "_SETTLED", 10**12)
    os.utime(path)
    for _ in range(2):  # too new to be known by its times
        n = len(hashed)
        load_model(path.parent, device="cpu").fingerprint()
        assert len(hashed) > n


@pytest.mark.parametrize("dtype", ["auto", "float64"])
def test_weights_that_were_edited_after_loading(build, saved, dtype):
    model = load_model(saved(build("gpt_neox")), device="cpu", dtype=dtype)
    before, later = model.fingerprint(), model.fingerprint_later()
    assert later() == before
    model.layer(1, dtype=None).out.weight[:, :8] = 0
    assert model.fingerprint() != before
    assert later() == before  # what it was when it was asked
    assert model.fingerprint_later()() is None
    assert from_transformers(build("gpt_neox")).fingerprint_later()() is None


def test_a_file_that_was_replaced_after_loading(build, saved, ids):
    path = saved(build("llama")) / "model.safetensors"
    kept, streamed = (load_model(path.parent, device="cpu", stream=stream) for stream in (False, True))
    later = kept.fingerprint_later()
    copy = path.with_suffix(".copy")
    copy.write_bytes(path.read_bytes())
    copy.replace(path)
    for act in (kept.fingerprint, streamed.fingerprint, lambda: streamed.logits(ids)):
        with pytest.raises(DeltapatchError, match="has changed since the model was loaded: load the model"):
            act()
    assert later() is None


def test_loading_does_not_import_transformers(build, saved):
    folder = saved(build("llama"))
    code = (
        "import sys, deltapatch as dp;"
        f"m = dp.load_model({str(folder)!r}, device='cpu'); m.logits([1, 2, 3]); m.tokenizer;"
        "assert not [n for n in sys.modules if n.split('.')[0] in ('transformers', 'huggingface_hub')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_repr_and_name(build, saved):
    folder = saved(build("gptj"))
    model = load_model(folder, device="cpu")
    assert isinstance(model, Model)
    assert model.name == str(folder)
    assert repr(model) == f"Model({str(folder)!r}, gptj, 2 layers, d_model 32, float32 on cpu)"
