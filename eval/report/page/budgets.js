// Budgets: tokens kept by layer and KV head, one tile a policy.
const cellName = (data, cell) => {
  const { model, task, length, mode } = data.cells[cell];
  const several = unique(data.cells.map((each) => each.model)).length > 1;
  return `${several ? `${model}: ` : ""}${task}, ${length} tokens, ${data.modes[mode] ?? mode}`;
};

const drawBudgets = (node, data, looks) => {
  const { maps, prompts } = data.kept;
  const tiles = html("div", { class: "tiles" });
  let redraw = () => {};
  const cells = chooser(
    "Prompt of",
    unique(maps.map((map) => map.cell)),
    (cell) => cellName(data, cell),
    (cell) => {
      redraw = () =>
        tiles.replaceChildren(
          ...maps
            .filter((map) => map.cell === cell && visible(looks[map.policy]))
            .sort((a, b) => a.policy - b.policy)
            .map((map) => budgetTile(looks[map.policy], map, prompts[map.prompt].count)),
        );
      redraw();
    },
  );
  whenFiltered(() => redraw());
  node.append(html("div", { class: "choosers" }, cells.node, heatKey("0", "largest")), tiles);
  cells.start();
};

const budgetTile = (look, { counts, layers, heads }, prompt) => {
  const width = 196;
  const bars = 26;
  const high = Math.max(4, Math.min(10, 48 / heads));
  const height = bars + 4 + heads * high;
  const wide = width / layers;
  const most = Math.max(1, ...counts.flat());
  const least = Math.min(...counts.flat());
  const totals = counts.map((row) => row.reduce((sum, count) => sum + count, 0));
  const total = Math.max(1, ...totals);
  const picture = drawing(width, height, `${look.text}: between ${least} and ${most} of ${prompt} tokens a head`);
  const targets = [];
  counts.forEach((row, layer) => {
    const tall = (bars * totals[layer]) / total;
    const x = layer * wide;
    picture.append(
      svg("rect", { class: "bar", x: x + 0.4, y: bars - tall, width: Math.max(0.6, wide - 0.8), height: tall }),
    );
    row.forEach((count, head) => {
      const y = bars + 4 + head * high;
      picture.append(svg("rect", { class: "box", x, y, width: wide, height: high, fill: heat(count / most) }));
      targets.push({
        x: x + wide / 2,
        y: y + high / 2,
        title: look.label,
        facts: () => [
          ["layer, head", `${layer}, ${head}`],
          ["kept", `${count} of ${prompt} tokens, ${percent(count / prompt)}`],
          ["the layer", `${totals[layer]} in ${heads} heads`],
        ],
      });
    });
  });
  explore(picture, targets, 40);
  return tile(look, picture, least === most ? `${most} tokens everywhere` : `${least} to ${most} tokens`);
};
