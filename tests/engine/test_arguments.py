"""What arguments may be: what is plainly meant is taken, all else is one sentence that names it."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_tiny import build, hf_model

import deltapatch
from deltapatch import DeltapatchError, Intervention, Patch, PromptPair
from deltapatch.analysis.faithfulness import plan
from deltapatch.analysis.significance import pooled_null
from deltapatch.analysis.statistics import pair_counts
from deltapatch.arguments import WORDS, at_least_bytes, at_most_bytes, in_bytes, n_bytes
from deltapatch.interventions.encode import encode_pairs
from deltapatch.interventions.pairs_file import read_pairs, write_pairs
from deltapatch.interventions.sites import HOOK_NAMES, KV_HEAD, SITES, WHOLE, find_site
from deltapatch.results.metrics import METRICS
from deltapatch.results.reading import load_effects
from deltapatch.tasks.facts import read_facts
from deltapatch.tasks.problem_file import read_problems
from deltapatch.tasks.registry import make_pairs

PAIR = PromptPair([1, 2, 3], [1, 4, 3], 5, 6, {"op": 1})
OTHER = PromptPair([9, 2, 3], [9, 7, 3], 8, 6, {"op": 1})
DOCS = Path(deltapatch.__file__).parent / "docs"


@pytest.fixture(scope="module")
def model():
    return deltapatch.from_transformers(hf_model("llama"))


def sweep(model, pairs=PAIR, sites="mlp_out", **options):
    return deltapatch.sweep(model, pairs, sites=sites, progress=False, precision="fp32", **options)


def run(model, interventions, pairs=PAIR, **options):
    return deltapatch.run(model, pairs, interventions, progress=False, precision="fp32", **options)


@pytest.fixture(scope="module")
def effects(model):
    return sweep(model)


# ------------------------------------------------------------------------------------------ what is taken


def fields(pair):
    return {name: getattr(pair, name) for name in ("clean", "corrupted", "clean_answer", "corrupted_answer")}


def test_pairs_in_every_form(model, effects, tmp_path):
    write_pairs(tmp_path / "p.jsonl", [PAIR])
    tensors = PromptPair(torch.tensor(PAIR.clean), np.array(PAIR.corrupted), torch.tensor(5), np.array([6]))
    forms = [[PAIR], (PAIR,), fields(PAIR), [fields(PAIR)], tmp_path / "p.jsonl", str(tmp_path / "p.jsonl")]
    for given in (*forms, iter([PAIR]), effects.pairs, tensors):
        found = sweep(model, given)
        np.testing.assert_array_equal(found.values("logit_diff"), effects.values("logit_diff"))


@pytest.mark.parametrize(
    ("options", "plain"),
    [
        ({"positions": 1}, {"positions": [1]}),
        ({"positions": np.int64(-1)}, {"positions": [-1]}),
        ({"positions": torch.tensor([0, 2])}, {"positions": [0, 2]}),
        ({"positions": ["all"]}, {"positions": "all"}),
        ({"layers": 1}, {"layers": [1]}),
        ({"layers": ["all"]}, {"layers": "all"}),
        ({"metrics": ["all"]}, {"metrics": "all"}),
        ({"memory_budget": "1.5GB"}, {"memory_budget": 1_500_000_000}),
        ({"memory_budget": 2e9}, {"memory_budget": 2_000_000_000}),
        ({"seed": np.int64(3), "readout": np.int64(2)}, {"seed": 3, "readout": 2}),
    ],
    ids=str,
)
def test_options_in_every_form(model, options, plain):
    found, known = sweep(model, **options), sweep(model, **plain)
    np.testing.assert_array_equal(found.values("logit_diff"), known.values("logit_diff"))
    assert found.positions() == known.positions()
    assert found.metrics == known.metrics
    for name in ("memory_budget", "seed", "readout"):
        if name in plain:
            assert found.meta[name] == known.meta[name] == plain[name]


def test_interventions_in_every_form(model, effects):
    one = Patch("mlp_out", np.int64(1), np.int64(-1))
    for given in ([Intervention(0, [one])], Intervention(0, one), iter([Intervention(np.int64(0), (one,))])):
        found = run(model, given).values("logit_diff")
        np.testing.assert_allclose(found, effects.values("logit_diff")[0, 1, [2]], rtol=1e-5)


# ----------------------------------------------------------------------------------------- what is refused

WRONG = [
    (
        {"positions": None},
        "positions must be 'all', 'last', 'together', or a list of numbers and labels, not None",
    ),
    ({"positions": 0.5}, "a position must be a whole number or a label, not 0.5"),
    ({"positions": [[1]]}, "a position must be a whole number or a label, not [1]"),
    ({"positions": ["all", "op"]}, "'all' stands alone"),
    ({"layers": None}, "layers must be 'all' or a list of numbers, not None"),
    ({"layers": np.float64(1)}, "a layer must be a whole number, not "),
    ({"layers": torch.tensor([True])}, "a layer must be a whole number, not "),
    ({"sites": None}, "sites must be names such as ['mlp_out', 'z'], not None"),
    ({"sites": [["mlp_out"]]}, "a site must be a name such as 'mlp_out', not ['mlp_out']"),
    ({"sites": 3}, "a site must be a name such as 'mlp_out', not 3"),
    ({"pairs": None}, "pairs must be prompt pairs or the path of a pairs file, not None"),
    ({"pairs": 3}, "pairs must be prompt pairs or the path of a pairs file, not 3"),
    (
        {"pairs": [PAIR, "pairs.jsonl"]},
        "pair 1 must be a PromptPair or a dictionary with its fields, not 'pairs",
    ),
    ({"pairs": "no.jsonl"}, "There is no pairs file no.jsonl"),
    ({"pairs": {"clean": [1]}}, "pair 0: the field 'corrupted' is missing"),
    ({"pairs": [fields(PAIR) | {"label": 1}]}, "pair 0: the field 'label' is unknown"),
    (
        {"pairs": PromptPair(None, [1], 2, 3)},
        "pair 0: clean must be text or token ids (whole numbers), not None",
    ),
    (
        {"pairs": PromptPair(b"ab", b"cd", 2, 3)},
        "pair 0: clean must be text or token ids (whole numbers), not b'",
    ),
    ({"pairs": PromptPair({1, 2}, {3}, 2, 3)}, "pair 0: clean must be text or token ids (whole numbers)"),
    ({"pairs": PromptPair([1], [2], None, 3)}, "pair 0: clean_answer must be text or token ids"),
    ({"pairs": PromptPair([1], [2], {1: 2}, 3)}, "pair 0: clean_answer must be text or token ids"),
    ({"pairs": PromptPair([1], [2], 3, 4, None)}, "pair 0: labels must be a dictionary, not None"),
    ({"pairs": PromptPair([1], [2], 3, 4, {}, [1])}, "pair 0: meta must be a dictionary, not [1]"),
    (
        {"pairs": PromptPair([1], [2], 3, 4, {"op": 0.0})},
        "label 'op' must be a position (a whole number), not 0.0",
    ),
    ({"pairs": PromptPair([1], [2], 3, 4, {3: 0})}, "pair 0: a label must be text, not 3"),
    ({"metrics": []}, "no metrics were given"),
    ({"metrics": ""}, "no metrics were given"),
    ({"metrics": None}, "metrics must be 'all' or names such as ['ie', 'recovered'], not None"),
    ({"metrics": lambda logits: logits}, "goes by its name, and '<lambda>' is none"),
    ({"metrics": ["ie", 3]}, "unknown metric 3: choose from ie"),
    ({"metrics": ["all", "ie"]}, "unknown metric 'all'"),
    ({"direction": None}, "direction must be a name, not None"),
    ({"precision": ["fp32"]}, "precision must be a name, not ['fp32']"),
    ({"source": ["zero"]}, "source must be a name, not ['zero']"),
    ({"backend": None}, "backend must be a name, not None"),
    ({"memory_budget": "much"}, "the memory budget 'much' is not an amount of memory such as 2GB or 512MiB"),
    ({"memory_budget": "0.2"}, "the memory budget '0.2' is not an amount of memory"),
    (
        {"memory_budget": 0.5},
        "the memory budget must be an amount of memory such as '2GB' or a number of bytes",
    ),
    ({"memory_budget": True}, "the memory budget must be an amount of memory"),
    ({"memory_budget": float("inf")}, "the memory budget must be an amount of memory"),
    ({"readout": 0.5}, "readout must be a whole number or a label, not 0.5"),
    ({"readout": None}, "readout must be a whole number or a label, not None"),
    ({"seed": -1}, "a seed must be a whole number, 0 or more, not -1"),
    ({"seed": "1"}, "a seed must be a whole number, 0 or more, not '1'"),
    ({"seed": None}, "a seed must be a whole number, 0 or more, not None"),
    ({"noise_scale": -1}, "noise_scale must be a number, 0 or more, not -1"),
    ({"noise_scale": "3"}, "noise_scale must be a number, 0 or more, not '3'"),
    ({"noise_scale": float("nan")}, "noise_scale must be a number, 0 or more, not nan"),
    ({"noise_sample": 1.5}, "the noise sample must be a whole number, 0 or more, not 1.5"),
    ({"out": 3}, "out must be a path, not 3"),
    ({"out": "x", "shard": "2/8"}, "shard must be two whole numbers such as (2, 8)"),
    ({"out": "x", "shard": (1, 2.0)}, "shard must be two whole numbers such as (2, 8)"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[m for _, m in WRONG])
def test_a_sweep_names_the_argument(model, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"pairs": PAIR, "sites": "mlp_out", "progress": False} | options
    with pytest.raises(DeltapatchError) as caught:
        deltapatch.sweep(model, **given)
    assert message in str(caught.value)
    assert not list(tmp_path.iterdir())
    shared = {name: value for name, value in given.items() if name not in ("sites", "positions", "layers")}
    if not {"sites", "positions", "layers", "out"} & options.keys():
        with pytest.raises(DeltapatchError) as caught:
            deltapatch.run(model, interventions=Intervention(0, Patch("mlp_out", 0, 0)), **shared)
        assert message in str(caught.value)


@pytest.mark.parametrize("given", ["builtin:gpt-neox-arithmetic", None, hf_model("llama")], ids=type)
def test_what_is_no_model(given):
    with pytest.raises(DeltapatchError, match="model must be what load_model or from_transformers returns"):
        sweep(given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "there are no interventions"),
        (None, "interventions must be a list of Intervention, not None"),
        (Patch("mlp_out", 0, 0), "intervention 0 must be Intervention(pair, patches), not Patch"),
        ([(0, [Patch("mlp_out", 0, 0)])], "intervention 0 must be Intervention(pair, patches)"),
        (
            Intervention(0.0, [Patch("mlp_out", 0, 0)]),
            "intervention 0: pair must be the number of a pair, not 0.0",
        ),
        (
            Intervention(True, [Patch("mlp_out", 0, 0)]),
            "intervention 0: pair must be the number of a pair, not T",
        ),
        (Intervention(0, None), "intervention 0: patches must be a list of Patch, not None"),
        (Intervention(0, "mlp_out"), "intervention 0: patches must be a list of Patch, not of 'mlp_out'"),
    ],
    ids=str,
)
def test_what_is_no_intervention(model, given, message):
    with pytest.raises(DeltapatchError) as caught:
        run(model, given)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        (Patch("mlp_out", 0.5, 2), "a layer must be a whole number, not 0.5"),
        (Patch("mlp_out", 1.0, 2), "a layer must be a whole number, not 1.0"),
        (Patch("mlp_out", True, 2), "a layer must be a whole number, not True"),
        (Patch("mlp_out", None, 2), "a layer must be a whole number, not None"),
        (Patch("mlp_out", 1, 1.0), "a position must be a whole number or a label, not 1.0"),
        (Patch("mlp_out", 1, None), "a position must be a whole number or a label, not None"),
        (Patch("mlp_out", 1, [1]), "a position must be a whole number or a label, not [1]"),
        (Patch("mlp_post", 1, 1, 1.5), "site mlp_post needs an index from 0 to 23, not 1.5"),
        (Patch("mlp_post", 1, 1, True), "site mlp_post needs an index from 0 to 23, not True"),
        (Patch(["mlp_out"], 1, 1), "a site must be a name such as 'mlp_out', not ['mlp_out']"),
        (Patch("blocks.1.attn.hook_z", 0, 1, 1), "is in layer 1, but layer 0 is given beside it"),
    ],
    ids=str,
)
def test_patches_are_checked_as_axes_are(model, patch, message):
    """Also where an equal one was found before: 1.0 and True are equal to 1."""
    good = [Patch("mlp_out", 1, 2), Patch("mlp_out", 1, 1), Patch("mlp_post", 1, 1, 1)]
    with pytest.raises(DeltapatchError) as caught:
        run(model, [Intervention(0, good), Intervention(0, [patch])])
    assert message in str(caught.value)
    assert str(caught.value).startswith(("intervention 1: ", "a site must be"))


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda e: e.values(None), "unknown metric None"),
        (lambda e: e.values(["ie"]), "unknown metric ['ie']"),
        (lambda e: e.values(len), "unknown metric 'len'"),
        (lambda e: e.values("ie", ["mlp_out"]), "unknown site ['mlp_out']"),
        (lambda e: e.values("ie", 3), "unknown site 3"),
        (lambda e: e.columns({"ie": 1}), "metrics must be names such as ['ie', 'recovered'], not {'ie': 1}"),
        (lambda e: e.columns("ie", 3), "unknown site 3"),
        (lambda e: e.save(None), "a run folder must be a path, not None"),
        (lambda e: load_effects(3), "a run folder must be a path, not 3"),
        (lambda e: read_pairs(3), "a pairs file must be a path, not 3"),
        (lambda e: write_pairs(None, []), "a pairs file must be a path, not None"),
        (lambda e: deltapatch.load_model(None), "a model or adapter must be a path, not None"),
        (lambda e: make_pairs("arithmetic", None, per_template=1.5), "per_template must be a whole number"),
        (lambda e: make_pairs("arithmetic", None, shots=-1), "shots must be 0 or more, not -1"),
        (lambda e: make_pairs("arithmetic", None, max_number="9"), "max_number must be a whole number"),
    ],
)
def test_effects_name_the_argument(effects, ask, message):
    with pytest.raises(DeltapatchError) as caught:
        ask(effects)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "ask",
    [
        lambda e: make_pairs("arithmetic", None, seed=-1),
        lambda e: pair_counts(3, 10, -1),
        lambda e: pooled_null(np.ones((40, 3)), draws=10, seed=-1),
        lambda e: plan([Patch("mlp_out", 0, 0)], 1, seed=-1),
    ],
)
def test_negative_seeds(effects, ask):
    with pytest.raises(DeltapatchError, match="a seed must be a whole number, 0 or more, not -1"):
        ask(effects)


# ------------------------------------------------------------------------------------- words of the tool


def labelled(name, at):
    return PromptPair([1, 2, 3, 4], [1, 9, 3, 4], 5, 6, {"op": 1, name: at})


@pytest.mark.parametrize("word", WORDS)
def test_a_label_cannot_overrule_a_word(word):
    for at in (1, 2):
        with pytest.raises(
            DeltapatchError, match=f"p: label '{word}' is at position {at}, but {word} stands"
        ):
            encode_pairs([labelled(word, at)], None, 10, ["p"])


@pytest.mark.parametrize(("name", "at"), [("last", -1), ("last", 3), ("first", 0), ("2", 2), ("-1", 3)])
def test_a_label_may_say_what_the_word_says(name, at):
    (pair,) = encode_pairs([labelled(name, at)], None, 10)
    assert pair.labels[name] == at % 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("3", "label '3' is at position 2, but 3 stands for position 3 of this prompt"),
        ("-1", "label '-1' is at position 2, but -1 stands for position 3 of this prompt"),
        ("", "label '' cannot be told from a list of positions"),
        (" op", "cannot be told from a list of positions"),
        ("op,last", "cannot be told from a list of positions"),
    ],
)
def test_labels_that_positions_cannot_name(name, message):
    with pytest.raises(DeltapatchError, match=re.escape(message)):
        encode_pairs([labelled(name, 2)], None, 10)


def test_last_is_the_last_position_in_every_form(model):
    """A label of that name elsewhere decided where effects are read."""
    plain, named = (PromptPair([1, 2, 3, 4], [1, 9, 3, 4], 5, 6, l) for l in ({}, {"last": -1}))
    for pair in (plain, named):
        word, listed, number = (sweep(model, pair, positions=p) for p in ("last", ["last"], [-1]))
        for other in (listed, number):
            np.testing.assert_array_equal(word.values("logit_diff"), other.values("logit_diff"))
    with pytest.raises(DeltapatchError, match="label 'last' is at position 1"):
        sweep(model, PromptPair([1, 2, 3, 4], [1, 9, 3, 4], 5, 6, {"last": 1}))


def test_a_run_folder_whose_labels_overruled_a_word(model, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "deltapatch.interventions.encode.check_label", lambda *args: None
    )  # as they once were
    sweep(model, labelled("last", 2), out=tmp_path / "run")
    with pytest.raises(DeltapatchError, match="label 'last' is at position 2"):
        load_effects(tmp_path / "run")


def test_a_relation_is_no_word_of_the_tool(tmp_path):
    """In the study's tables and measures `all` are all pairs, and a group of that name took their place."""
    path = tmp_path / "facts.jsonl"
    path.write_text('{"subject": "Paris", "relation": "all", "object": "France"}\n')
    with pytest.raises(DeltapatchError, match=r"facts.jsonl: a relation is called 'all'"):
        read_facts(path, None)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{last} plus {b}",
            "p.jsonl, line 1: the hole {last} would be a label, and last is a word of the tool",
        ),
        ("{b} plus {b_first}", "line 1: the hole {b_first} would be a label, and b_first is what the first"),
    ],
)
def test_holes_of_templates_are_no_words_of_the_tool(tmp_path, template, message):
    path = tmp_path / "p.jsonl"
    path.write_text(f'{{"template": "{template}", "answer": "b + 1"}}\n')
    with pytest.raises(DeltapatchError) as caught:
        read_problems(path)
    assert message in str(caught.value)


