"""The explorer in headless Chromium: clicks, keys, sorting, copied code that runs, hostile texts."""

import contextlib
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from deltapatch.explore.page import write_page
from deltapatch.results.effects import SiteEffects

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed here"),
]
HOSTILE = (
    '</script><img src=x onerror="window.hit=1"><a href="javascript:window.hit=1">$x$ %{x} & <b>bold</b>'
)


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed here")
    with api.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def open_page(browser, tmp_path):
    """Opens effects as a page from a file; whatever the console says or asks of a network is an error."""
    said, contexts = [], []

    def show(effects, metrics=None, width=1280, scheme="light", run="RUN"):
        path = write_page(effects, tmp_path / f"page{len(contexts)}.html", metrics, run=run)
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on(
            "request",
            lambda request: (
                None if request.url.startswith(("file:", "data:", "blob:")) else said.append(request.url)
            ),
        )
        tab.goto(path.as_uri())
        tab.wait_for_selector("#map .hm")
        return tab

    yield show
    for context in contexts:
        context.close()
    assert not said


def click_cell(tab, row, col):
    """Click a cell of the heatmap where plotly has drawn it."""
    x, y = tab.evaluate(
        """([row, col]) => {
            const map = document.getElementById("map"), box = map.getBoundingClientRect();
            const { xaxis: x, yaxis: y } = map._fullLayout;
            return [box.left + x._offset + x.d2p(col), box.top + y._offset + y.d2p(row)];
        }""",
        [row, col],
    )
    tab.mouse.move(x, y)
    tab.mouse.click(x, y)


def column(tab, number):
    return tab.locator(f"#ranking tbody td:nth-child({number})").all_inner_texts()


def test_a_click_shows_the_heads_and_neurons_of_a_cell(open_page, make_effects):
    effects = make_effects()
    tab = open_page(effects)
    click_cell(tab, 1, 5)
    assert tab.inner_text("#cell-title") == "Layer 1, last"
    mean = (
        effects.values("logit_diff", "mlp_out").mean(0)[1, 7]
        / effects.terms("recovered", "mlp_out")[1].mean()
    )
    assert f"{mean:.3g}" in tab.inner_text("#cell-value")
    assert "interval" in tab.inner_text("#cell-value")
    names = tab.locator("#cell .ytick text").all_text_contents()
    assert any(name.startswith("z L1.H") for name in names)
    assert any(name.startswith("mlp_post L1.N") for name in names)


def test_keys_move_through_the_cells(open_page, make_effects):
    tab = open_page(make_effects())
    click_cell(tab, 0, 0)
    tab.focus("#map")
    for key in ("ArrowUp", "ArrowRight", "ArrowRight", "ArrowLeft"):
        tab.keyboard.press(key)
    assert tab.inner_text("#cell-title") == "Layer 1, op1"
    for _ in range(9):
        tab.keyboard.press("ArrowDown")
    assert tab.inner_text("#cell-title") == "Layer 0, op1"


def test_the_ranking_is_sorted_and_searched(open_page, make_effects):
    tab = open_page(make_effects())
    sizes = [float(text) for text in column(tab, 6)]
    assert sizes == sorted(sizes, reverse=True)
    tab.click("#ranking [data-sort=value]")
    values = [float(text) for text in column(tab, 5)]
    assert values == sorted(values, reverse=True)
    tab.click("#ranking [data-sort=value]")
    assert [float(text) for text in column(tab, 5)] == values[::-1]
    assert tab.get_attribute("#ranking th:nth-child(5)", "aria-sort") == "ascending"
    tab.check("#every-site")
    tab.fill("#search", "z L2")
    assert sorted(column(tab, 3)) == ["L2.H0", "L2.H1", "L2.H2", "L2.H3"]


def test_every_site_metric_and_pair_is_drawn(open_page, make_effects):
    tab = open_page(make_effects(lengths=(8, 10)))
    for site in range(4):
        tab.select_option("#site", str(site))
        for pair in ("-1", "1"):
            tab.select_option("#pair", pair)
            assert tab.inner_text("#cell-value") != ""
    for metric in ("ie", "kl", "flip"):
        tab.select_option("#metric", metric)
        assert tab.inner_text("#equation").startswith(metric)
    tab.select_option("#site", "0")
    axis = tab.locator("#map .xtick text").all_text_contents()
    assert axis[:3] == ["0 '␣and'", "1 '␣and'", "2 'Q:'"]
    assert tab.locator("#prompts mark").count() >= 2


