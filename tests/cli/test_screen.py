"""`deltapatch sweep --screen`, and what `deltapatch effects` says of its runs."""

import csv
import io
import json

import numpy as np
from safetensors.numpy import save_file

import deltapatch as dp


def screen(command, tiny, pairs, *more):
    return command("sweep", "--model", tiny, "--pairs", pairs, "--sites", "mlp_post,z", "--top", "20", *more)


def test_a_screened_sweep(command, tiny, write_pairs, text_pair, ids_pair, tmp_path):
    pairs, run = write_pairs(text_pair, ids_pair), tmp_path / "run"
    asked = ("--screen", "attribution", "--screen-sample", "30", "--threshold", "0.5", "--out", run)
    result = screen(command, tiny, pairs, *asked)
    assert result.code == 0
    assert result.out == f"{run}\n"
    assert "with 95% confidence at most" in result.err
    assert "|logit_diff| above 0.5" in result.err
    assert "pearson" in result.err
    again = screen(command, tiny, pairs, *asked, "--resume", "--json")
    said = json.loads(again.out)
    found = dp.load_screened(run)
    assert said["missed"]["at_most"] == found.missed().at_most
    assert said["verified"] == len(found.verified)
    assert said["calibration"]["site"] == ["mlp_post", "z"]
    assert "--screen attribution" not in again.err
    rows = list(csv.DictReader(io.StringIO(command("effects", run, "--format", "csv").out)))
    assert len(rows) == said["verified"]
    own = found.columns("recovered")
    assert np.allclose([float(row["estimate"]) for row in rows], own["estimate"], rtol=1e-3)
    assert [row["site"] for row in rows] == own["site"].tolist()
    table = command("effects", run, "--metric", "logit_diff", "--top", "3")
    assert table.out.split()[:5] == ["pair", "site", "layer", "position", "index"]
    for other in ("plot", "explore"):
        refused = command(other, run)
        assert refused.code == 2
        assert "is a screen, which `deltapatch effects` lists" in refused.err


def test_a_screen_of_directions(command, tiny, write_pairs, text_pair, ids_pair, tmp_path):
    pairs, run, file = write_pairs(text_pair, ids_pair), tmp_path / "run", tmp_path / "d.safetensors"
    width = dp.load_model(tiny, stream=True).spec.d_model
    rows = np.random.default_rng(0).normal(size=(9, width))
    save_file({"resid_post": rows}, file)
    asked = ("sweep", "--model", tiny, "--pairs", pairs, "--sites", "resid_post.along", "--directions", file)
    asked = (*asked, "--screen", "attribution", "--top", "5", "--screen-sample", "7")
    planned = command(*asked, "--dry-run")
    assert "verified       12 on 2 pairs" in planned.out
    result = command(*asked, "--out", run)
    assert result.code == 0
    assert "with 95% confidence at most" in result.err
    found = dp.load_screened(run)
    want = dp.sweep(
        dp.load_model(tiny, device="cpu"),
        pairs,
        sites="resid_post.along",
        directions={"resid_post": rows},
        precision="fp32",
        progress=False,
    ).values("logit_diff")
    here = found.is_verified()
    assert np.allclose(found.values("logit_diff")[here], want[here], rtol=1e-4, atol=1e-5)
    listed = list(csv.DictReader(io.StringIO(command("effects", run, "--format", "csv").out)))
    assert {row["site"] for row in listed} == {"resid_post.along"}
    assert {int(row["index"]) for row in listed} <= set(range(9))


