// The page of a sweep of edges: what is chosen (`at`), and how it is drawn.

const at = { effect: content.effects[0], metric: content.default, pair: -1, position: -1, heads: "layer",
  row: 0, col: 0, sort: "size", down: true, drawn: 40, connected: true, make: "circuit" };
const KINDS = { q: "queries", k: "keys", v: "values", m: "MLP", l: "logits" };
const BENT = 50; // of the largest effect, up to which the scale is linear: a few edges are far larger than all others

const kindOf = (receiver) => (receiver.endsWith(">") ? receiver.at(-2) : receiver[0]);
const ownerOf = (receiver) => receiver.split("<")[0];
const found = () => content.found[at.effect][at.metric];
const single = content.positions.length > 1 || content.positions[0] !== "together";

// --- numbers -------------------------------------------------------------------------------------------------

function entries() { // every listed edge, at every position
  const key = `${at.effect} ${at.metric} ${at.pair} ${at.position}`;
  if (numbers.has(key)) return numbers.get(key);
  const f = found(), [sender, receiver, position] = [ints(f.sender), ints(f.receiver), ints(f.position)];
  const [mean, low, high, q] = ["mean", "low", "high", "q"].map((name) => floats(f[name])), out = [];
  const each = at.pair < 0 ? null : floats(f.pairs).subarray(at.pair * sender.length);
  for (let i = 0; i < sender.length; i++) {
    if (at.position >= 0 && position[i] !== at.position) continue;
    const from = content.senders[sender[i]], to = content.receivers[receiver[i]], kind = kindOf(to);
    const value = each ? each[i] : mean[i], place = content.positions[position[i]];
    if (Number.isNaN(value)) continue;
    out.push({ sender: from, receiver: to, s: sender[i], r: receiver[i], place, kind, value, entry: i,
      size: Math.abs(value), low: each ? NaN : low[i], high: each ? NaN : high[i], q: each ? NaN : q[i],
      text: `${from} ${to} ${KINDS[kind]}${single ? ` ${place}` : ""}`.toLowerCase() });
  }
  out.sort((a, b) => b.size - a.size);
  numbers.set(key, out);
  return out;
}

const below = (e) => found().floor !== null && Math.abs(e.value) <= found().floor;
const nameOf = (e) => `${e.sender} \u2192 ${e.receiver}${single ? ` at ${e.place}` : ""}`;
const group = (name) => (at.heads === "layer" ? name.replace(/\.(h|kv)\d+/, "") : name);

function grid() { // rows are senders, columns receivers, by layer or each by itself; of a cell its strongest edge
  const key = `grid ${at.effect} ${at.metric} ${at.pair} ${at.position} ${at.heads}`;
  if (numbers.has(key)) return numbers.get(key);
  const [rows, cols] = [content.senders, content.receivers].map((names) => [...new Set(names.map(group))]);
  const [row, col] = [rows, cols].map((names) => new Map(names.map((name, i) => [name, i])));
  const cells = rows.map(() => cols.map(() => null));
  for (const e of entries()) cells[row.get(group(e.sender))][col.get(group(e.receiver))] ??= e; // the strongest comes first
  const made = { rows, cols, row, col, cells };
  numbers.set(key, made);
  return made;
}

// --- heatmap -------------------------------------------------------------------------------------------------