def test_columns_of_a_pair_are_named_by_their_own_token(open_page, make_effects):
    """Labels are swept in another order than the axis has."""
    effects = make_effects(lengths=(8, 10))
    z = effects.sites["z"]
    measured = {name: np.repeat(array, 2, axis=2) for name, array in z.measured.items()}
    measured["kl"][:, :, 1] = 7
    effects.sites["z"] = SiteEffects("z", z.layers, ["last", "op1"], measured)
    tab = open_page(effects, ["kl"])
    tab.select_option("#site", label="z")
    assert tab.locator("#map .xtick text").all_text_contents() == ["op1", "last"]
    tab.select_option("#pair", "1")
    (word,) = effects.pairs[1].clean_text[5:6]
    own = [f"5 '{word.replace(' ', chr(0x2423))}'", "9 '\u2423A:'"]
    assert tab.locator("#map .xtick text").all_text_contents() == own
    assert tab.inner_text("#cell-title").endswith(own[0])
    assert 'dp.Patch("z", 0, "op1", ' in tab.inner_text("#code")
    assert "for i in [1]]" in tab.inner_text("#code")


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_the_window_in_light_and_dark(open_page, make_effects, width, scheme):
    tab = open_page(make_effects(lengths=(30,) * 2, n_layers=12, labels=False), ["recovered"], width, scheme)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    back = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert back == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(22, 23, 26)")
    tab.click("#theme")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") != back


def test_texts_of_a_run_stay_text(open_page, make_effects):
    effects = make_effects(lengths=(8, 8))
    for pair in effects.pairs:
        pair.clean_text[:3] = pair.corrupted_text[:3] = [HOSTILE] * 3
        pair.labels[HOSTILE] = 1
    effects.meta["model"] = HOSTILE
    tab = open_page(effects, ["kl", "recovered"], run=HOSTILE)
    for site in range(4):
        tab.select_option("#site", str(site))
        for pair in ("0", "-1"):
            tab.select_option("#pair", pair)
    tab.select_option("#site", "0")
    for col in range(3):
        click_cell(tab, 0, col)
    assert tab.locator("img").count() == tab.locator("a").count() == tab.locator("body b b").count() == 0
    assert tab.evaluate("window.hit") is None
    assert HOSTILE in tab.inner_text("#about")
    assert "<img" in "".join(tab.locator("#map .xtick text").all_text_contents())


def test_the_copied_python_makes_the_joint_patch(open_page, tmp_path):
    import deltapatch as dp

    model = dp.load_model("builtin:gpt-neox-arithmetic")
    pairs = [
        dp.PromptPair("Q: What is 12 plus 30? A:", "Q: What is 12 plus 41? A:", " 42", " 53", {"operand": 6}),
        dp.PromptPair("52 - 11 =", "75 - 11 =", " 41", " 64", {"operand": 0}),
    ]
    run = tmp_path / "run"
    effects = dp.sweep(model, pairs, sites=["mlp_out", "z"], out=run, progress=False)
    tab = open_page(effects, ["recovered"], run=str(run))
    tab.context.grant_permissions(["clipboard-read", "clipboard-write"])

    def said(code):
        return [float(x) for x in runs_code(code).strip("[] \n").split()]

    labels = tab.locator("#map .xtick text").all_text_contents()
    click_cell(tab, 1, labels.index("last"))
    one = said(copied(tab, "#copy-python"))
    alone = [dp.Intervention(i, [dp.Patch("mlp_out", 1, -1)]) for i in range(2)]
    np.testing.assert_allclose(one, dp.run(model, pairs, alone).values("recovered"), rtol=1e-4)
    tab.check("#every-site")
    for row in (1, 2, 3):
        tab.check(f"#ranking tbody tr:nth-child({row}) input")
    assert tab.inner_text("#joint").startswith("3 patches")
    together = copied(tab, "#copy-python")
    assert together.count("dp.Patch(") == 3
    assert len(said(together)) == 2
    shell = copied(tab, "#copy-shell")
    assert shell == f"python - <<'END_OF_PATCH'\n{together}END_OF_PATCH\n"


