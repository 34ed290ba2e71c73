// The page: what is chosen (`at`), and how it is drawn. Numbers come from the script element `content`.

const content = JSON.parse(document.getElementById("content").textContent);
const el = (id) => document.getElementById(id);
const at = { site: 0, metric: content.default, pair: -1, row: 0, col: 0, sort: "size", down: true };
const chosen = new Map(); // key -> patch, of the joint patch
const SHOWN = 300; // rows of the ranking in the page at once
const numbers = new Map();

function array(text, kind) { // base64 -> a typed array, once
  if (!numbers.has(text)) {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    numbers.set(text, new kind(bytes.buffer));
  }
  return numbers.get(text);
}
const floats = (text) => array(text, Float32Array);
const ints = (text) => array(text, Int32Array);
// What plotly would take for markup or for a formula.
const plain = (text) => String(text).replace(/[&<>$]/g, (c) => `&#${c.charCodeAt(0)};`);
const told = (x) => (Number.isNaN(x) ? "none" : x === 0 ? "0" : Math.abs(x) < 1e-3 || Math.abs(x) >= 1e5
  ? x.toExponential(2) : String(Number(x.toPrecision(3))));
const seen = (token) => token.replaceAll("\n", "\\n").replaceAll("\t", "\\t").replaceAll(" ", "\u2423") ;
const dark = () => document.documentElement.dataset.theme === "dark";
const site = () => content.sites[at.site];
const metric = () => content.metrics.find((m) => m.name === at.metric);
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function node(tag, text, attributes = {}) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

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
const accident = (e) => e.q > content.rate;

// --- drawing -------------------------------------------------------------------------------------------------

function layout(more) {
  const line = colour("--line");
  const axis = { gridcolor: line, linecolor: line, zerolinecolor: line, automargin: true, fixedrange: true };
  return { paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false,
    font: { color: colour("--fore"), size: 12, family: "system-ui, sans-serif" },
    margin: { l: 50, r: 10, t: 8, b: 40 }, ...more,
    xaxis: { ...axis, ...more.xaxis }, yaxis: { ...axis, ...more.yaxis } };
}
const config = { displayModeBar: false, responsive: true };

function scale(from_zero) { // blue and orange-red are told apart by everyone; the middle is the page's ground
  const middle = dark() ? "#2a2c31" : "#f7f7f7";
  const high = dark() ? [[0.5, "#d9752b"], [1, "#ffd9a8"]] : [[0.5, "#e58267"], [1, "#b2182b"]];
  const low = dark() ? ["#bfe0ff", "#3d8fd1"] : ["#2166ac", "#67a9cf"];
  if (from_zero) return [[0, middle], ...high];
  return [[0, low[0]], [0.25, low[1]], [0.5, middle], [0.75, high[0][1]], [1, high[1][1]]];
}

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
  const interval = (c) => (Number.isNaN(c.low ?? NaN) ? "" : `, 95% interval ${told(c.low)} to ${told(c.high)}`) +
    (Number.isNaN(c.q) ? "" : `, q ${told(c.q)}${accident(c) ? " (not significant)" : ""}`) +
    (below(c, s) ? ", at or below the noise floor" : "");
  el("cell-value").textContent = cell === undefined || Number.isNaN(cell.value) ? "Nothing was swept here."
    : `${s.name}${cell.name ? ` ${cell.name}` : ""}: ${told(cell.value)}${interval(cell)}`;
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