def test_a_screen_of_edges(command, tiny, write_pairs, text_pair, ids_pair, tmp_path):
    pairs, run = write_pairs(text_pair, ids_pair), tmp_path / "run"
    asked = ("edges", "--model", tiny, "--pairs", pairs, "--effect", "both", "--screen", "attribution")
    asked = (*asked, "--top", "20", "--screen-sample", "30")
    planned = command(*asked, "--dry-run")
    assert planned.code == 0
    assert "verified       50 on 2 pairs" in planned.out
    assert "of it for the estimates" in planned.out
    assert command(*asked, "--out", run).code == 0
    said = json.loads(command(*asked, "--out", run, "--resume", "--json").out)
    found = dp.load_screened(run)
    assert isinstance(found, dp.ScreenedEdges)
    assert said["missed"]["at_most"] == found.missed().at_most
    assert (said["edges"], said["verified"]) == (len(found.edges), len(found.verified))
    assert "total q" in said["calibration"]["reads"]
    rows = list(csv.DictReader(io.StringIO(command("effects", run, "--format", "csv").out)))
    own = found.columns("recovered")
    assert [row["receiver"] for row in rows] == own["receiver"].tolist()
    assert np.allclose([float(row["estimate"]) for row in rows], own["estimate"], rtol=1e-3)
    for more, wrong in (
        (("--screen", "relp", "--out", tmp_path / "no"), "leave these receivers out"),
        (("--screen", "ig-activations", "--out", tmp_path / "no"), "no lines for edges"),
        (("--ray", "", "--out", tmp_path / "no"), "--screen and --ray"),
    ):
        result = command(*asked, *more)
        assert (result.code, wrong in result.err) == (2, True)
        assert not (tmp_path / "no").exists()


def test_until_enough_was_found(command, tiny, write_pairs, text_pair, ids_pair, tmp_path):
    pairs, run = write_pairs(text_pair, ids_pair), tmp_path / "run"
    asked = ("--screen", "relp", "--threshold", "0.3", "--until", "recall:0.8:0.9", "--out", run)
    result = screen(command, tiny, pairs, *asked)
    assert result.code == 0
    assert "have to be drawn" in result.err.split("round 1:")[0]  # told beforehand
    found = dp.load_screened(run)
    assert found.reached
    assert found.verdict in result.err
    said = json.loads(screen(command, tiny, pairs, *asked, "--resume", "--json").out)
    assert said["reached"] is True
    assert said["recall"] == found.missed(confidence=0.9).recall
    limited = screen(command, tiny, pairs, *asked[:-1], tmp_path / "limited", "--screen-limit", "25")
    assert limited.code == 0
    assert "NOT enough" in limited.err


def test_a_plan(command, tiny, write_pairs, text_pair, ids_pair):
    asked = ("--screen", "relp", "--screen-sample", "5", "--dry-run")
    pairs = write_pairs(text_pair, ids_pair)
    result = screen(command, tiny, pairs, *asked)
    assert result.code == 0
    assert "verified       25 on 2 pairs" in result.out
    assert "of it for the estimates" in result.out
    said = json.loads(screen(command, tiny, pairs, *asked, "--json").out)
    assert said["rows"] == 25
    assert "estimates" in said["seconds_by_part"]


def test_what_does_not_go_together(command, tiny, write_pairs, ids_pair, tmp_path):
    pairs, out = write_pairs(ids_pair), tmp_path / "run"
    for more, said in (
        (("--out", out), "give screen as well"),
        (("--screen", "relp", "--ray", "", "--out", out), "--screen and --ray"),
        (("--screen", "magic", "--out", out), "magic"),
        (("--screen", "relp", "--until", "0.9", "--out", out), "recall:0.9"),
        (("--screen", "relp", "--screen-by", "kl", "--out", out), "kl"),
        (("--screen", "relp", "--metrics", "kl", "--out", out), "needs it"),
    ):
        result = screen(command, tiny, pairs, *more)
        assert result.code == 2
        assert said in result.err
        assert "Traceback" not in result.err
        assert not out.exists()
    # Before anything is loaded, or a cluster looked for.
    spread = screen(command, "nowhere", "nowhere", "--screen", "relp", "--ray", "nowhere:1", "--out", out)
    assert spread.code == 2
    assert "--screen and --ray do not go together: leave one out" in spread.err
    assert screen(command, tiny, pairs, "--screen", "relp", "--out", out, "--quiet").code == 0
    result = command("effects", out, "--by", "layer")
    assert result.code == 2
    assert "screened sweep" in result.err