def runs_code(code):
    """What the copied Python prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "page", "exec"), {})
    return out.getvalue()


def copied(tab, button):
    tab.click(button)
    # The page lets no text be run, a predicate's neither.
    tab.locator("#copied", has_text="copied").wait_for()
    return tab.evaluate("navigator.clipboard.readText()")


def test_a_click_shows_the_edges_of_a_cell(open_page, make_edges):
    edges = make_edges()
    tab = open_page(edges, ["logit_diff"])
    rows = tab.locator("#map .ytick text").all_text_contents()
    cols = tab.locator("#map .xtick text").all_text_contents()
    assert rows == ["input", "a0", "m0", "a1", "m1", "a2", "m2"]
    click_cell(tab, rows.index("a0"), cols.index("a2<k>"))
    assert tab.inner_text("#cell-title") == "a0 \u2192 a2<k>"
    mean = edges.by_node(edges.mean("logit_diff", "total"))
    s, r = ([n.startswith(x) for n in names] for x, names in (("a0", edges.senders), ("a2", edges.receivers)))
    reads = [n.endswith("<k>") for n in edges.receivers]
    block = mean[np.ix_(np.flatnonzero(s), np.flatnonzero(np.array(r) & reads))]
    best = block.ravel()[np.abs(block).argmax()]
    assert f": {best:.3g}," in tab.inner_text("#cell-value")
    assert "interval" in tab.inner_text("#cell-value")
    assert tab.locator("#cell .ytick text").count() == 16
    tab.focus("#map")
    for key in ("ArrowUp", "ArrowLeft"):
        tab.keyboard.press(key)
    assert tab.inner_text("#cell-title") == "m0 \u2192 a2<q>"
    tab.select_option("#heads", "each")
    assert len(tab.locator("#map .ytick text").all_text_contents()) > len(rows)


def test_edges_are_ranked_searched_and_drawn(open_page, make_edges):
    edges = make_edges()
    tab = open_page(edges, ["logit_diff", "kl"])
    sizes = [float(text) for text in column(tab, 6)]
    assert sizes == sorted(sizes, reverse=True)
    tab.fill("#search", "values a2.h1")
    assert set(column(tab, 3)) == {"a2.h1<v>"}
    tab.click("#ranking [data-sort=s]")
    assert column(tab, 2)[0] == "input"
    tab.uncheck("#connected")
    drawn = tab.locator("#graph path.edge")
    assert drawn.count() == 40
    tab.fill("#drawn-number", "7")
    assert drawn.count() == 7
    assert tab.input_value("#drawn") == "7"
    tab.focus("#drawn")
    tab.keyboard.press("ArrowRight")
    assert drawn.count() == 8
    best = np.argsort(-np.abs(edges.mean("logit_diff", "total")))[:8]
    names = [text.split(":")[0] for text in drawn.locator("title").all_text_contents()]
    assert set(names) == {" \u2192 ".join(edges.edges[i]) for i in best}
    widths = [float(path.get_attribute("stroke-width")) for path in drawn.all()]
    assert widths == sorted(widths)
    assert widths[-1] == 5
    for effect, pair, metric in (("direct", "-1", "kl"), ("total", "3", "logit_diff"), ("direct", "0", "kl")):
        for id, value in (("#effect", effect), ("#pair", pair), ("#metric", metric)):
            tab.select_option(id, value)
        values = edges.mean(metric, effect) if pair == "-1" else edges.flat(metric, effect)[int(pair)]
        best = np.abs(values).argmax()
        assert drawn.locator("title").all_text_contents()[-1].startswith(" \u2192 ".join(edges.edges[best]))


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_of_edges_fits_the_window(open_page, make_edges, width, scheme):
    edges = make_edges(positions=(0, 3, "last"))
    edges.meta["noise_floor"] = {"relative_error": {"logit_diff": 0.3}}
    tab = open_page(edges, ["logit_diff"], width, scheme)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert "noise floor" in tab.inner_text("#legend")
    assert "circuit" not in tab.inner_text("#make")
    tab.select_option("#position", "1")
    assert set(column(tab, 5)) == {"3"}
    assert 'into=["' in tab.inner_text("#code")
    tab.click("#theme")


def test_texts_of_a_run_of_edges_stay_text(open_page, make_edges):
    edges = make_edges(2)
    for pair in edges.pairs:
        pair.clean_text[:3] = pair.corrupted_text[:3] = [HOSTILE] * 3
    edges.meta["model"] = HOSTILE
    tab = open_page(edges, ["kl", "recovered"], run=HOSTILE)
    for pair in ("0", "-1"):
        tab.select_option("#pair", pair)
    assert tab.locator("img").count() == tab.locator("a").count() == tab.locator("body b b").count() == 0
    assert tab.evaluate("window.hit") is None
    assert HOSTILE in tab.inner_text("#about")


def test_the_copied_code_makes_the_circuit_and_the_joint_patch(open_page, tmp_path, monkeypatch):
    import deltapatch as dp

    monkeypatch.chdir(tmp_path)
    model = dp.load_model("builtin:gpt-neox-arithmetic")
    pairs = [dp.PromptPair(f"1{a} + 30 =", f"1{a} + 47 =", f" {40 + a}", f" {57 + a}") for a in (2, 5)]
    run = tmp_path / "it's a run"
    edges = dp.sweep_edges(model, pairs, direction="noise", effect="both", out=run, progress=False)
    tab = open_page(edges, ["logit_diff"], run=str(run))
    tab.context.grant_permissions(["clipboard-read", "clipboard-write"])

    drawn = tab.locator("#graph path.edge").count()
    circuit = dp.Circuit.top(edges, 40)
    assert drawn == len(circuit)
    assert f"{dp.faithfulness(model, pairs, circuit, progress=False).share[0]:.3f}" in runs_code(
        copied(tab, "#copy-python")
    )
    assert dp.Circuit.load("circuit.json").edges == circuit.edges
    (tmp_path / "circuit.json").unlink()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    shell = ["bash", "-c", copied(tab, "#copy-shell")]
    subprocess.run(shell, check=True, capture_output=True, env={**os.environ, "PATH": path})
    assert dp.Circuit.load("circuit.json").edges == circuit.edges
    (tmp_path / "circuit.json").unlink()
    tab.select_option("#pair", "1")
    tab.select_option("#effect", "direct")
    runs_code(copied(tab, "#copy-python"))
    assert len(dp.Circuit.load("circuit.json")) == tab.locator("#graph path.edge").count()

    tab.select_option("#effect", "total")
    tab.select_option("#pair", "-1")
    tab.select_option("#make", "patch")
    tab.check("#ranking tbody tr:nth-child(2) input")
    sender, receiver = column(tab, 2)[1], column(tab, 3)[1]
    alone = [float(x) for x in runs_code(copied(tab, "#copy-python")).strip("[] \n").split()]
    at = edges.edges.index((sender, receiver))
    np.testing.assert_allclose(alone, edges.flat("logit_diff")[:, at], rtol=1e-4)
    tab.check("#ranking tbody tr:nth-child(1) input")
    assert "2 edges, ticked" in tab.inner_text("#joint")
    assert len(runs_code(copied(tab, "#copy-python")).strip("[] \n").split()) == 2  # NumPy pads numbers


def test_key_value_heads_are_patched_as_the_query_heads_that_read_them(open_page, make_edges):
    edges = make_edges(2, keys="kv")
    edges.measured["logit_diff"][:, 0, 0, edges.edges.index(("m0", "a1.kv1<v>"))] = 50
    tab = open_page(edges, ["logit_diff"])
    tab.check("#ranking tbody tr:nth-child(1) input")
    assert 'dp.Patch("mlp_out", 0, place, into=["a1.h2<v>","a1.h3<v>"])' in tab.inner_text("#code")


def test_all_edges_of_a_real_model_open_at_once(open_page, make_edges):
    tab = open_page(make_edges(3, (30, 9), measured=("logit_diff", "kl")), ["logit_diff", "kl"])
    assert "123,211 edges" in tab.inner_text("#notes")
    assert tab.locator("#ranking tbody tr").count() == 300
    assert tab.locator("#heads").is_hidden()
    tab.uncheck("#connected")
    tab.fill("#drawn-number", "300")
    assert tab.locator("#graph path.edge").count() == 300
    assert tab.evaluate("document.documentElement.scrollWidth") <= 1280


def test_half_a_million_neurons_open_at_once(open_page, make_effects):
    effects = make_effects(lengths=(8,) * 4)
    measured = {
        name: np.random.default_rng(0).normal(size=(4, 28, 1, 16_384)).astype(np.float32)
        for name in ("logit_diff", "kl")
    }
    effects.sites = {"mlp_post": SiteEffects("mlp_post", np.arange(28), [-1], measured)}
    tab = open_page(effects)
    assert "458,752 neurons" in tab.inner_text("#notes")
    assert tab.locator("#ranking tbody tr").count() == 300
