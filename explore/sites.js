// The page of a sweep of sites: what is chosen (`at`), and how it is drawn.

const at = { site: 0, metric: content.default, pair: -1, row: 0, col: 0, sort: "size", down: true };
const site = () => content.sites[at.site];

// --- numbers -------------------------------------------------------------------------------------------------

// Whole vectors of one pair are shown by token; everything else by the columns of the mean.
const byToken = (s) => at.pair >= 0 && !s.counts;

function grid(s) { // what the heatmap shows: column labels, and a cell each of value, rate and the entry behind it
  const found = s.metrics[at.metric];
  const layers = s.layers.length;
  if (byToken(s)) {
    const places = s.swept[at.pair], pair = content.pairs[at.pair];
    const cols = places.map((p, i) => i).filter((i) => places[i] !== null);
    const values = floats(found.pairs), width = places.length, from = at.pair * layers * width;
    return {
      labels: cols.map((i) => `${places[i]} '${seen(pair.clean[places[i]])}'`),
      cells: s.layers.map((_, l) => cols.map((i) => ({ value: values[from + l * width + i], q: NaN }))),
      columns: cols,
    };
  }
  const columns = s.columns.map((_, c) => c);
  const out = { labels: s.columns.map(columnLabel(s)), columns, cells: [] };
  if (!s.counts) {
    const mean = floats(found.mean), low = floats(found.low), high = floats(found.high), q = floats(found.q);
    out.cells = s.layers.map((_, l) => columns.map((c) => {
      const i = l * columns.length + c;
      return { value: mean[i], low: low[i], high: high[i], q: q[i] };
    }));
    return out;
  }
  out.cells = s.layers.map(() => columns.map(() => ({ value: NaN, q: NaN })));
  for (const e of entries(s)) {
    const cell = out.cells[e.row][e.col];
    if (Number.isNaN(cell.value) || Math.abs(e.value) > Math.abs(cell.value)) out.cells[e.row][e.col] = e;
  }
  return out;
}

const columnLabel = (s) => (label, c) => { // of a pair, the token where the column stands for a single one
  const places = at.pair < 0 ? [] : s.where[at.pair][c];
  return places.length === 1 ? `${places[0]} '${seen(content.pairs[at.pair].clean[places[0]])}'` : label;
};

function entries(s) { // every cell of whole vectors, or every listed head, neuron, coordinate
  const key = `${s.name} ${at.metric} ${at.pair}`;
  if (numbers.has(key)) return numbers.get(key);
  const found = s.metrics[at.metric], out = [];
  if (!s.counts) {
    const g = grid(s);
    g.cells.forEach((cells, row) => cells.forEach((cell, col) =>
      out.push({ ...cell, site: s, row, col, index: null, label: g.labels[col], column: g.columns[col] })));
  } else {
    const [row, col, index] = [ints(found.layer), ints(found.column), ints(found.index)];
    const [mean, low, high, q] = ["mean", "low", "high", "q"].map((name) => floats(found[name]));
    const each = at.pair < 0 ? null : floats(found.pairs).subarray(at.pair * row.length);
    for (let i = 0; i < row.length; i++) {
      out.push({ site: s, row: row[i], col: col[i], index: index[i], value: each ? each[i] : mean[i], entry: i,
        low: each ? NaN : low[i], high: each ? NaN : high[i], q: each ? NaN : q[i],
        label: columnLabel(s)(s.columns[col[i]], col[i]), column: col[i] });
    }
  }
  const kept = out.filter((e) => !Number.isNaN(e.value));
  for (const e of kept) {
    e.name = `L${s.layers[e.row]}${e.index === null ? "" : `.${s.letter}${e.index}`}`;
    e.text = `${s.name} ${e.name} ${e.label}`.toLowerCase();
  }
  numbers.set(key, kept);
  return kept;
}

