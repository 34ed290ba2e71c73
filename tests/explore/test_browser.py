"""The explorer in headless Chromium: clicks, keys, sorting, copied code that runs, hostile texts."""

import contextlib
import io
import shutil

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

    def copied(button):
        tab.click(button)
        tab.locator(
            "#copied", has_text="copied"
        ).wait_for()  # the page lets no text be run, a predicate's neither
        return tab.evaluate("navigator.clipboard.readText()")

    def said(code):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(code, "page", "exec"), {})
        return [float(x) for x in out.getvalue().strip("[] \n").split()]

    labels = tab.locator("#map .xtick text").all_text_contents()
    click_cell(tab, 1, labels.index("last"))
    one = said(copied("#copy-python"))
    alone = [dp.Intervention(i, [dp.Patch("mlp_out", 1, -1)]) for i in range(2)]
    np.testing.assert_allclose(one, dp.run(model, pairs, alone).values("recovered"), rtol=1e-4)
    tab.check("#every-site")
    for row in (1, 2, 3):
        tab.check(f"#ranking tbody tr:nth-child({row}) input")
    assert tab.inner_text("#joint").startswith("3 patches")
    together = copied("#copy-python")
    assert together.count("dp.Patch(") == 3
    assert len(said(together)) == 2
    shell = copied("#copy-shell")
    assert shell == f"python - <<'END_OF_PATCH'\n{together}END_OF_PATCH\n"


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