# ------------------------------------------------------------------------------------------ sites, sizes


def test_the_documentation_lists_every_name_of_every_site():
    rows = re.findall(r"^\| `([\w.]+)` \| (.*?) \| (.*?) \|", (DOCS / "sites.md").read_text(), re.MULTILINE)
    found = {site: set(re.findall(r"`([^`]+)`", names)) for site, _, names in rows}
    kinds = {site: kind for site, kind, _ in rows}
    want = {site: set() for site in SITES}
    for hook, site in HOOK_NAMES.items():
        want[site] |= {hook, hook.rpartition(".")[2], f"blocks.3.{hook}"}
    assert found == want
    assert {site: kind.split(":")[0] for site, kind in kinds.items()} == {
        site: {WHOLE: "none", KV_HEAD: "key-value head"}.get(s.index, s.index.counts)
        for site, s in SITES.items()
    }


@pytest.mark.parametrize("hook", HOOK_NAMES)
def test_hook_names_bare_in_a_block_and_in_full(hook):
    site, bare = SITES[HOOK_NAMES[hook]], hook.rpartition(".")[2]
    assert find_site(hook) == find_site(bare) == (site, None)
    assert find_site(f"blocks.12.{hook}") == find_site(f"blocks.12.{bare}") == (site, 12)


