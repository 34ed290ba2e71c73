"use strict";
// The Python and the shell command of patches and circuits. JSON's strings are Python's; nothing of a run is code.

const modelOf = (about) => `model = dp.load_model(${JSON.stringify(String(about.model ?? "MODEL"))}` +
  ["revision", "adapter"].filter((k) => about[k]).map((k) => `, ${k}=${JSON.stringify(String(about[k]))}`).join("") + ")";

function optionsOf(content) { // of `run`
  const about = content.about, options = [`direction=${JSON.stringify(content.direction)}`];
  if (about.source) options.push(`source=${JSON.stringify(String(about.source))}`);
  if (about.readout !== undefined && about.readout !== "last") options.push(`readout=${JSON.stringify(about.readout)}`);
  if (Number.isInteger(about.seed) && about.seed) options.push(`seed=${about.seed}`);
  if (typeof about.noise_scale === "number") options.push(`noise_scale=${about.noise_scale}`);
  return options.join(", ");
}

const together = (content) => [
  "",
  `together = [dp.Intervention(i, patches(i)) for i in ${content.pair < 0 ? "range(len(pairs))" : `[${content.pair}]`}]`,
  `outcome = dp.run(model, pairs, together, ${optionsOf(content)})`,
  `print(outcome.values(${JSON.stringify(content.metric)}))  # [intervention]`,
];

function pythonOf(content, patches) {
  const patch = ([site, layer, place, index]) => site.endsWith(".along")
    ? `dp.Patch(${JSON.stringify(site.slice(0, -6))}, ${layer}, ${place}, along=directions[${JSON.stringify(site.slice(0, -6))}][${index}])`
    : `dp.Patch(${JSON.stringify(site)}, ${layer}, ${place}${index === null ? "" : `, ${index}`})`;
  const lines = [
    "import deltapatch as dp",
    "",
    modelOf(content.about),
    `effects = dp.load_effects(${JSON.stringify(content.run)})`,
    "pairs = effects.pairs",
    ...(patches.some(([site]) => site.endsWith(".along")) ? ["directions = ...  # those that the sweep was given"] : []),
    "",
    "def patches(pair):",
    "    return [",
  ];
  for (const [site, layer, places, index] of patches) {
    if (!Array.isArray(places)) lines.push(`        ${patch([site, layer, JSON.stringify(places), index])},`);
    else {
      const all = JSON.stringify(places).replaceAll("null", "None");
      lines.push(`        *(${patch([site, layer, "place", index])} for place in ${all}[pair]),`);
    }
  }
  return lines.concat("    ]", together(content)).join("\n") + "\n";
}

// Edges as patches that some receivers alone see: [site, layer, index, positions or null for all, receivers].
function pythonOfEdges(content, patches) {
  const lines = [
    "import deltapatch as dp",
    "",
    modelOf(content.about),
    `edges = dp.load_edges(${JSON.stringify(content.run)})`,
    "pairs = edges.pairs",
    "",
    "def patches(pair):",
    "    everywhere = range(len(pairs[pair].clean))",
    "    return [",
  ];
  for (const [site, layer, index, place, into] of patches) {
    const at = place === null ? "place" : JSON.stringify(place);
    const patch = `dp.Patch(${JSON.stringify(site)}, ${layer}, ${at}${index === null ? "" : `, ${index}`}, into=${JSON.stringify(into)})`;
    lines.push(place === null ? `        *(${patch} for place in everywhere),` : `        ${patch},`);
  }
  if (patches.every((patch) => patch[3] !== null)) lines.splice(7, 1); // no edge is at all positions
  return lines.concat("    ]", together(content)).join("\n") + "\n";
}

// The circuit of the n largest edges, and what it keeps of the model.
function pythonOfCircuit(content, n, pruned) {
  const about = content.about, metric = JSON.stringify(content.metric), first = content.effect === content.effects[0];
  const prune = pruned ? "" : ", prune=False";
  const lines = [
    ...(content.pair < 0 && first ? [] : ["import numpy as np"]),
    "import deltapatch as dp",
    "",
    modelOf(about),
    `edges = dp.load_edges(${JSON.stringify(content.run)})`,
  ];
  if (content.pair < 0 && first) lines.push(`circuit = dp.Circuit.top(edges, ${n}, ${metric}${prune})`);
  else {
    const effect = JSON.stringify(content.effect), sign = content.towards < 0 ? "-" : "";
    lines.push(
      content.pair < 0 ? `scores = edges.by_node(edges.mean(${metric}, ${effect}))`
        : `scores = edges.values(${metric}, ${effect})[${content.pair}]`,
      'd_model = int(edges.meta.get("d_model") or 0)',
      `circuit = dp.Circuit.of_scores(edges.grid.nodes, ${sign}np.nan_to_num(scores), d_model, ${n}${prune})`,
    );
  }
  const source = ["zero", "mean"].includes(about.source) ? `, source=${JSON.stringify(about.source)}` : "";
  return lines.concat([
    `print(dp.faithfulness(model, edges.pairs, circuit, metric=${metric}${source}))  # 1: all of the model`,
    'circuit.save("circuit.json")',
  ]).join("\n") + "\n";
}

const quoted = (text) => `'${String(text).replaceAll("'", "'\\''")}'`; // for a shell: nothing inside is looked at

// The same circuit by the command, where that can say it; null where it cannot.
function circuitCommand(content, n, pruned) {
  if (content.pair >= 0 || content.effect !== content.effects[0] || !pruned || content.about.revision || content.about.adapter) return null;
  const source = ["zero", "mean"].includes(content.about.source) ? ` --source ${content.about.source}` : "";
  return `deltapatch circuit ${quoted(content.run)} --edges ${n} --metric ${content.metric}${source} --out circuit.json\n`;
}

function shellOf(python) {
  return `python - <<'END_OF_PATCH'\n${python}END_OF_PATCH\n`; // strings have no line of their own: JSON escapes them
}