function drawMap() {
  const g = grid(), m = metric();
  at.row = Math.min(at.row, g.rows.length - 1);
  at.col = Math.min(at.col, g.cols.length - 1);
  const cells = g.cells.flat().filter(Boolean);
  const most = cells.reduce((a, e) => Math.max(a, e.size), 0) || 1, bend = (x) => Math.asinh(x / most * BENT);
  const x = g.cols.map((_, i) => i), y = g.rows.map((_, i) => i);
  const width = el("map").clientWidth, narrow = width < 500, height = Math.max(260, Math.min(640, 14 * g.rows.length + 170));
  const wide = Math.min((width - 60) / g.cols.length, (height - 130) / g.rows.length), marked = wide >= 6;
  const marks = { x: [], y: [], symbol: [] };
  if (marked) {
    g.cells.forEach((line, r) => line.forEach((e, c) => {
      const symbol = e && (below(e) ? "line-ew-open" : accident(e) ? "x-thin-open" : null);
      if (symbol) { marks.x.push(c); marks.y.push(r); marks.symbol.push(symbol); }
    }));
  }
  const ticks = (names, room) => names.map((_, i) => i).filter((i) => i % Math.ceil(names.length / room) === 0);
  const shown = { x: ticks(g.cols, narrow ? 16 : 48), y: ticks(g.rows, 24) };
  const bar = m.from_zero ? [0, most / 10, most] : [-most, -most / 10, 0, most / 10, most];
  Plotly.react("map", [
    { type: "heatmap", z: g.cells.map((line) => line.map((e) => (e ? bend(e.value) : null))), x, y,
      colorscale: scale(m.from_zero), zmin: m.from_zero ? 0 : -bend(most), zmax: bend(most),
      xgap: marked ? 1 : 0, ygap: marked ? 1 : 0, hoverinfo: "text", hoverongaps: false,
      text: g.cells.map((line, r) => line.map((e, c) => plain(e ? `${g.rows[r]} \u2192 ${g.cols[c]}: ${told(e.value)}` +
        (at.heads === "layer" ? ` (${nameOf(e)})` : "") : ""))),
      colorbar: { thickness: 12, outlinewidth: 0, len: 0.94, orientation: "h", y: 1.02, yanchor: "bottom", xpad: 0,
        title: { text: plain(m.label) + (narrow ? "" : " (asinh scale)"), side: "top", font: { size: narrow ? 11 : 12 } },
        tickvals: bar.map(bend), ticktext: bar.map(told) } },
    { type: "scatter", mode: "markers", x: marks.x, y: marks.y, hoverinfo: "skip",
      marker: { symbol: marks.symbol, size: Math.min(7, wide - 2), color: colour("--quiet"), line: { width: 1 } } },
  ], layout({ height, hovermode: "closest", margin: { l: 44, r: 8, t: 56, b: 60 },
    xaxis: { title: { text: "receiver" }, tickvals: shown.x, ticktext: shown.x.map((i) => plain(g.cols[i])), tickangle: -90,
      tickfont: { size: 10 }, showgrid: false, zeroline: false, range: [-0.5, g.cols.length - 0.5] },
    yaxis: { title: { text: "sender" }, tickvals: shown.y, ticktext: shown.y.map((i) => plain(g.rows[i])),
      tickfont: { size: 10 }, showgrid: false, zeroline: false, range: [-0.5, g.rows.length - 0.5] },
    shapes: [{ type: "rect", ...at0(), line: { color: colour("--fore"), width: 2.5 } }] }), config);
  el("map-title").textContent = `${at.effect === "direct" ? "Direct" : "Total"} effects, ${over()}: the strongest edge of each cell`;
  const floor = found().floor;
  el("legend").textContent = [
    !marked ? "too many cells to mark in them what is not significant" : cells.some(accident)
      ? `\u00d7: not significant (false-discovery rate above ${content.rate})` : "",
    floor === null ? "noise floor not measured" : `${marked ? "\u2212: at or below the noise floor" : "noise floor"} (${told(floor)})`,
    cells.length < g.cells.flat().length ? "no colour: no edge" : "",
  ].filter(Boolean).join("; ");
}

const over = () => (at.pair < 0 ? `mean over ${content.n_pairs} pair${content.n_pairs > 1 ? "s" : ""}` : `pair ${at.pair}`);
const at0 = () => ({ x0: at.col - 0.5, x1: at.col + 0.5, y0: at.row - 0.5, y1: at.row + 0.5 });

function drawCell() {
  const g = grid(), e = g.cells[at.row]?.[at.col], row = g.rows[at.row], col = g.cols[at.col];
  el("cell-title").textContent = `${row} \u2192 ${col}`;
  el("cell-value").textContent = e ? `${nameOf(e)}: ${told(e.value)}${spread(e, below(e))}` : "There is no such edge in this run.";
  const here = entries().filter((o) => group(o.sender) === row && group(o.receiver) === col).slice(0, 16).reverse();
  if (here.length > 1) {
    bars(here.map(nameOf), here, at.pair < 0);
    el("inside").textContent = at.pair < 0 && content.n_pairs > 1
      ? `Strongest first, mean and 95% interval over pairs${here.some(accident) ? "; hollow: not significant" : ""}.` : "Strongest first.";
    return;
  }
  const width = ints(found().sender).length, all = floats(found().pairs);
  const each = !e ? [] : content.pairs.map((_, p) => ({ p, value: all[p * width + e.entry], low: NaN, high: NaN, q: NaN }))
    .filter((o) => !Number.isNaN(o.value)).sort((a, b) => a.value - b.value);
  if (each.length > 1) bars(each.map((o) => `pair ${o.p}`), each, false);
  else { Plotly.purge("cell"); el("cell").style.minHeight = "0"; }
  el("inside").textContent = each.length > 1 ? "Pair by pair." : "";
}

