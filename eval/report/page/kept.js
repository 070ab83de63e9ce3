// What was kept of a prompt: all policies in strips, and the chosen one by layer and in the text.
const drawKept = (node, data, looks) => {
  const { maps, prompts } = data.kept;
  const strips = html("div", { class: "strips", role: "group", "aria-label": "Policies" });
  const about = html("p", { class: "note", role: "status" });
  const text = promptText();
  const image = layerImage(text.to, text.step);
  let map = null;
  let members = [];

  const show = () => {
    const prompt = prompts[map.prompt];
    const policy = looks[map.policy].label;
    const mean = map.counts.flat().reduce((sum, kept) => sum + kept, 0) / (map.layers * map.heads);
    about.textContent =
      `${policy} keeps ${digits(mean)} of ${prompt.count} tokens (${percent(mean / prompt.count)}), ` +
      `mean over ${map.layers} layers of ${map.heads} KV heads.`;
    for (const button of strips.children)
      button.setAttribute("aria-pressed", String(button.dataset.policy === String(map.policy)));
    image.show(prompt, map, policy);
    text.show(prompt, map);
  };
  const choose = (chosen) => {
    map = chosen;
    show();
  };
  const redraw = () => {
    const scrolled = strips.scrollTop;
    drawStrips(strips, members, looks, choose);
    strips.scrollTop = scrolled;
    show();
  };
  const cells = chooser(
    "Prompt of",
    unique(maps.map((each) => each.cell)),
    (cell) => cellName(data, cell),
    (cell) => {
      members = maps.filter((each) => each.cell === cell).sort((a, b) => a.policy - b.policy);
      // The policy chosen before, else one that let something go.
      const lets = (each) => each.counts.flat().some((count) => count < prompts[each.prompt].count);
      map = members.find((each) => map && each.policy === map.policy) ?? members.find(lets) ?? members[0];
      redraw();
    },
  );
  whenFiltered(redraw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  node.append(
    html("div", { class: "choosers" }, cells.node, heatKey("none", "all")),
    strips,
    about,
    image.node,
    ...text.nodes,
  );
  cells.start();
};