function overPairs(s, row, col, entry) { // one number a pair, where the page has them
  const found = s.metrics[at.metric], n = content.pairs.length, each = floats(found.pairs);
  if (entry !== undefined) {
    const width = ints(found.layer).length;
    return content.pairs.map((_, p) => each[p * width + entry]);
  }
  const width = s.swept[0].length, layers = s.layers.length;
  return Array.from({ length: n }, (_, p) => {
    const places = s.where[p][col];
    const found = s.swept[p].map((place, i) => (places.includes(place) ? i : -1)).filter((i) => i >= 0);
    const values = found.map((i) => each[(p * layers + row) * width + i]).filter((x) => !Number.isNaN(x));
    return values.length ? values.reduce((a, b) => a + b) / values.length : NaN;
  });
}

const below = (cell, s) => s.metrics[at.metric].floor !== null && Math.abs(cell.value) <= s.metrics[at.metric].floor;

// --- drawing -------------------------------------------------------------------------------------------------

function drawMap() {
  const s = site(), g = grid(s), m = metric();
  at.row = Math.min(at.row, g.cells.length - 1);
  at.col = Math.min(at.col, g.labels.length - 1);
  const flat = g.cells.flat().map((c) => Math.abs(c.value)).filter((x) => !Number.isNaN(x));
  const most = flat.reduce((a, b) => Math.max(a, b), 0) || 1;
  const wide = m.skewed && most > 30, bend = (x) => (wide ? Math.asinh(x) : x);
  const x = g.labels.map((_, i) => i), y = s.layers.map((_, i) => i);
  const hover = g.cells.map((cells, l) => cells.map((c, i) => plain(
    `layer ${s.layers[l]}, ${g.labels[i]}: ${told(c.value)}${c.name ? ` (${c.name})` : ""}`)));
  const ticks = wide ? (m.from_zero ? [0, 1, most] : [-most, -1, 0, 1, most]) : undefined;
  const marks = { x: [], y: [], symbol: [] };
  g.cells.forEach((cells, l) => cells.forEach((c, i) => {
    if (Number.isNaN(c.value)) return;
    const symbol = below(c, s) ? "line-ew-open" : accident(c) ? "x-thin-open" : null;
    if (symbol) { marks.x.push(i); marks.y.push(l); marks.symbol.push(symbol); }
  }));
  const narrow = el("map").clientWidth < 500;
  const step = Math.ceil(g.labels.length / (narrow ? 14 : 32)), down = Math.ceil(s.layers.length / 16);
  const shown = x.filter((i) => (g.labels.length - 1 - i) % step === 0);
  const traces = [
    { type: "heatmap", z: g.cells.map((cells) => cells.map((c) => (Number.isNaN(c.value) ? null : bend(c.value)))), x, y,
      colorscale: scale(m.from_zero), zmin: m.from_zero ? 0 : -bend(most), zmax: bend(most), xgap: 1, ygap: 1,
      text: hover, hoverinfo: "text", hoverongaps: false,
      colorbar: { thickness: 12, outlinewidth: 0, len: 1, orientation: "h", y: 1.02, yanchor: "bottom", xpad: 0,
        title: { text: plain(m.label) + (wide ? " (asinh scale)" : ""), side: "top", font: { size: narrow ? 11 : 12 } },
        ...(ticks ? { tickvals: ticks.map(bend), ticktext: ticks.map(told) } : {}) } },
    { type: "scatter", mode: "markers", x: marks.x, y: marks.y, hoverinfo: "skip",
      marker: { symbol: marks.symbol, size: 7, color: colour("--quiet"), line: { width: 1 } } },
  ];
  const height = Math.max(220, Math.min(620, 26 * s.layers.length + 190));
  Plotly.react("map", traces, layout({ height, hovermode: "closest",
    margin: { l: 44, r: 8, t: 56, b: 60 },
    xaxis: { tickvals: shown, ticktext: shown.map((i) => plain(g.labels[i])), tickangle: g.labels.length > 6 ? -45 : 0,
      showgrid: false, zeroline: false, range: [-0.5, g.labels.length - 0.5] },
    yaxis: { tickvals: y.filter((i) => i % down === 0), ticktext: s.layers.filter((_, i) => i % down === 0).map(String),
      title: { text: "layer" }, showgrid: false, zeroline: false, range: [-0.5, s.layers.length - 0.5] },
    shapes: [{ type: "rect", x0: at.col - 0.5, x1: at.col + 0.5, y0: at.row - 0.5, y1: at.row + 0.5,
      line: { color: colour("--fore"), width: 2.5 } }] }), config);
  const pairs = at.pair < 0 ? `mean over ${content.n_pairs} pair${content.n_pairs > 1 ? "s" : ""}` : `pair ${at.pair}`;
  el("map-title").textContent = `${s.name}, ${pairs}` + (s.counts ? `: the strongest ${s.counts} of each cell` : "");
  const floor = s.metrics[at.metric].floor;
  el("legend").textContent = [
    g.cells.flat().some(accident) ? `\u00d7: not significant (false-discovery rate above ${content.rate})` : "",
    floor === null ? "noise floor not measured" : `\u2212: at or below the noise floor (${told(floor)})`,
    flat.length < g.cells.flat().length ? "no colour: no such position" : "",
  ].filter(Boolean).join("; ");
  return g;
}