// --- graph ---------------------------------------------------------------------------------------------------

function drawnEdges() { // the largest, at most one for each sender and receiver; perhaps without those that reach nothing
  const seenEdges = new Set(), out = [];
  for (const e of entries()) {
    const key = `${e.sender} ${e.receiver}`;
    if (seenEdges.has(key)) continue;
    if (out.length === at.drawn) break;
    seenEdges.add(key);
    out.push(e);
  }
  if (!at.connected) return out;
  for (let kept = out; ;) { // as `Circuit.pruned`
    const reached = new Set(["input", ...kept.map((e) => ownerOf(e.receiver))]);
    const sends = new Set(["logits", ...kept.map((e) => e.sender)]);
    const left = kept.filter((e) => reached.has(e.sender) && sends.has(ownerOf(e.receiver)));
    if (left.length === kept.length) return left;
    kept = left;
  }
}

const STEP = { x: 78, y: 74 };

function places(names) { // from the input at the bottom to the logits at the top; layers that have none take no room
  const parts = [...names].map((name) => [name, /^([am])(\d+)(?:\.(?:h|kv)(\d+))?$/.exec(name)]).filter(([, m]) => m);
  const level = (m) => 2 * Number(m[2]) + (m[1] === "m" && !content.parallel ? 1 : 0);
  const levels = [...new Set(parts.map(([, m]) => level(m)))].sort((a, b) => a - b);
  const heads = [...new Set(parts.filter(([, m]) => m[1] === "a").map(([, m]) => Number(m[3])))].sort((a, b) => a - b);
  const columns = heads.length + 1, out = new Map(), top = levels.length + 1;
  for (const [name, m] of parts) out.set(name, [m[1] === "a" ? heads.indexOf(Number(m[3])) : heads.length, top - 1 - levels.indexOf(level(m))]);
  const middle = Math.max(0, (heads.length - 1) / 2);
  if (names.has("input")) out.set("input", [middle, top]);
  if (names.has("logits")) out.set("logits", [middle, 0]);
  return { where: out, columns, rows: top + 1 };
}

