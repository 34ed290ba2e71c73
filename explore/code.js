"use strict";
// The Python and the shell command of a joint patch. JSON's strings are Python's; nothing of a run is code.

function pythonOf(content, patches) {
  const patch = ([site, layer, place, index]) =>
    `dp.Patch(${JSON.stringify(site)}, ${layer}, ${place}${index === null ? "" : `, ${index}`})`;
  const about = content.about;
  const lines = [
    "import deltapatch as dp",
    "",
    `model = dp.load_model(${JSON.stringify(String(about.model ?? "MODEL"))}` +
      ["revision", "adapter"].filter((k) => about[k]).map((k) => `, ${k}=${JSON.stringify(String(about[k]))}`).join("") + ")",
    `effects = dp.load_effects(${JSON.stringify(content.run)})`,
    "pairs = effects.pairs",
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
  const options = [`direction=${JSON.stringify(content.direction)}`];
  if (about.source) options.push(`source=${JSON.stringify(String(about.source))}`);
  if (about.readout !== undefined && about.readout !== "last") options.push(`readout=${JSON.stringify(about.readout)}`);
  if (Number.isInteger(about.seed) && about.seed) options.push(`seed=${about.seed}`);
  if (typeof about.noise_scale === "number") options.push(`noise_scale=${about.noise_scale}`);
  return lines.concat([
    "    ]",
    "",
    `together = [dp.Intervention(i, patches(i)) for i in ${content.pair < 0 ? "range(len(pairs))" : `[${content.pair}]`}]`,
    `outcome = dp.run(model, pairs, together, ${options.join(", ")})`,
    `print(outcome.values(${JSON.stringify(content.metric)}))  # [intervention]`,
  ]).join("\n") + "\n";
}

function shellOf(python) {
  return `python - <<'END_OF_PATCH'\n${python}END_OF_PATCH\n`; // strings have no line of their own: JSON escapes them
}
