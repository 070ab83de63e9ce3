// Quality against resident bytes: a panel for each length and mode of a task; those of one task share their scales.
const drawFrontier = (node, data, looks) => {
  const cell = (row) => data.cells[row.cell];
  const rows = data.rows.filter((row) => row.score.every(Number.isFinite) && row.share > 0);
  const several = unique(rows.map((row) => cell(row).model)).length > 1;
  for (const ofTask of grouped(rows, (row) => `${cell(row).model}\n${cell(row).task}`).values()) {
    const { model, task } = cell(ofTask[0]), modes = unique(ofTask.map((row) => cell(row).mode));
    const panels = html("div", { class: "panels", "--least": modes.length > 2 ? "22rem" : "30rem" });
    node.append(html("h3", {}, several ? `${model}: ${task}` : task), panels);
    for (const ofPanel of grouped(ofTask, (row) => row.cell).values()) {
      const { length, mode } = cell(ofPanel[0]), about = `${length} tokens, ${data.modes[mode] ?? mode}`;
      const holder = html("div"), figure = html("figure", {}, html("figcaption", {}, about), holder);
      panels.append(figure);
      let width = 0;
      const draw = () => {
        figure.hidden = !visibleMode(mode);
        if (width && !figure.hidden) holder.replaceChildren(frontierPanel(data, looks, ofTask, ofPanel, width, `${task}, ${about}`));
      };
      whenSized(holder, (now) => { width = now; draw(); });
      whenFiltered(draw);
    }
  }
};

const readShare = (row) => (row.share * row.read) / row.stored;
const readsLess = (row) => row.read < 0.95 * row.stored;

// The rows that no other beats in both bytes and quality, by rising bytes.
const paretoEdge = (rows) => {
  const gain = (row) => (row.lower ? -row.score[0] : row.score[0]);
  const edge = [];
  for (const row of [...rows].sort((a, b) => a.share - b.share || gain(b) - gain(a)))
    if (!edge.length || gain(row) > gain(edge.at(-1))) edge.push(row);
  return edge;
};

const frontierPanel = (data, looks, ofTask, ofPanel, width, about) => {
  const height = Math.max(270, Math.min(360, width * 0.62));
  const frame = frameOf(width, height);
  const shares = ofTask.flatMap((row) => (readsLess(row) ? [row.share, readShare(row)] : [row.share])).filter((share) => share > 0);
  const x = logarithmic(Math.min(...shares) / 1.25, Math.max(...shares) * 1.25, frame.left, frame.right, { wanted: width / 70 });
  const y = quality(ofTask, frame.bottom, frame.top);
  const rows = ofPanel.filter((row) => visible(looks[row.policy]));
  const point = (row) => [x(row.share), y(row.score[0])];
  const families = [...grouped(rows, (row) => looks[row.policy].familyIndex).values()];
  const picture = drawing(width, height, `${about}: quality against resident bytes of ${rows.length} policies; the table below has the numbers`);
  picture.append(
    drawAxes(frame, x, y, {
      xTick: (share) => percent(share), xTitle: "resident bytes, share of a bf16 full cache",
      yTick: (value) => digits(value), yTitle: ofTask.some((row) => row.lower) ? "score; lower is better, so it is on top" : "score",
    }),
  );
  const full = ofPanel.find((row) => looks[row.policy].full);
  if (full) {
    const [mean, low, high] = full.score.map(y);
    picture.append(
      svg("rect", { class: "band", x: frame.left, width: frame.right - frame.left, y: Math.min(low, high), height: Math.abs(low - high) }),
      svg("line", { class: "full", x1: frame.left, x2: frame.right, y1: mean, y2: mean }),
    );
  }
  const obstacles = [], targets = [];
  for (const family of families) {
    const look = looks[family[0].policy], line = [...family].sort((a, b) => a.share - b.share).map(point);
    picture.append(svg("path", { class: "family", "data-family": look.familyIndex, "--hue": look.hue, d: path(line) }));
  }
  const edge = paretoEdge(rows);
  const stairs = edge.flatMap((row, index) => (index ? [[x(row.share), y(edge[index - 1].score[0])], point(row)] : [point(row)]));
  if (stairs.length) picture.append(svg("path", { class: "edge", d: path(stairs) }));
  stairs.slice(1).forEach((end, index) => obstacles.push(along(stairs[index], end, 1)));
  for (const row of rows) {
    const look = looks[row.policy], [px, py] = point(row), family = look.familyIndex;
    const [low, high] = row.score.slice(1, 3).map(y), facts = () => rowFacts(data, row);
    picture.append(svg("line", { class: "error", "data-family": family, "--hue": look.hue, x1: px, x2: px, y1: low, y2: high }));
    const ends = [[px, py]];
    if (readsLess(row) && row.read > 0) {
      const rx = x(readShare(row));
      picture.append(svg("line", { class: "reads", "data-family": family, "--hue": look.hue, x1: px, x2: rx, y1: py, y2: py }), symbol(look, rx, py, { radius: 3.4, open: true }));
      obstacles.push(along([px, py], [rx, py], 1));
      ends.push([rx, py]);
    }
    picture.append(symbol(look, px, py));
    for (const end of ends) {
      targets.push({ x: end[0], y: end[1], title: look.label, facts });
      obstacles.push(along(end, end, 4));
    }
  }
  // The edge's policies by their whole names; of every other family its best, by the family's.
  const named = (row, text, kind) => ({ x: point(row)[0], y: point(row)[1], text, kind, family: looks[row.policy].familyIndex, hue: looks[row.policy].hue });
  const best = (family) => family.reduce((a, b) => (y(b.score[0]) < y(a.score[0]) ? b : a));
  const wanted = [
    ...edge.map((row) => named(row, looks[row.policy].label, "best")),
    ...families.filter((family) => !family.some((row) => edge.includes(row))).map((family) => named(best(family), looks[family[0].policy].family, "other")),
  ];
  picture.append(...drawLabels(place(wanted, obstacles, frame)));
  explore(picture, targets);
  return picture;
};

const rowFacts = (data, row) => [
  ["question", data.modes[data.cells[row.cell].mode] ?? data.cells[row.cell].mode],
  [row.lower ? "score (lower is better)" : "score", interval(row.score)],
  ["samples", String(row.score[3])],
  row.difference && ["minus full, paired", interval(row.difference, signed)],
  ["stored", `${percent(row.share)}, ${binary(row.stored)}`],
  ["read a step", `${percent(readShare(row))}, ${binary(row.read)}`],
  row.retention !== null && ["evidence kept", percent(row.retention)],
  ...Object.entries(row.measures).map(([measure, value]) => [measure, interval(value)]),
];
