"""The commands on a tiny model: what they print where, and what they leave on disk."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import deltapatch
from deltapatch.cli import options
from deltapatch.cli.main import cli


def test_every_help_has_an_example(command):
    for name in ["", *cli.commands]:
        result = command(*([name] if name else []), "--help")
        assert result.code == 0
        assert f"deltapatch {name}".strip() in result.out.split("Examples:")[1]
        assert result.err == ""
    assert set(cli.commands) == {
        "demo",
        "pairs",
        "sweep",
        "edges",
        "circuit",
        "features",
        "directions",
        "interactions",
        "shapley",
        "smallest-set",
        "effects",
        "plot",
        "explore",
        "info",
        "convert",
        "bench",
        "merge",
        "reproduce",
    }


def test_version(command):
    assert command("--version").out == f"deltapatch, version {deltapatch.__version__}\n"


def test_from_pairs_to_plots(command, tiny, tmp_path):
    pairs, run = tmp_path / "pairs.jsonl", tmp_path / "run"
    made = command(
        "pairs", "--model", tiny, "--per-template", 1, "--shots", 0, "--seed", 3, "--out", pairs, "--json"
    )
    assert made.code == 0, made.err
    facts = json.loads(made.out)
    assert facts["pairs"] == len(pairs.read_text().splitlines()) > 10

    swept = command(
        "sweep", "--model", tiny, "--pairs", pairs, "--out", run, "--sites", "mlp_out,z", "--json"
    )
    assert swept.code == 0, swept.err
    facts = json.loads(swept.out)
    assert facts["rows"] == facts["run"]["rows"]
    assert facts["sites"]["z"]["index"] == 2
    assert "interventions in" in swept.err
    recomputed = facts["run"]["noise_floor"]["recomputed"]
    assert f"precision fp32: {recomputed} effects computed again in float64 differ by" in swept.err

    effects = deltapatch.load_effects(run)
    shown = command("effects", run, "--site", "mlp_out", "--metric", "logit_diff", "--format", "csv")
    assert shown.code == 0
    rows = list(csv.DictReader(io.StringIO(shown.out)))
    assert list(rows[0]) == ["pair", "site", "layer", "position", "index", "logit_diff"]
    values = effects.values("logit_diff", "mlp_out")
    for row in rows[::17]:
        where = int(row["pair"]), int(row["layer"]), int(row["position"])
        assert float(row["logit_diff"]) == values[where]
    assert len(rows) == np.isfinite(values).sum()

    drawn = command("plot", run)
    assert drawn.code == 0
    assert all(os.path.exists(path) for path in drawn.out.split())
    assert str(run / "plots" / "heatmap_recovered.png") in drawn.out.split()


def test_the_same_seed_gives_the_same_file(command, tiny, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        command("pairs", "--model", tiny, "--per-template", 1, "--seed", seed, "--out", tmp_path / name, "-q")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()


def test_a_sweep_with_every_option(command, tiny, write_pairs, text_pair, tmp_path):
    result = command(
        *("sweep", "--model", tiny, "--pairs", write_pairs(text_pair), "--out", tmp_path / "run"),
        *("--sites", "mlp_post,blocks.1.hook_attn_out", "--positions", "op1,-1,2", "--layers", "0-1"),
        *("--direction", "noise", "--source", "zero", "--precision", "fp64", "--backend", "reference"),
        *("--metrics", "logit_diff", "--memory-budget", "0.3GB", "--device", "cpu", "--dtype", "float32"),
        *("--seed", "4", "--quiet"),
    )
    assert result.code == 0, result.err
    assert result.err == ""
    assert result.out == f"{tmp_path / 'run'}\n"
    effects = deltapatch.load_effects(tmp_path / "run")
    assert effects.positions("mlp_post") == ["op1", -1, 2]
    assert effects.layers_of("attn_out").tolist() == [1]
    assert effects.direction == "noise"
    assert effects.metrics == ["logit_diff", "recovered"]
    assert effects.meta["memory_budget"] == 300_000_000
    assert effects.meta["source"] == "zero"


def test_a_dry_run_says_the_cost_and_writes_nothing(command, tiny, write_pairs, ids_pair, tmp_path):
    pairs = write_pairs(ids_pair, ids_pair)
    args = ("sweep", "--model", tiny, "--pairs", pairs, "--sites", "mlp_post,z", "--dry-run")
    plan = json.loads(command(*args, "--json", "--out", tmp_path / "run").out)
    assert plan["rows"] == 2 * 2 * 4 * (64 // 2 + 2)
    assert plan["necessary_flops"] > 0
    assert plan["passes"] == 1
    assert plan["memory_bytes"]["pass"] < plan["memory_budget"]
    assert 0 < plan["predicted_seconds"] < 60
    assert plan["predicted_seconds"] == pytest.approx(sum(plan["seconds_by_part"].values()), abs=0.1)
    said = command(*args).out
    assert "544 on 2 pairs, in 1 pass, fp32" in said
    assert "on this machine" in said
    assert "nothing was run" in said
    assert not (tmp_path / "run").exists()


def test_a_streamed_sweep(command, tiny, write_pairs, ids_pair, tmp_path, monkeypatch):
    args = ("sweep", "--model", tiny, "--pairs", write_pairs(ids_pair), "--sites", "z")
    kept = command(*args, "--out", tmp_path / "kept", "--json")
    streamed = command(*args, "--out", tmp_path / "streamed", "--json", "--stream")
    assert "streamed)" in streamed.err
    assert "streamed)" not in kept.err
    assert json.loads(streamed.out)["run"]["stream"]
    values = [deltapatch.load_effects(tmp_path / name).values("ie") for name in ("kept", "streamed")]
    assert np.array_equal(*values)
    plan = json.loads(command(*args, "--dry-run", "--json", "--stream").out)
    assert plan["stream"]
    assert "waiting for the file" in plan["seconds_by_part"]
    assert "read from the file in every pass" in command(*args, "--dry-run", "--stream").out

    monkeypatch.setattr("deltapatch.models.model_weights.fits", lambda n_bytes, device: False)
    by_itself = command(*args, "--out", tmp_path / "by itself")
    assert by_itself.code == 0
    assert "do not fit into the memory: every pass reads them from the file" in by_itself.err


@pytest.mark.parametrize("format_", ["table", "csv", "json", "parquet"])
def test_every_format_to_stdout_and_to_a_file(command, make_effects, tmp_path, format_):
    make_effects().save(tmp_path / "run")
    args = ("effects", tmp_path / "run", "--site", "z", "--top", "3", "--format", format_)
    shown = command(*args)
    assert shown.code == 0
    assert shown.err == ""
    written = command(*args, "--out", tmp_path / "file")
    assert written.out == ""
    assert (tmp_path / "file").read_bytes() == shown.data


def test_averages_and_the_top(command, make_effects, tmp_path):
    effects = make_effects()
    effects.save(tmp_path / "run")
    args = ("effects", tmp_path / "run", "--site", "mlp_out", "--format", "json", "--by", "layer,class")
    rows = json.loads(command(*args, "--top", 2).out)["rows"]
    assert [set(row) for row in rows] == [{"site", "layer", "class", "recovered", "stderr", "pairs"}] * 2
    assert abs(rows[0]["recovered"]) >= abs(rows[1]["recovered"])
    every = command("effects", tmp_path / "run", "--site", "mlp_out", "--by", "none", "--format", "csv").out
    assert len(every.splitlines()) == 1 + 5 * 3 * 8


def test_a_long_table_is_cut_and_says_so(command, make_effects, tmp_path):
    make_effects(n_layers=20).save(tmp_path / "run")
    result = command("effects", tmp_path / "run", "--site", "mlp_post")
    assert len(result.out.splitlines()) == 42
    assert "The top 40 of 320 rows" in result.err
    assert (
        len(command("effects", tmp_path / "run", "--site", "mlp_post", "--top", 400).out.splitlines()) == 322
    )


def read(result):
    assert result.code == 0, result.err
    return list(csv.DictReader(io.StringIO(result.out)))


@pytest.mark.parametrize("by", [(), ("--by", "layer,class"), ("--by", "none"), ("--by", "neuron")])
def test_the_top_rows_are_the_same_in_every_format(command, make_effects, tmp_path, by):
    make_effects().save(tmp_path / "run")
    site = "mlp_post" if "neuron" in by else "mlp_out"
    args = ("effects", tmp_path / "run", "--site", site, "--top", 3, "--metric", "kl", *by, "--format")
    rows = read(command(*args, "csv"))
    assert len(rows) == 3
    found = json.loads(command(*args, "json").out)["rows"]
    assert [{k: "" if v is None else str(v) for k, v in row.items()} for row in found] == rows
    drawn = [line.split() for line in command(*args, "table").out.splitlines()[2:]]
    assert [[f"{float(row['kl']):.4g}"] for row in rows] == [
        [word for word in line if word == f"{float(row['kl']):.4g}"][:1]
        for line, row in zip(drawn, rows, strict=True)
    ]


def test_several_metrics_with_commas_or_one_by_one(command, make_effects, tmp_path):
    effects = make_effects()
    effects.save(tmp_path / "run")
    args = ("effects", tmp_path / "run", "--site", "mlp_out", "--format", "csv")
    rows = read(command(*args, "--metric", "ie,recovered"))
    assert list(rows[0]) == ["pair", "site", "layer", "position", "index", "ie", "recovered"]
    assert rows == read(command(*args, "--metric", "ie", "--metric", "recovered"))
    values = effects.values("recovered", "mlp_out")
    for row in rows[::11]:
        assert float(row["recovered"]) == values[int(row["pair"]), int(row["layer"]), int(row["position"])]
    assert list(read(command(*args))[0])[-1] == "recovered"
    (tested, *_) = read(command(*args, "--metric", "kl,ie", "--interval", "--by", "layer"))
    assert [name for name in tested if name.startswith("ie")] == [
        *("ie", "ie_median", "ie_stderr", "ie_low", "ie_high", "ie_p", "ie_q")
    ]
    (both, *_) = read(command(*args, "--by", "layer", "--mean-of-ratios"))
    assert {"recovered", "mean_of_ratios"} <= set(both)


def test_by_head_takes_the_sites_that_have_heads(command, make_effects, tmp_path):
    make_effects().save(tmp_path / "run")
    for by, site, n in (("head", "z", 12), ("layer,neuron", "mlp_post", 48)):
        rows = read(command("effects", tmp_path / "run", "--by", by, "--format", "csv"))
        assert {row["site"] for row in rows} == {site}
        assert len({(row["layer"], row[by.split(",")[-1]]) for row in rows}) == len(rows) == n
    both = read(command("effects", tmp_path / "run", "--by", "layer,index", "--format", "csv"))
    assert {row["site"] for row in both} == {"z", "mlp_post"}
    refused = command("effects", tmp_path / "run", "--by", "head", "--site", "mlp_post")
    assert refused.code == 2
    assert "its index counts neurons: group by neuron" in refused.err


def test_a_run_without_logit_differences_shows_what_it_has(command, make_effects, tmp_path):
    effects = make_effects()
    effects.sites = {"z": effects.sites["z"]}
    del effects.sites["z"].measured["logit_diff"]
    effects.save(tmp_path / "run")
    (row, *_) = read(command("effects", tmp_path / "run", "--site", "z", "--format", "csv"))
    assert "ie" in row
    assert "heads_z_ie.png" in command("plot", tmp_path / "run").out


def test_too_few_pairs_for_any_discovery_are_said(command, make_effects, tmp_path):
    for n, said in ((5, True), (6, False)):
        make_effects(lengths=(8,) * n).save(tmp_path / str(n))
        args = ("effects", tmp_path / str(n), "--site", "mlp_out", "--fdr", 0.05)
        found = command(*args)
        assert found.code == 0
        assert ("with 5 pairs no p-value can be below 0.062" in found.err) == said
        assert ("take at least 6 pairs" in found.err) == said
    make_effects(lengths=(8,) * 13).save(tmp_path / "many")
    args = ("effects", tmp_path / "many", "--site", "mlp_out", "--fdr", 0.05, "--draws")
    assert "with 13 pairs and 10 draws no p-value can be below 0.091" in command(*args, 10).err
    assert "Warning" not in command(*args, 19).err


def test_a_model_that_answers_nothing_right_is_said_beside_its_effects(command, make_effects, tmp_path):
    effects = make_effects()
    effects.sites = {"z": effects.sites["z"]}
    effects.save(tmp_path / "right")
    effects.reference.says[:] = False
    effects.save(tmp_path / "wrong")
    for args in (("effects", "--site", "z"), ("plot",)):
        for name, said in (("right", False), ("wrong", True)):
            result = command(args[0], tmp_path / name, *args[1:])
            assert ("Warning: the model answers none of these 10 prompts right" in result.err) == said


def test_help_says_what_each_metric_is(command):
    from deltapatch.results.metrics import definitions

    for name in ("effects", "plot"):
        said = " ".join(command(name, "--help").out.split())
        for metric, equation, values, *_ in definitions()[1:]:
            assert " ".join(f"{metric} {equation} values {values};".split()) in said
    assert "deltapatch effects --help" in " ".join(command("sweep", "--help").out.split())


def test_warnings_are_one_line_on_stderr(command, make_effects, tmp_path):
    effects = make_effects()
    effects.reference.logit[0] = 1.0
    effects.save(tmp_path / "run")
    args = ("effects", tmp_path / "run", "--site", "mlp_out", "--metric", "recovered", "--format", "json")
    result = command(*args)
    assert result.code == 0
    assert result.err.splitlines() == [
        "Warning: recovered is undefined (NaN) for 1 pair(s): clean and corrupted runs have the same logit "
        "difference"
    ]
    json.loads(result.out)


def test_info(command, tiny):
    facts = json.loads(command("info", tiny, "--json", "--length", 5).out)
    assert facts["spec"]["n_layers"] == 2
    neurons = next(s for s in facts["sweeps"] if s["site"] == "mlp_post" and s["positions"] == "last")
    assert neurons["rows"] == 64
    assert neurons["passes"] == 1
    assert 0 < neurons["predicted_seconds"] < 60
    assert neurons["memory_bytes"]["pass"] < neurons["memory_budget"]
    assert not facts["stream"]
    text = command("info", tiny).out
    assert "gpt_neox" in text
    assert "hidden neurons, last position" in text
    assert "time here" in text
    streamed = json.loads(command("info", tiny, "--json", "--stream", "--untimed", "--n-pairs", 3).out)
    assert streamed["stream"]
    assert streamed["memory_bytes"]["weights"] == deltapatch.load_model(tiny).n_bytes
    assert streamed["sweeps"][0]["pairs"] == 3
    assert "predicted_seconds" not in streamed["sweeps"][0]
    (tiny / "model.safetensors").unlink()  # the config is enough
    for option in ((), ("--stream",), ("--untimed",)):
        assert command("info", tiny, *option).code == 0


def test_a_time_for_people():
    said = [options.in_seconds(s) for s in (0.042, 3.21, 42.4, 100, 4000, 20_000, 200_000)]
    assert said == ["0.042 s", "3.2 s", "42 s", "1.7 min", "67 min", "5.6 h", "2.3 d"]


def test_convert(command, tiny, tmp_path):
    import torch
    from safetensors.torch import load_file

    torch.save(load_file(tiny / "model.safetensors"), tiny / "pytorch_model.bin")
    (tiny / "model.safetensors").unlink()
    result = command("convert", tiny, "--out", tmp_path / "new")
    assert (result.code, result.out) == (0, f"{tmp_path / 'new'}\n")
    assert deltapatch.load_model(tmp_path / "new").spec.n_layers == 2


def test_lists_in_options():
    assert options.read_layers("0-2, 9") == [0, 1, 2, 9]
    assert options.read_layers("all") == "all"
    assert options.read_positions("3,-1,op1,last") == [3, -1, "op1", "last"]
    assert options.read_positions("last") == "last"
    assert options.read_positions("1" * 5000) == ["1" * 5000]  # no number that Python would read


SHOWN = """\
{file}, line 1: 10 tokens
position         clean    corrupted  labels
       0    -10  'Q'
       1     -9  ':'
       2     -8  ' What'
       3     -7  ' is'
       4     -6  ' 3'     ' 5'       op1
       5     -5  ' plus'
       6     -4  ' 4'                op2, a_long_name_of_a_label,
                                     another_long_name_of_a_label
       7     -3  '?'
       8     -2  ' A'
       9     -1  ':'                 last