function bars(names, rows, intervals) {
  el("cell").style.minHeight = "";
  const [up, down] = dark() ? ["#f2994a", "#6fb3ea"] : ["#b2182b", "#2166ac"];
  const error = intervals && rows.some((e) => !Number.isNaN(e.low));
  const trace = { type: "scatter", mode: "markers", x: rows.map((e) => e.value), y: rows.map((_, i) => i),
    text: rows.map((e, i) => plain(`${names[i]}: ${told(e.value)}`)), hoverinfo: "text",
    marker: { size: 8, color: rows.map((e) => (e.value < 0 ? down : up)),
      symbol: rows.map((e) => (accident(e) ? "circle-open" : "circle")) },
    ...(error ? { error_x: { type: "data", symmetric: false, array: rows.map((e) => e.high - e.value),
      arrayminus: rows.map((e) => e.value - e.low), color: colour("--quiet"), thickness: 1.2, width: 4 } } : {}) };
  Plotly.react("cell", [trace], layout({ height: 90 + 20 * Math.min(rows.length, 30), hovermode: "closest",
    xaxis: { title: { text: plain(el("cell").clientWidth < 450 ? at.metric : metric().label) }, zeroline: true, zerolinecolor: colour("--quiet") },
    yaxis: { tickvals: rows.length > 30 ? [] : rows.map((_, i) => i), ticktext: names.map(plain), range: [-0.7, rows.length - 0.3] } }),
  config);
}

const HEAD = [["", ""], ["site", "site"], ["name", "component"], ["label", "position"], ["value", "effect"],
  ["size", "magnitude"], ["low", "low"], ["high", "high"], ["q", "q"]];