function drawCell(g) {
  const s = site(), cell = g.cells[at.row]?.[at.col];
  const layer = s.layers[at.row], label = g.labels[at.col];
  el("cell-title").textContent = `Layer ${layer}, ${label}`;
  const column = g.columns[at.col];
  el("cell-value").textContent = cell === undefined || Number.isNaN(cell.value) ? "Nothing was swept here."
    : `${s.name}${cell.name ? ` ${cell.name}` : ""}: ${told(cell.value)}${spread(cell, below(cell, s))}`;
  // What is inside: heads, neurons, coordinates of this layer and position, of this site and of the others.
  const place = JSON.stringify(byToken(s) ? s.swept[at.pair][column] : null);
  const here = content.sites.filter((o) => o.counts).flatMap((o) => entries(o).filter((e) =>
    o.layers[e.row] === layer && (o === s ? e.col === at.col : byToken(s)
      ? JSON.stringify(o.where[at.pair][e.col]) === `[${place}]` : same(o, e.col, s, at.col))));
  here.sort((a, b) => Math.abs(b.value) - Math.abs(a.value));
  const top = here.slice(0, 16).reverse();
  if (top.length) {
    bars(top.map((e) => `${e.site.name} ${e.name}`), top, at.pair < 0);
    el("inside").textContent = at.pair < 0 && content.n_pairs > 1 ? `Strongest first, mean and 95% interval over pairs${top.some(accident) ? "; hollow: not significant" : ""}.`
      : "Strongest first.";
  } else {
    const each = byToken(s) || cell === undefined ? [] : overPairs(s, at.row, at.col, cell.entry)
      .map((value, p) => ({ value, p, low: NaN, high: NaN, q: NaN })).filter((e) => !Number.isNaN(e.value));
    each.sort((a, b) => a.value - b.value);
    if (each.length > 1) bars(each.map((e) => `pair ${e.p}`), each, false);
    else { Plotly.purge("cell"); el("cell").style.minHeight = "0"; }
    el("inside").textContent = each.length > 1 ? "Pair by pair. No heads or neurons were swept here."
      : "No heads or neurons were swept here.";
  }
}

const same = (a, i, b, j) => JSON.stringify(a.where.map((row) => row[i])) === JSON.stringify(b.where.map((row) => row[j]));

const HEAD = [["", ""], ["site", "site"], ["name", "component"], ["label", "position"], ["value", "effect"],
  ["size", "magnitude"], ["low", "low"], ["high", "high"], ["q", "q"]];

