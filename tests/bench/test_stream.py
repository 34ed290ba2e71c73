"""`deltapatch bench stream`: what it says of a sweep and of a screen of a model that is streamed."""

import pytest

from deltapatch.bench.report import stream as table
from deltapatch.bench.stream import Sweep, carry_out

SCREEN = {"screen": "attribution", "top": 5, "screen_sample": 4}


@pytest.mark.parametrize("screen", [{}, SCREEN])
def test_what_is_told(folder_of, screen):
    sweep = Sweep(str(folder_of("gpt_neox")), [6, 5], ["mlp_post"], [-1], screen=screen)
    found = carry_out(sweep)
    n = 2 * 3 * 20  # pairs, layers, neurons
    assert found["run"]["stream"]
    assert found["predicted"]["rows"] == (9 if screen else n)
    text = table({"runs": [{"sweep": {"lengths": [6, 5], "sites": ["mlp_post"]}, "found": found}]})
    assert "streamed" in text
    assert ("screened" in text) == bool(screen)
    if screen:
        assert found["screened"] == n
        assert 9 <= found["verified"] < n  # each stratum is drawn from
        assert found["missed"]["at_most"] <= found["missed"]["unseen"] <= n - found["verified"]
        assert found["calibration"]["site"] == ["mlp_post"]
