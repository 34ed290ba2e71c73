"""Autoencoders that SAELens 6.51.1 wrote, and transcoders of 6.54.12.

They are held to what it said of the same vectors itself, in float32.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import deltapatch as dp

FOLDERS = sorted((Path(__file__).parent / "saelens").iterdir())


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_features_and_what_one_of_them_writes(folder):
    said = load_file(folder / "said.safetensors")
    sae = dp.load_sae(folder)
    features, scale = sae.encode(said["x"].double())
    assert ((features > 0) == (said["features"] > 0)).all()
    assert float((features - said["features"]).norm() / features.norm()) < 1e-6
    written = features[:, 3:4] * scale * sae.rows(torch.tensor([3]))
    assert float((written + said["without_3"]).norm() / written.norm()) < 1e-5
    if "transcoder" in folder.name:
        assert (sae.site, sae.layer, sae.reads) == ("hook_mlp_out", 1, "mlp.hook_in")
    else:
        assert (sae.site, sae.layer, sae.reads) == ("hook_resid_post", 1, None)


def test_there_are_some_of_each_kind():
    assert {dp.load_sae(folder).activation for folder in FOLDERS} == {"relu", "gated", "jumprelu", "topk"}
    assert {dp.load_sae(folder).norm for folder in FOLDERS} == {"none", "layer_norm", "constant_norm_rescale"}