clean answer      '7'
corrupted answer  '9'

{file}, line 2: 4 tokens
position         clean  corrupted  labels
       0     -4  '%'
       1     -3  '&'    ')'
       2     -2  "'"
       3     -1  '('
clean answer      '$' '#'
corrupted answer  '%'
"""


def test_pairs_are_shown_token_by_token(command, tiny, write_pairs, text_pair, ids_pair):
    labels = {"op1": 4, "op2": 6, "a_long_name_of_a_label": 6, "another_long_name_of_a_label": -4, "last": -1}
    file = write_pairs(
        text_pair | {"labels": labels}, ids_pair | {"clean_answer": [4, 3], "corrupted_answer": 5}
    )
    result = command("pairs", "--show", file, "--model", tiny)
    assert (result.code, result.err) == (0, "")
    assert result.out == SHOWN.format(file=file)
    assert max(len(line) for line in result.out.replace(file, "").splitlines()) <= 80
    found = json.loads(command("pairs", "--show", file, "--model", tiny, "--json").out)
    assert [pair["length"] for pair in found["pairs"]] == [10, 4]
    first = found["pairs"][0]
    assert first["tokens"][4] == {
        "position": 4,
        "from_end": -6,
        "clean": " 3",
        "clean_id": first["tokens"][4]["clean_id"],
        "corrupted_position": 4,
        "corrupted": " 5",
        "corrupted_id": first["tokens"][4]["corrupted_id"],
        "labels": ["op1"],
    }
    assert [token["clean_id"] for token in found["pairs"][1]["tokens"]] == ids_pair["clean"]
    assert found["pairs"][1]["clean_answer"] == {"tokens": ["$", "#"], "ids": [4, 3]}
    assert first["missing_front"] is None


UNEQUAL = """{file}, line 1: 4 and 5 tokens
position         clean  at corrupted  labels
       0     -4  '!'     0 '!'
       1     -3  '$'                  op
                         1 '%'
                         2 '&'
       2     -2  '('     3 '('
       3     -1  ')'     4 ')'