@pytest.mark.parametrize("name", ["attn.hook_post", "mlp.hook_z", "blocks.1.z", "blocks.x.hook_z"])
def test_names_of_no_site(name):
    with pytest.raises(DeltapatchError, match=f"unknown site '{name}'"):
        find_site(name)


@pytest.mark.parametrize("name", ["scores", "hook_attn_scores", "blocks.1.attn.hook_attn_scores"])
def test_scores_are_told_to_be_patched_as_pattern(name):
    with pytest.raises(DeltapatchError, match=f"site '{name}' is none of its own: use pattern"):
        find_site(name)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (1, "1 B"),
        (999, "999 B"),
        (999.6, "1 kB"),
        (300_000, "300 kB"),
        (999_600, "1 MB"),
        (3_834_880, "3.83 MB"),
        (2 * 10**9, "2 GB"),
        (5 * 10**15, "5 PB"),
    ],
)
def test_sizes_for_people(number, text):
    assert in_bytes(number) == text


def test_sizes_that_are_compared():
    """What is not enough is never told as what would be."""
    assert (at_most_bytes(1_137_999_999), at_least_bytes(1_137_999_999)) == ("1.137 GB", "1.138 GB")
    for number in (1, 9, 999, 1000, 1001, 12_345, 999_999, 1_000_000, 50_812_345, 10**12 + 1):
        assert n_bytes(at_most_bytes(number), "it") <= number <= n_bytes(at_least_bytes(number), "it")
        assert n_bytes(at_least_bytes(number), "it") <= number * 1.002


