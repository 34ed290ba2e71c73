"""Files made by somebody who means harm: numbers too large to loop over, names that lead elsewhere, code."""

import json
import shutil
from pathlib import Path

import pytest
from fuzz_hunter import joined, split

MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"


def refused(hunter, target, folder, *said):
    found = hunter.ask(target, folder)
    assert found["outcome"] == "refused", found
    for piece in said:
        assert piece in found["text"]


def changed(seeds, tmp_path, name="gpt_neox", file="config.json", **changes):
    folder = Path(shutil.copytree(seeds(name), tmp_path / "folder"))
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("num_hidden_layers", 10**9, "lacks tensor 'gpt_neox.layers.2."),
        ("num_hidden_layers", 2**31 - 1, "lacks tensor"),
        ("num_hidden_layers", 10**30, "of at most 2,147,483,647"),
        ("hidden_size", 2**30, "[61, 16], but config.json asks for [61, 1073741824]"),
        ("hidden_size", 0, "'hidden_size' must be a positive integer, not 0"),
        ("hidden_size", -16, "must be a positive integer, not -16"),
        ("hidden_size", 16.0, "must be a positive integer, not 16.0"),
        ("vocab_size", 2**31 - 1, "asks for [2147483647, 16]"),
        ("intermediate_size", "24", "must be a positive integer, not '24'"),
        ("layer_norm_eps", float("nan"), "must be a positive number, not nan"),
        ("layer_norm_eps", 10**400, "must be a positive number, not 1000"),
        ("rotary_pct", 1e29, "rotary coordinates of 8 are not supported"),
        ("hidden_act", "x" * 10**6, "is not supported"),
        ("max_position_embeddings", True, "must be a positive integer, not True"),
    ],
)
def test_absurd_numbers_in_a_config(hunter, seeds, tmp_path, field, value, said):
    changes = {field: value, "rope_parameters": None} if field == "rotary_pct" else {field: value}
    refused(hunter, "model", changed(seeds, tmp_path, **changes), said)


def test_an_absurd_config_costs_an_adapter_nothing(hunter, seeds, tmp_path):
    folder = changed(seeds, tmp_path, "adapter", "model/config.json", num_hidden_layers=10**9)
    refused(hunter, "adapter", folder, "lacks tensor")


def header(text, data=b"", length=None):
    def make(content):
        return joined(text, data, length)

    return make


def claim(**changes):
    """The first tensor with another entry in the header."""

    def make(content):
        entries, data = split(content)
        name = next(n for n in entries if n != "__metadata__")
        return joined(json.dumps(entries | {name: entries[name] | changes}), data)

    return make


def crowd(content):
    """Tensors of nothing, as many as a header holds that is not too long."""
    entries, data = split(content)
    nothing = {"dtype": "F32", "shape": [0], "data_offsets": [len(data), len(data)]}
    more = "".join(f',"{i}":{json.dumps(nothing, separators=(",", ":"))}' for i in range(220_000))
    return joined(json.dumps(entries)[:-1] + more + "}", data)


@pytest.mark.parametrize("target", ["model", "streamed"])
@pytest.mark.parametrize(
    "make",
    [
        lambda content: content[:8],
        lambda content: b"",
        header("{}", length=2**64 - 1),
        header("{}", length=2**40),
        header("{" + " " * (17 << 20) + "}"),
        header('{"a":' * 50_000),
        claim(shape=[0, 2**62], data_offsets=[0, 0]),
        claim(shape=[2**33, 2**33]),
        claim(shape=[2**62]),
        claim(shape=[-1, 16]),
        claim(data_offsets=[0, 2**63]),
        claim(data_offsets=[8, 0]),
        claim(data_offsets=[-8, 0]),
        claim(dtype="F8_E4M3"),
        claim(dtype="nothing"),
        lambda content: content + b"more",
        crowd,
    ],
    ids=range(17),
)
def test_headers_that_lie(hunter, seeds, tmp_path, make, target):
    folder = changed(seeds, tmp_path)
    (folder / MODEL).write_bytes(make((folder / MODEL).read_bytes()))
    refused(hunter, target, folder, str(folder))