function drawRanking() {
  const words = el("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const sites = el("every-site").checked ? content.sites : [site()];
  let rows = sites.flatMap(entries);
  const total = rows.length;
  rows = rows.filter((e) => words.every((w) => e.text.includes(w)) && (!el("only-found").checked || e.q <= content.rate));
  const key = { site: (e) => e.site.name, name: (e) => e.site.layers[e.row] * 1e7 + (e.index ?? -1),
    label: (e) => e.col, size: (e) => Math.abs(e.value) }[at.sort] ?? ((e) => e[at.sort]);
  const order = (a, b) => { // what has no number comes last, either way
    const [x, y] = [key(a), key(b)];
    if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
    return (x < y ? -1 : x > y ? 1 : 0) * (at.down ? -1 : 1);
  };
  rows.sort(order);
  el("count").textContent = `${Math.min(SHOWN, rows.length).toLocaleString("en")} of ${rows.length.toLocaleString("en")} rows` +
    (rows.length < total ? ` (of ${total.toLocaleString("en")})` : "");
  const head = node("tr");
  for (const [sort, title] of HEAD) {
    const th = node("th", undefined, ["value", "size", "low", "high", "q"].includes(sort) ? { class: "number" } : {});
    if (!sort) th.append(node("span", "joint"));
    else {
      const button = node("button", title + (at.sort === sort ? (at.down ? " \u2193" : " \u2191") : ""), { type: "button", "data-sort": sort });
      button.onclick = () => {
        at.down = at.sort === sort ? !at.down : !["site", "name", "label", "q"].includes(sort);
        at.sort = sort;
        drawRanking();
        document.querySelector(`#ranking [data-sort="${sort}"]`).focus();
      };
      th.setAttribute("aria-sort", at.sort === sort ? (at.down ? "descending" : "ascending") : "none");
      th.append(button);
    }
    head.append(th);
  }
  document.querySelector("#ranking thead").replaceChildren(head);
  document.querySelector("#ranking tbody").replaceChildren(...rows.slice(0, SHOWN).map(rankingRow));
}

function rankingRow(e) {
  const tr = node("tr");
  if (accident(e) || below(e, e.site)) tr.className = "accident";
  const box = node("input", undefined, { type: "checkbox", "aria-label": `Add ${e.site.name} ${e.name} at ${e.label}` });
  const [key, patch] = patchOf(e);
  box.checked = chosen.has(key);
  box.onchange = () => { if (box.checked) chosen.set(key, patch); else chosen.delete(key); drawCode(); };
  const go = node("button", e.name, { type: "button" });
  go.onclick = () => {
    at.site = content.sites.indexOf(e.site);
    el("site").value = at.site;
    Object.assign(at, { row: e.row, col: e.col });
    draw();
    el("map").scrollIntoView({ block: "nearest" });
  };
  const cells = [box, e.site.name, go, e.label, told(e.value), told(Math.abs(e.value)),
    ...["low", "high", "q"].map((name) => (Number.isNaN(e[name] ?? NaN) ? "" : told(e[name])))];
  cells.forEach((cell, i) => {
    const td = node("td", undefined, i > 3 ? { class: "number" } : {});
    td.append(cell);
    tr.append(td);
  });
  return tr;
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

function drawPrompts() {
  const box = el("prompts");
  box.replaceChildren();
  if (at.pair < 0) return;
  const pair = content.pairs[at.pair];
  for (const [name, other, answer] of [["clean", "corrupted", 0], ["corrupted", "clean", 1]]) {
    const line = node("div");
    line.append(node("b", `${name}: `));
    pair[name].forEach((token, i) => line.append(token === pair[other][i] ? token : node("mark", token)));
    line.append(node("b", " \u2192 "), pair.answers[answer]);
    box.append(line);
  }
}

function draw() {
  el("equation").textContent = `${at.metric} = ${metric().equation}`;
  drawPrompts();
  drawCell(drawMap());
  drawRanking();
  drawCode();
}

// --- what the reader does ------------------------------------------------------------------------------------

async function copy(text, what) {
  try { await navigator.clipboard.writeText(text); } catch { // where the browser does not let a file do so
    const area = node("textarea", undefined, { "aria-hidden": "true" });
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  el("copied").textContent = `${what} copied.`;
}

function options(select, rows, value) {
  select.replaceChildren(...rows.map(([v, text]) => node("option", text, { value: v })));
  select.value = value;
}

function start() {
  const about = content.about;
  document.documentElement.dataset.theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  el("about").textContent = [about.model, `${content.n_pairs} pair${content.n_pairs > 1 ? "s" : ""}`, content.direction,
    about.source && `source ${about.source}`, about.precision, content.run].filter(Boolean).join(", ");
  document.title = `${content.run}: deltapatch explorer`;
  options(el("site"), content.sites.map((s, i) => [i, s.name]), 0);
  options(el("metric"), content.metrics.map((m) => [m.name, m.name]), at.metric);
  const name = (p) => p.clean.join("").trim().slice(-48);
  options(el("pair"), [[-1, `mean over ${content.n_pairs}`], ...content.pairs.map((p, i) => [i, `${i}: ${name(p)}`])], -1);
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
  el("notes").replaceChildren(...content.notes.map((note) => node("li", note)));
  el("copy-python").onclick = () => copy(drawCode(), "Python");
  el("copy-shell").onclick = () => copy(shellOf(drawCode()), "Shell command");
  el("clear").onclick = () => { chosen.clear(); drawRanking(); drawCode(); };
  el("theme").onclick = () => { document.documentElement.dataset.theme = dark() ? "light" : "dark"; draw(); };
  el("map").onkeydown = (event) => {
    const move = { ArrowUp: [1, 0], ArrowDown: [-1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!move) return;
    event.preventDefault();
    const g = grid(site());
    choose(Math.max(0, Math.min(g.cells.length - 1, at.row + move[0])), Math.max(0, Math.min(g.labels.length - 1, at.col + move[1])));
  };
  toStrongest();
  draw();
  // Not plotly's own click, which waits for its hover: a finger has none.
  el("map").addEventListener("click", (event) => {
    const box = document.querySelector("#map .nsewdrag").getBoundingClientRect(), g = grid(site());
    const col = Math.floor((event.clientX - box.left) / box.width * g.labels.length);
    const row = Math.floor((box.bottom - event.clientY) / box.height * g.cells.length);
    if (row in g.cells && col in g.labels) choose(row, col);
  });
}

function toStrongest() {
  const cells = grid(site()).cells.flatMap((row, r) => row.map((cell, c) => [Math.abs(cell.value) || 0, r, c]));
  [, at.row, at.col] = cells.reduce((a, b) => (b[0] > a[0] ? b : a), [0, 0, 0]);
}

function choose(row, col) {
  Object.assign(at, { row, col });
  Plotly.relayout("map", { "shapes[0].x0": col - 0.5, "shapes[0].x1": col + 0.5, "shapes[0].y0": row - 0.5, "shapes[0].y1": row + 0.5 });
  drawCell(grid(site()));
  drawCode();
}

start();