@pytest.mark.parametrize(
    ("text", "number"),
    [("2GB", 2 * 10**9), ("512MiB", 512 * 2**20), ("1.5 kb", 1500), ("7", 7), ("1TiB", 2**40), (None, None)],
)
def test_amounts_of_memory(text, number):
    assert n_bytes(text, "it") == number


def test_a_small_budget_is_called_what_it_is(model):
    with pytest.raises(DeltapatchError, match=r"a memory budget of 300 kB is too small: .* at least \d.*B;"):
        sweep(model, memory_budget="300KB")


# ------------------------------------------------------------------------------------------------ devices


@pytest.mark.parametrize("device", ["mps", "xpu", "meta", "hpu", "cpu:3", torch.device("meta"), "cuda:256"])
def test_devices_that_nothing_is_computed_on(device):
    with pytest.raises(DeltapatchError, match=f"device '{device}' is not one that deltapatch computes on"):
        deltapatch.load_model("builtin:gpt-neox-arithmetic", device=device)


@pytest.mark.parametrize(("device", "message"), [("cuda:7", "sees . GPUs"), (None, "unknown device None")])
def test_devices_that_are_not_here(device, message):
    with pytest.raises(DeltapatchError, match=message):
        deltapatch.load_model("builtin:gpt-neox-arithmetic", device=device)


def test_a_model_of_transformers_without_weights():
    with pytest.raises(DeltapatchError, match="device 'meta' is not one that deltapatch computes on"):
        deltapatch.from_transformers(build("llama").to("meta"))


def test_every_metric_is_asked_for_by_all(effects):
    assert set(effects.metrics) == set(METRICS)