function svg(tag, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function arrow(from, to, kind) { // a path that bends by what is read, so that those between the same nodes lie apart
  const bend = { q: -0.16, k: 0, v: 0.16 }[kind] ?? 0.08;
  const [dx, dy] = [to[0] - from[0], to[1] - from[1]], long = Math.hypot(dx, dy) || 1;
  const start = [from[0] + dx / long * 14, from[1] + dy / long * 14], end = [to[0] - dx / long * 16, to[1] - dy / long * 16];
  const middle = [(from[0] + to[0]) / 2 - dy * bend, (from[1] + to[1]) / 2 + dx * bend];
  const t = { q: 0.52, k: 0.62, v: 0.72 }[kind] ?? 0.6, on = [0, 1].map((i) => (1 - t) ** 2 * start[i] + 2 * t * (1 - t) * middle[i] + t * t * end[i]);
  return { d: `M${start} Q${middle} ${end}`, on };
}

function drawGraph() {
  const edges = drawnEdges(), m = metric(), made = [];
  const { where, columns, rows } = places(new Set(edges.flatMap((e) => [e.sender, ownerOf(e.receiver)])));
  const width = columns * STEP.x, height = rows * STEP.y;
  const point = (name) => { const [x, y] = where.get(name); return [(x + 0.5) * STEP.x, (y + 0.5) * STEP.y]; };
  const most = edges.reduce((a, e) => Math.max(a, e.size), 0) || 1;
  const heads = svg("defs", {});
  for (const kind of Object.keys(KINDS)) {
    const head = svg("marker", { id: `head-${kind}`, viewBox: "0 0 6 6", refX: 5, refY: 3, markerWidth: 7, markerHeight: 7, markerUnits: "userSpaceOnUse", orient: "auto" });
    head.append(svg("path", { d: "M0 0L6 3L0 6z", class: `fill-${kind}` }));
    heads.append(head);
  }
  made.push(heads);
  for (const e of [...edges].reverse()) { // the largest are drawn last
    const { d, on } = arrow(point(e.sender), point(ownerOf(e.receiver)), e.kind), share = e.size / most;
    const against = e.value * content.towards[at.metric] < 0;
    const path = svg("path", { d, class: `edge line-${e.kind}`, "stroke-width": (0.8 + 4.2 * share).toFixed(2), "stroke-opacity": (0.4 + 0.6 * share).toFixed(2),
      "marker-end": `url(#head-${e.kind})`, ...(against ? { "stroke-dasharray": "6 4" } : {}) });
    path.append(svg("title", {}, `${nameOf(e)}: ${told(e.value)}`));
    path.onclick = () => goTo(e);
    made.push(path);
    if ("qkv".includes(e.kind)) made.push(svg("text", { x: on[0], y: on[1] + 3, class: `letter fill-${e.kind}` }, e.kind));
  }
  for (const name of where.keys()) {
    const [x, y] = point(name), wide = 10 + 7 * name.length;
    made.push(svg("rect", { x: x - wide / 2, y: y - 11, width: wide, height: 22, rx: 4, class: "node" }), svg("text", { x, y: y + 4, class: "name" }, name));
  }
  const graph = el("graph");
  graph.replaceChildren(...(edges.length ? made : []));
  graph.setAttribute("viewBox", `0 0 ${width} ${height}`);
  graph.setAttribute("width", edges.length ? width : 0);
  graph.setAttribute("height", edges.length ? height : 0);
  graph.setAttribute("aria-label", `Graph of ${edges.length} edges; the ranking below lists them.`);
  el("graph-title").textContent = `The largest edges, ${at.effect} effects, ${over()}`;
  const size = edges.length ? `; the widest is ${told(most)}` : "";
  el("graph-legend").textContent = `${edges.length} of the ${at.drawn} largest edges ${at.connected ? "lead from the input to the logits" : "are drawn"}${size}. ` +
    (m.from_zero ? "" : "Dashed: against the answer that the others speak for. ") + "A click shows an edge above.";
}

function drawReads() { // the legend: colour and letter
  el("reads").replaceChildren(...Object.entries(KINDS).map(([kind, name]) => {
    const item = node("span", `${"qkv".includes(kind) ? `${kind}: ` : ""}${name}`, { class: `read read-${kind}` });
    return item;
  }));
}

function goTo(e) {
  const g = grid();
  choose(g.row.get(group(e.sender)), g.col.get(group(e.receiver)));
  el("map").scrollIntoView({ block: "nearest" });
}

// --- ranking and code ----------------------------------------------------------------------------------------

const HEAD = [["", ""], ["s", "sender"], ["r", "receiver"], ["kind", "reads"], ...(single ? [["place", "position"]] : []),
  ["value", "effect"], ["size", "magnitude"], ["low", "low"], ["high", "high"], ["q", "q"]];
const TEXTS = ["s", "r", "kind", "place"];

function drawRanking() {
  drawTable(HEAD, entries(), { key: (e) => e[at.sort], row: rankingRow, again: drawRanking, words: TEXTS });
}

function rankingRow(e) {
  const go = node("button", e.sender, { type: "button" });
  go.onclick = () => goTo(e);
  const cells = [go, e.receiver, KINDS[e.kind], ...(single ? [String(e.place)] : []), told(e.value), told(e.size),
    ...["low", "high", "q"].map((name) => (Number.isNaN(e[name]) ? "" : told(e[name])))];
  const patch = { sender: e.sender, receiver: e.receiver, place: single ? e.place : null };
  return tableRow(nameOf(e), accident(e) || below(e), JSON.stringify(patch), patch, cells, single ? 4 : 3);
}

function patchesOf(edges) { // those of one sender and place are one patch into several receivers
  const merged = new Map();
  for (const { sender, receiver, place } of edges) {
    const key = JSON.stringify([sender, place]);
    if (!merged.has(key)) merged.set(key, { sender, place, into: [] });
    merged.get(key).into.push(...readers(receiver));
  }
  return [...merged.values()].map(({ sender, place, into }) => {
    const [, kind, layer, head] = /^([am])(\d+)(?:\.h(\d+))?$/.exec(sender) ?? [];
    if (!kind) return ["resid_pre", 0, null, place, into];
    return kind === "m" ? ["mlp_out", Number(layer), null, place, into] : ["z", Number(layer), Number(head), place, into];
  });
}

function readers(receiver) { // patches know query heads: a key-value head is read by those of its group
  const shared = /^(a\d+)\.kv(\d+)(<.>)$/.exec(receiver);
  if (!shared) return [receiver];
  return Array.from({ length: content.group }, (_, i) => `${shared[1]}.h${shared[2] * content.group + i}${shared[3]}`);
}

const asked = () => ({ ...content, metric: at.metric, pair: at.pair, effect: at.effect, towards: content.towards[at.metric] });
const placed = (e) => ({ sender: e.sender, receiver: e.receiver, place: single ? e.place : null });

function drawCode() {
  const edges = drawnEdges(), circuit = at.make === "circuit" && content.whole, pairs = at.pair < 0 ? "every pair" : `pair ${at.pair}`;
  el("joint").textContent = circuit
    ? `The circuit of the ${edges.length} edges that are drawn${chosen.size ? "; the ticked ones make a joint patch" : ""}.`
    : `${chosen.size || edges.length} edge${(chosen.size || edges.length) > 1 ? "s" : ""}, ${chosen.size ? "ticked in the ranking" : "those that are drawn"}, patched together in ${pairs}` +
      `: their total effect. ${chosen.size ? "" : "Tick rows of the ranking to patch others."}`;
  const code = circuit ? pythonOfCircuit(asked(), at.drawn, at.connected)
    : pythonOfEdges(asked(), patchesOf(chosen.size ? [...chosen.values()] : edges.map(placed)));
  el("code").textContent = code;
  return code;
}

function shellCode() {
  const code = drawCode(), circuit = at.make === "circuit" && content.whole;
  return (circuit && circuitCommand(asked(), at.drawn, at.connected)) || shellOf(code);
}

function draw() {
  el("equation").textContent = `${at.metric} = ${metric().equation}`;
  drawPrompts();
  drawMap();
  drawCell();
  drawGraph();
  drawRanking();
  drawCode();
}

// --- what the reader does ------------------------------------------------------------------------------------

function start() {
  begin();
  options(el("effect"), content.effects.map((name) => [name, name]), at.effect);
  options(el("position"), [[-1, "the strongest of all"], ...content.positions.map((p, i) => [i, String(p)])], -1);
  options(el("heads"), [["layer", "of a layer together"], ["each", "each by itself"]], "layer");
  options(el("make"), [...(content.whole ? [["circuit", "the circuit that is drawn"]] : []), ["patch", "a joint patch"]], content.whole ? "circuit" : "patch");
  el("effect").parentElement.hidden = content.effects.length < 2;
  el("position").parentElement.hidden = !single;
  el("heads").parentElement.hidden = content.senders.length > 150 || content.receivers.length > 150;
  el("only-found").parentElement.hidden = !floats(found().q).some((q) => !Number.isNaN(q));
  for (const id of ["effect", "metric", "pair", "position", "heads"]) {
    el(id).onchange = () => {
      at[id] = id === "pair" || id === "position" ? Number(el(id).value) : el(id).value;
      if (id === "heads") toStrongest();
      draw();
    };
  }
  const most = content.drawable;
  at.drawn = Math.min(at.drawn, most);
  at.connected = content.ends;
  el("connected").checked = at.connected;
  for (const id of ["drawn", "drawn-number"]) {
    el(id).max = most;
    el(id).value = at.drawn;
    el(id).oninput = () => {
      const asked = Math.round(Number(el(id).value));
      if (!(asked >= 1 && asked <= most)) return; // while a number is typed
      at.drawn = asked;
      for (const other of ["drawn", "drawn-number"]) if (other !== id) el(other).value = asked;
      drawGraph();
      drawCode();
    };
  }
  el("connected").onchange = () => { at.connected = el("connected").checked; drawGraph(); drawCode(); };
  el("make").onchange = () => { at.make = el("make").value; drawCode(); };
  for (const id of ["search", "only-found"]) el(id).oninput = drawRanking;
  el("copy-shell").onclick = () => copy(shellCode(), "Shell command");
  drawReads();
  toStrongest();
  draw();
  choosable(() => { const g = grid(); return [g.rows.length, g.cols.length]; }, choose);
}

function toStrongest() {
  const [e] = entries(), g = grid();
  if (e) Object.assign(at, { row: g.row.get(group(e.sender)), col: g.col.get(group(e.receiver)) });
}

function choose(row, col) {
  Object.assign(at, { row, col });
  Plotly.relayout("map", frame(row, col));
  drawCell();
}

start();