clean answer      '*'
corrupted answer  '+'
"""


def test_prompts_of_unequal_length(command, tiny, write_pairs, tmp_path):
    """From the file to the effects of what lines up; what cannot be patched gets one sentence."""
    pair = {"clean": [1, 4, 8, 9], "corrupted": [1, 5, 6, 8, 9], "clean_answer": 10, "corrupted_answer": 11}
    lined_up = pair | {"align": "prefix+suffix", "labels": {"op": 1}}
    file = write_pairs(lined_up)
    shown = command("pairs", "--show", file, "--model", tiny)
    assert shown.out == UNEQUAL.format(file=file)
    found = json.loads(command("pairs", "--show", file, "--model", tiny, "--json").out)["pairs"][0]
    assert (found["length"], found["corrupted_length"]) == (4, 5)
    assert [token["corrupted_position"] for token in found["tokens"]] == [0, None, 1, 2, 3, 4]
    run = tmp_path / "run"
    swept = ("sweep", "--model", tiny, "--sites", "mlp_out", "--layers", "0", "--quiet")
    assert command(*swept, "--pairs", file, "--out", run).code == 0
    rows = command("effects", run, "--format", "csv", "--metric", "kl").out.splitlines()
    assert [row.split(",")[3] for row in rows] == ["position", "0", "2", "3"]
    silent = write_pairs(pair | {"labels": {"op": 1}})
    aligned = command("pairs", "--show", silent, "--model", tiny, "--align", "prefix+suffix")
    assert aligned.out == UNEQUAL.format(file=silent)
    everywhere = tmp_path / "everywhere"
    said_once = ("--pairs", write_pairs(pair), "--align", "prefix+suffix", "--out", everywhere)
    assert command(*swept, *said_once).code == 0
    again = command("effects", everywhere, "--format", "csv", "--metric", "kl").out.splitlines()
    assert again == rows
    for wrong, words, said in (
        (pair, (), "line them up with align="),
        (pair | {"align": [[0, 5]]}, (), "align has position 5 of the corrupted prompt, which has 5 tokens"),
        (lined_up, ("--positions", "op"), "position 'op' has no counterpart in the other prompt"),
        (lined_up, ("--positions", "together"), "need prompts that line up entirely"),
        (lined_up, ("--source", "mean"), "choose counterpart, zero or noise"),
    ):
        result = command(*swept, *words, "--pairs", write_pairs(wrong), "--out", tmp_path / "other")
        assert result.code == 2
        assert said in result.err
        assert not (tmp_path / "other").exists()


def test_ids_without_what_the_tokenizer_puts_at_the_front_are_shown(command, write_pairs, ids_pair):
    file = write_pairs(ids_pair)
    shown = command("pairs", "--show", file, "--model", "builtin:llama-arithmetic").out
    assert "given as ids without '<|endoftext|>', which the tokenizer puts at the front\n" in shown


def test_numbers_for_people():
    assert options.in_flops(1.9e15) == "1.9 PFLOP"


def test_the_demo_replaces_only_its_own_folder(command, tmp_path, monkeypatch):
    from deltapatch.cli import demo

    monkeypatch.setattr(demo, "PER_TEMPLATE", 1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "OPERATORS", "+")
    first = command("demo", "--json")
    assert first.code == 0, first.err
    facts = json.loads(first.out)
    assert facts["out"] == "deltapatch-demo"
    assert {p.name for p in (tmp_path / "deltapatch-demo").iterdir()} == {
        "run.json",
        "pairs.jsonl",
        "effects.safetensors",
        "plots",
    }
    assert facts["accuracy"] > 0.8
    assert len(facts["top"]["neurons"]) == 10
    assert all(os.path.exists(path) for path in facts["figures"])

    again = command("demo", "--out", "deltapatch-demo", "--quiet")
    assert again.code == 0, again.err
    assert again.err == ""
    assert "Top neurons of" in again.out

    (tmp_path / "deltapatch-demo" / "notes.txt").write_text("mine")
    refused = command("demo", "--out", "deltapatch-demo")
    assert refused.code == 2
    assert "is taken" in refused.err
    assert (tmp_path / "deltapatch-demo" / "notes.txt").exists()


def shell(*args, **more):
    return subprocess.Popen(
        [sys.executable, "-m", "deltapatch", *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **more,
    )


def test_a_real_process_ends_with_code_2_and_one_sentence(tmp_path):
    process = shell("effects", tmp_path)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert err == f"Error: {tmp_path} is not a run folder: it has no run.json\n"


def ends(*arguments):
    """How a command ends, with whatever stdout and stderr there are."""
    with pytest.raises(SystemExit) as ended:
        cli.main([str(a) for a in arguments])
    return ended.value.code


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_nobody_listens(make_effects, tmp_path, closed, monkeypatch):
    """Whoever started the process had closed its stdout or stderr."""
    make_effects().save(tmp_path / "run")
    effects = ["effects", tmp_path / "run", "--format", "csv"]
    for arguments in (["--version"], ["effects", "--help"], effects, ["merge", tmp_path / "run"]):
        monkeypatch.setattr(sys, closed, None)
        assert ends(*arguments) == 0
        getattr(sys, closed).close()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_names_that_the_terminal_cannot_print(make_effects, tmp_path, encoding, monkeypatch):
    run = tmp_path / "rün✓𝄞"
    make_effects().save(run)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    assert ends("merge", run) == 0
    options.print_json({"out": str(run)})
    sys.stdout.flush()
    printed = sys.stdout.buffer.getvalue()
    plain, as_json = printed.decode("utf-8" if encoding == "ascii" else encoding).splitlines()
    assert json.loads(as_json) == {"out": str(run)}
    # Click takes ASCII for a mistake, and prints UTF-8.
    assert plain == (
        str(run) if encoding == "ascii" else str(run).encode(encoding, "backslashreplace").decode(encoding)
    )


def test_info_of_what_cannot_be_loaded(command, tiny):
    whole = json.loads(command("info", tiny, "--untimed", "--json").out)
    assert whole["cannot_be_loaded"] is None
    weights = (tiny / "model.safetensors").read_bytes()

    def said():
        told = command("info", tiny, "--untimed")
        assert told.code == 0, told.err
        facts = json.loads(command("info", tiny, "--untimed", "--json").out)
        assert [s["rows"] for s in facts["sweeps"]] == [s["rows"] for s in whole["sweeps"]]
        assert f"loading         fails: {facts['cannot_be_loaded']}" in told.out
        return facts["cannot_be_loaded"]

    (tiny / "model.safetensors").write_bytes(weights[:-100])
    assert "not a whole safetensors file" in said()
    (tiny / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "is a git-lfs pointer" in said()
    (tiny / "model.safetensors").unlink()
    assert "has no weights" in said()
    (tiny / "pytorch_model.bin").write_bytes(b"")
    assert f"`deltapatch convert {tiny} --out OUT`" in said()
    told = command("info", tiny, "--untimed", "--stream")
    assert told.code == 0, told.err


def test_a_closed_pipe_is_quiet(make_effects, tmp_path):
    make_effects(lengths=(400,) * 20, n_layers=10).save(tmp_path / "run")
    process = shell("effects", tmp_path / "run", "--site", "mlp_out", "--format", "csv")
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(timeout=60) in (0, 1)


def test_an_interrupt_ends_with_130(tmp_path):
    code = (
        "import pathlib, time, deltapatch.interventions.pairs_file as jsonl\n"
        "def wait(path):\n"
        "    pathlib.Path('reading').touch()\n"
        "    time.sleep(60)\n"
        "jsonl.read_named_pairs = wait\n"
        "from deltapatch.cli.main import main\n"
        "main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "sweep", "--model", "m", "--pairs", "p", "--out", "run"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "reading").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err.strip()) == (130, "", "Interrupted.")
