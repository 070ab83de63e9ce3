// Needle heat maps: one tile a policy, depth by length, its modes side by side.
const drawDepths = (node, data, looks) => {
  const models = unique(data.depths.map((each) => each.model));
  const tasks = [...grouped(data.depths, (each) => `${each.model}\n${each.task}`).values()];
  const tiles = html("div", { class: "tiles" });
  let redraw = () => {};
  const task = chooser(
    "Task",
    tasks,
    ([first]) => (models.length > 1 ? `${first.model}: ${first.task}` : first.task),
    (chosen) => {
      tiles.style.setProperty("--least", `${depthTileWidth(chosen)}px`);
      redraw = () =>
        tiles.replaceChildren(
          ...[...grouped(chosen, (each) => each.policy).values()]
            .sort(([a], [b]) => a.policy - b.policy)
            .filter(([first]) => visible(looks[first.policy]))
            .map((maps) =>
              depthTile(
                data,
                looks[maps[0].policy],
                maps.filter((each) => visibleMode(each.mode)),
                chosen,
              ),
            ),
        );
      redraw();
    },
  );
  whenFiltered(() => redraw());
  node.append(html("div", { class: "choosers" }, task.node, heatKey("0", "1")), tiles);
  task.start();
};

// Wide enough for boxes that can be told apart.
const depthTileWidth = (maps) => {
  const lengths = unique(maps.flatMap((map) => map.boxes.map(([length]) => length)));
  const modes = unique(maps.map((map) => map.mode));
  return Math.max(196, Math.min(420, 34 + modes.length * (Math.max(84, 12 * lengths.length) + 10)));
};

const depthTile = (data, look, maps, all) => {
  const lengths = unique(all.flatMap((each) => each.boxes.map(([length]) => length))).sort((a, b) => a - b);
  const left = 34;
  const gap = 10;
  const top = 13;
  const width = depthTileWidth(all);
  const bins = all[0].bins;
  const high = bins > 5 ? 10 : 16;
  const across = (width - left - gap * (maps.length - 1)) / Math.max(1, maps.length);
  const cell = Math.min(across / lengths.length, 34);
  const height = top + bins * high + 15;
  const picture = drawing(width, height, `${look.text}: score by depth and length`);
  const targets = [];
  picture.append(
    svg("text", { x: left - 4, y: top + 4, "text-anchor": "end" }, "0 %"),
    svg("text", { x: left - 4, y: top + bins * high, "text-anchor": "end" }, "100 %"),
  );
  maps.forEach((map, index) => {
    const from = left + index * (across + gap);
    picture.append(svg("text", { x: from, y: 8 }, data.modes[map.mode] ?? map.mode));
    const boxes = new Map(map.boxes.map((box) => [`${box[0]} ${box[1]}`, box]));
    lengths.forEach((length, column) => {
      const x = from + column * cell;
      // As many names of lengths as fit beneath the columns.
      if (column % Math.ceil(24 / cell) === 0)
        picture.append(svg("text", { x: x + cell / 2, y: height - 4, "text-anchor": "middle" }, tokens(length)));
      for (let bin = 0; bin < bins; bin += 1) {
        const box = boxes.get(`${length} ${bin}`);
        const y = top + bin * high;
        picture.append(
          svg("rect", {
            class: box ? "box" : "box empty",
            x,
            y,
            width: cell,
            height: high,
            ...(box ? { fill: heat(box[2]) } : {}),
          }),
        );
        if (!box) continue;
        const [, , mean, low, upper, count] = box;
        targets.push({
          x: x + cell / 2,
          y: y + high / 2,
          title: look.label,
          facts: () => [
            ["mode", data.modes[map.mode] ?? map.mode],
            ["length", `${length} tokens`],
            ["depth", `${percent(bin / bins)} to ${percent((bin + 1) / bins)}`],
            ["score", interval([mean, low, upper])],
            ["samples", String(count)],
          ],
        });
      }
    });
  });
  explore(picture, targets, 30);
  return tile(look, picture);
};

const tile = (look, picture, note = null) =>
  html(
    "figure",
    { class: "tile", "data-family": look.familyIndex, "--hue": look.hue },
    html("figcaption", { title: look.text }, look.label),
    picture,
    note ? html("p", {}, note) : null,
  );