function drawRanking() {
  const rows = (el("every-site").checked ? content.sites : [site()]).flatMap(entries);
  const key = { site: (e) => e.site.name, name: (e) => e.site.layers[e.row] * 1e7 + (e.index ?? -1),
    label: (e) => e.col, size: (e) => Math.abs(e.value) }[at.sort] ?? ((e) => e[at.sort]);
  drawTable(HEAD, rows, { key, row: rankingRow, again: drawRanking, words: ["site", "name", "label"] });
}

function rankingRow(e) {
  const go = node("button", e.name, { type: "button" });
  go.onclick = () => {
    at.site = content.sites.indexOf(e.site);
    el("site").value = at.site;
    Object.assign(at, { row: e.row, col: e.col });
    draw();
    el("map").scrollIntoView({ block: "nearest" });
  };
  const cells = [e.site.name, go, e.label, told(e.value), told(Math.abs(e.value)),
    ...["low", "high", "q"].map((name) => (Number.isNaN(e[name] ?? NaN) ? "" : told(e[name])))];
  const quiet = accident(e) || below(e, e.site);
  return tableRow(`${e.site.name} ${e.name} at ${e.label}`, quiet, ...patchOf(e), cells, 3);
}

function patchOf(e) {
  const place = byToken(e.site) ? e.site.swept[at.pair][e.column] : e.site.places[e.col];
  const patch = [e.site.name, e.site.layers[e.row], place, e.index];
  return [JSON.stringify(patch), patch];
}

function drawCode() {
  const g = grid(site()), cell = g.cells[at.row]?.[at.col] ?? {};
  const own = patchOf({ site: site(), row: at.row, col: at.col, column: g.columns[at.col], index: cell.index ?? null })[1];
  const patches = chosen.size ? [...chosen.values()] : [own];
  el("joint").textContent = chosen.size ? `${chosen.size} patch${chosen.size > 1 ? "es" : ""}, all at once, in ${at.pair < 0 ? "every pair" : `pair ${at.pair}`}.`
    : "The cell that is chosen above. Tick rows of the ranking to patch several at once.";
  const code = pythonOf({ ...content, metric: at.metric, pair: at.pair }, patches);
  el("code").textContent = code;
  return code;
}

function draw() {
  el("equation").textContent = `${at.metric} = ${metric().equation}`;
  drawPrompts();
  drawCell(drawMap());
  drawRanking();
  drawCode();
}

// --- what the reader does ------------------------------------------------------------------------------------

function start() {
  begin();
  options(el("site"), content.sites.map((s, i) => [i, s.name]), 0);
  for (const id of ["site", "metric", "pair"]) {
    el(id).onchange = () => {
      at[id] = id === "metric" ? el(id).value : Number(el(id).value);
      if (id !== "metric") toStrongest(); // the columns are others now
      if (id === "pair") chosen.clear(); // what is patched in one pair may be elsewhere in another
      draw();
    };
  }
  for (const id of ["search", "every-site", "only-found"]) el(id).oninput = drawRanking;
  el("only-found").parentElement.hidden = !content.sites.some((s) => floats(s.metrics[at.metric].q).some((q) => !Number.isNaN(q)));
  el("copy-shell").onclick = () => copy(shellOf(drawCode()), "Shell command");
  toStrongest();
  draw();
  choosable(() => { const g = grid(site()); return [g.cells.length, g.labels.length]; }, choose);
}

function toStrongest() {
  const cells = grid(site()).cells.flatMap((row, r) => row.map((cell, c) => [Math.abs(cell.value) || 0, r, c]));
  [, at.row, at.col] = cells.reduce((a, b) => (b[0] > a[0] ? b : a), [0, 0, 0]);
}

function choose(row, col) {
  Object.assign(at, { row, col });
  Plotly.relayout("map", frame(row, col));
  drawCell(grid(site()));
  drawCode();
}

start();