@pytest.mark.parametrize(
    "name", ["../stolen.safetensors", "/etc/passwd", "..", "", "a/b", "nothing", "\x00", "x" * 5000, 5]
)
def test_an_index_does_not_lead_out_of_its_folder(hunter, seeds, tmp_path, name):
    folder = changed(seeds, tmp_path, "sharded", INDEX)
    index = json.loads((folder / INDEX).read_text())
    shutil.copy(min(folder.glob("*.safetensors")), tmp_path / "stolen.safetensors")
    index["weight_map"][next(iter(index["weight_map"]))] = name
    (folder / INDEX).write_text(json.dumps(index))
    refused(hunter, "model", folder, str(folder))


def test_an_index_that_mixes_files_up(hunter, seeds, tmp_path):
    folder = changed(seeds, tmp_path, "sharded", INDEX)
    index = json.loads((folder / INDEX).read_text())
    names = sorted(index["weight_map"])
    index["weight_map"][names[0]] = next(
        f for f in index["weight_map"].values() if f != index["weight_map"][names[0]]
    )
    (folder / INDEX).write_text(json.dumps(index))
    refused(hunter, "model", folder, f"lacks tensor '{names[0]}', which the index promises")


@pytest.mark.parametrize(
    "key", ["(a|a)*b", "(.+)+x", ".*.*.*.*.*x", "(?=x)", r"(x)\1", "(", "a{99999999999}", "x" * 300]
)
def test_patterns_that_never_end(hunter, seeds, tmp_path, key):
    folder = changed(seeds, tmp_path, "adapter", "adapter/adapter_config.json", rank_pattern={key: 2})
    refused(hunter, "adapter", folder, "'rank_pattern' has a key")


@pytest.mark.parametrize(
    "key", ["dense_h_to_4h", "mlp.dense_h_to_4h", r".*\.mlp\..*", "^gpt_neox.*(dense_h_to_4h|other)"]
)
def test_patterns_that_are_used(hunter, seeds, tmp_path, key):
    changes = {"r": 5, "rank_pattern": {key: 2}}
    folder = changed(seeds, tmp_path, "adapter", "adapter/adapter_config.json", **changes)
    assert hunter.ask("adapter", folder)["outcome"] == "ok"


def test_a_tokenizer_runs_no_code(hunter, seeds, tmp_path):
    """What a checkpoint names in `auto_map` would be imported from its folder if it were trusted."""
    mark = tmp_path / "ran"
    classes = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    folder = changed(seeds, tmp_path, "with_tokenizer", "tokenizer_config.json", **classes)
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n")
    assert hunter.ask("tokenizer", folder)["outcome"] in ("ok", "refused")
    assert not mark.exists()


LINE = {"clean": [1], "corrupted": [1], "clean_answer": 1, "corrupted_answer": 2}


@pytest.mark.parametrize(
    "line",
    [
        '{"clean": ' + "[" * 200_000,
        json.dumps(LINE).replace("[1]", "[" + "9" * 5_000 + "]", 1),
        json.dumps(LINE | {"clean_answer": 2**70}),
        json.dumps(LINE | {"labels": {"here": 2**70}}),
        json.dumps(LINE | {"clean": "\ud800", "corrupted": "\ud800"}),
        json.dumps(LINE | {"clean": 1e300}),
        json.dumps(LINE | {"x" * 10**6: 1}),
        "\x00" * 1000,
        "\ufeff" * 3 + json.dumps(LINE),
        "[]",
        "NaN",
    ],
    ids=range(11),
)
def test_pairs_that_lie(hunter, seeds, tmp_path, line):
    folder = Path(shutil.copytree(seeds("pairs"), tmp_path / "folder"))
    (folder / "pairs.jsonl").write_text(line + "\n", encoding="utf-8")
    refused(hunter, "pairs", folder)


def test_odd_text_is_kept(hunter, seeds, tmp_path):
    """NUL and the like are text as any other."""
    folder = Path(shutil.copytree(seeds("pairs"), tmp_path / "folder"))
    odd = LINE | {"meta": {"a": "\x00\ud800\u2028", "deep": [[[[]]]], "big": 10**300}}
    (folder / "pairs.jsonl").write_text(json.dumps(odd) + "\n")
    assert hunter.ask("pairs", folder)["outcome"] == "ok"
