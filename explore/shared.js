"use strict";
// What both pages share: numbers, texts, charts, the table that is sorted and searched, copying.

const content = JSON.parse(document.getElementById("content").textContent);
const el = (id) => document.getElementById(id);
const chosen = new Map(); // key -> what is ticked, of the joint patch
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
const metric = () => content.metrics.find((m) => m.name === at.metric);
const accident = (e) => e.q > content.rate;
const dark = () => document.documentElement.dataset.theme === "dark";
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function node(tag, text, attributes = {}) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

// Where a value lies, in words: its interval, its rate, the noise floor.
const spread = (e, floor) => (Number.isNaN(e.low ?? NaN) ? "" : `, 95% interval ${told(e.low)} to ${told(e.high)}`) +
  (Number.isNaN(e.q) ? "" : `, q ${told(e.q)}${accident(e) ? " (not significant)" : ""}`) +
  (floor ? ", at or below the noise floor" : "");

// --- charts -------------------------------------------------------------------------------------------------

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

// --- table --------------------------------------------------------------------------------------------------

// Rows that match the search, sorted by the column that is chosen; what has no number comes last, either way.
function drawTable(head, rows, { key, row, again, words: texts }) {
  const words = el("search").value.toLowerCase().split(/\s+/).filter(Boolean), total = rows.length;
  const found = rows.filter((e) => words.every((w) => e.text.includes(w)) && (!el("only-found").checked || e.q <= content.rate));
  found.sort((a, b) => {
    const [x, y] = [key(a), key(b)];
    if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
    return (x < y ? -1 : x > y ? 1 : 0) * (at.down ? -1 : 1);
  });
  const n = (x) => x.toLocaleString("en");
  el("count").textContent = `${n(Math.min(SHOWN, found.length))} of ${n(found.length)} rows` +
    (found.length < total ? ` (of ${n(total)})` : "");
  const top = node("tr");
  for (const [sort, title] of head) {
    const th = node("th", undefined, texts.includes(sort) || !sort ? {} : { class: "number" });
    if (!sort) th.append(node("span", "joint"));
    else {
      const button = node("button", title + (at.sort === sort ? (at.down ? " \u2193" : " \u2191") : ""), { type: "button", "data-sort": sort });
      button.onclick = () => {
        at.down = at.sort === sort ? !at.down : !texts.includes(sort) && sort !== "q";
        at.sort = sort;
        again();
        document.querySelector(`#ranking [data-sort="${sort}"]`).focus();
      };
      th.setAttribute("aria-sort", at.sort === sort ? (at.down ? "descending" : "ascending") : "none");
      th.append(button);
    }
    top.append(th);
  }
  document.querySelector("#ranking thead").replaceChildren(top);
  document.querySelector("#ranking tbody").replaceChildren(...found.slice(0, SHOWN).map(row));
}

// A row: whether it is ticked, and its cells, the first `texts` of which are no numbers.
function tableRow(name, quiet, key, patch, cells, texts) {
  const tr = node("tr");
  if (quiet) tr.className = "accident";
  const box = node("input", undefined, { type: "checkbox", "aria-label": `Add ${name}` });
  box.checked = chosen.has(key);
  box.onchange = () => { if (box.checked) chosen.set(key, patch); else chosen.delete(key); drawCode(); };
  [box, ...cells].forEach((cell, i) => {
    const td = node("td", undefined, i > texts ? { class: "number" } : {});
    td.append(cell);
    tr.append(td);
  });
  return tr;
}

function drawPrompts() {
  const box = el("prompts");
  box.replaceChildren();
  if (at.pair < 0) return;
  const pair = content.pairs[at.pair];
  for (const [name, which] of [["clean", 0], ["corrupted", 1]]) {
    const line = node("div");
    line.append(node("b", `${name}: `));
    const changed = new Set(pair.changed[which]);
    pair[name].forEach((token, i) => line.append(changed.has(i) ? node("mark", token) : token));
    line.append(node("b", " \u2192 "), pair.answers[which]);
    box.append(line);
  }
}

// --- what the reader does -----------------------------------------------------------------------------------

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

function begin() { // what stands above and below both pages, and what copies
  const about = content.about;
  document.documentElement.dataset.theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  el("about").textContent = [about.model, `${content.n_pairs} pair${content.n_pairs > 1 ? "s" : ""}`, content.direction,
    about.source && `source ${about.source}`, about.precision, content.run].filter(Boolean).join(", ");
  document.title = `${content.run}: deltapatch explorer`;
  options(el("metric"), content.metrics.map((m) => [m.name, m.name]), at.metric);
  const name = (p) => p.clean.join("").trim().slice(-48);
  options(el("pair"), [[-1, `mean over ${content.n_pairs}`], ...content.pairs.map((p, i) => [i, `${i}: ${name(p)}`])], -1);
  el("notes").replaceChildren(...content.notes.map((note) => node("li", note)));
  el("copy-python").onclick = () => copy(drawCode(), "Python");
  el("clear").onclick = () => { chosen.clear(); drawRanking(); drawCode(); };
  el("theme").onclick = () => { document.documentElement.dataset.theme = dark() ? "light" : "dark"; draw(); };
}

// A heatmap whose cells are chosen by a click or the arrow keys; `size` gives its rows and columns.
function choosable(size, choose) {
  el("map").onkeydown = (event) => {
    const move = { ArrowUp: [1, 0], ArrowDown: [-1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!move) return;
    event.preventDefault();
    const [rows, cols] = size();
    choose(Math.max(0, Math.min(rows - 1, at.row + move[0])), Math.max(0, Math.min(cols - 1, at.col + move[1])));
  };
  // Not plotly's own click, which waits for its hover: a finger has none.
  el("map").addEventListener("click", (event) => {
    const box = document.querySelector("#map .nsewdrag").getBoundingClientRect(), [rows, cols] = size();
    const col = Math.floor((event.clientX - box.left) / box.width * cols);
    const row = Math.floor((box.bottom - event.clientY) / box.height * rows);
    if (row >= 0 && row < rows && col >= 0 && col < cols) choose(row, col);
  });
}

function frame(row, col) { // the chosen cell's
  return { "shapes[0].x0": col - 0.5, "shapes[0].x1": col + 0.5, "shapes[0].y0": row - 0.5, "shapes[0].y1": row + 0.5 };
}
