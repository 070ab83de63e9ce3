// Quality against resident bytes: a panel for each length and mode of a task; those of one task share their scales.
const drawFrontier = (node, data, looks) => {
  const cell = (row) => data.cells[row.cell];
  const rows = data.rows.filter((row) => row.score.every(Number.isFinite) && row.share > 0);
  const several = unique(rows.map((row) => cell(row).model)).length > 1;
  for (const ofTask of grouped(rows, (row) => `${cell(row).model}\n${cell(row).task}`).values()) {
    const { model, task } = cell(ofTask[0]);
    const modes = unique(ofTask.map((row) => cell(row).mode));
    const panels = html("div", { class: "panels", "--least": modes.length > 2 ? "22rem" : "30rem" });
    const group = html("div", {}, html("h3", {}, several ? `${model}: ${task}` : task), panels);
    node.append(group);
    whenFiltered(() => {
      group.hidden = !modes.some(visibleMode);
    });
    for (const ofPanel of grouped(ofTask, (row) => row.cell).values()) {
      const { length, mode } = cell(ofPanel[0]);
      const about = `${length} tokens, ${data.modes[mode] ?? mode}`;
      const holder = html("div");
      const figure = html("figure", {}, html("figcaption", {}, about), holder);
      panels.append(figure);
      let width = 0;
      const draw = () => {
        figure.hidden = !visibleMode(mode);
        if (width && !figure.hidden)
          holder.replaceChildren(frontierPanel(data, looks, ofTask, ofPanel, width, `${task}, ${about}`));
      };
      whenSized(holder, (now) => {
        width = now;
        draw();
      });
      whenFiltered(draw);
    }
  }
};

const readShare = (row) => (row.share * row.read) / row.stored;

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
  const shares = ofTask.flatMap((row) => [row.share, readShare(row)]).filter((share) => share > 0);
  const ends = [Math.min(...shares) / 1.25, Math.max(...shares) * 1.25];
  const x = logarithmic(...ends, frame.left, frame.right, { wanted: width / 70 });
  const y = quality(ofTask, frame.bottom, frame.top);
  const rows = ofPanel.filter((row) => visible(looks[row.policy]));
  const families = [...grouped(rows, (row) => looks[row.policy].familyIndex).values()];
  const edge = paretoEdge(rows);
  const marks = rows.map((row) => frontierMark(row, looks[row.policy], x, y, () => rowFacts(data, row)));
  const stairs = edge.flatMap((row, index) => {
    const corner = index ? [[x(row.share), y(edge[index - 1].score[0])]] : [];
    return [...corner, [x(row.share), y(row.score[0])]];
  });
  const obstacles = marks.flatMap((mark) => mark.obstacles);
  stairs.slice(1).forEach((end, index) => obstacles.push(along(stairs[index], end, 1)));

  const picture = drawing(width, height, `${about}: quality against bytes of ${rows.length} policies; see the table`);
  picture.append(
    drawAxes(frame, x, y, {
      xTick: (share) => percent(share),
      xTitle: "resident bytes, share of a bf16 full cache",
      yTick: (value) => digits(value),
      yTitle: ofTask.some((row) => row.lower) ? "score; lower is better, so it is on top" : "score",
    }),
    ...ofPanel.filter((row) => looks[row.policy].full).map((row) => fullBand(row, frame, y)),
    ...families.map((family) => familyLine(family, looks[family[0].policy], x, y)),
    svg("path", { class: "edge", d: path(stairs) }),
    ...marks.map((mark) => mark.node),
    ...drawLabels(place(frontierNames(edge, families, looks, x, y), obstacles, frame)),
  );
  explore(
    picture,
    marks.flatMap((mark) => mark.targets),
  );
  return picture;
};

const fullBand = (row, { left, right }, y) => {
  const [mean, low, high] = row.score.slice(0, 3).map(y);
  const band = { x: left, width: right - left, y: Math.min(low, high), height: Math.abs(low - high) };
  return svg(
    "g",
    {},
    svg("rect", { class: "band", ...band }),
    svg("line", { class: "full", x1: left, x2: right, y1: mean, y2: mean }),
  );
};

const familyLine = (rows, look, x, y) => {
  const line = [...rows].sort((a, b) => a.share - b.share).map((row) => [x(row.share), y(row.score[0])]);
  return svg("path", { class: "family", "data-family": look.familyIndex, "--hue": look.hue, d: path(line) });
};

// A policy with its interval; one that reads less than it keeps has a second, open mark at what it reads.
const frontierMark = (row, look, x, y, facts) => {
  const [py, low, high] = row.score.slice(0, 3).map(y);
  const px = x(row.share);
  const family = { "data-family": look.familyIndex, "--hue": look.hue };
  const node = svg("g", {}, svg("line", { class: "error", ...family, x1: px, x2: px, y1: low, y2: high }));
  const ends = [[px, py]];
  if (row.read > 0 && row.read < 0.95 * row.stored) {
    const rx = x(readShare(row));
    node.append(
      svg("line", { class: "reads", ...family, x1: px, x2: rx, y1: py, y2: py }),
      symbol(look, rx, py, { radius: 3.4, open: true }),
    );
    ends.push([rx, py]);
  }
  node.append(symbol(look, px, py));
  const obstacles = [...ends.map((end) => along(end, end, 4)), along(ends[0], ends.at(-1), 1)];
  return { node, obstacles, targets: ends.map(([u, v]) => ({ x: u, y: v, title: look.label, facts })) };
};

// The edge's policies by their whole names, and of every other family its best by the family's.
const frontierNames = (edge, families, looks, x, y) => {
  const named = (row, text, kind) => {
    const look = looks[row.policy];
    return { x: x(row.share), y: y(row.score[0]), text, kind, family: look.familyIndex, hue: look.hue };
  };
  const best = (family) => family.reduce((a, b) => (y(b.score[0]) < y(a.score[0]) ? b : a));
  const others = families.filter((family) => !family.some((row) => edge.includes(row)));
  return [
    ...edge.map((row) => named(row, looks[row.policy].label, "best")),
    ...others.map((family) => named(best(family), looks[family[0].policy].family, "other")),
  ];
};

const rowFacts = (data, row) => [
  ["mode", data.modes[data.cells[row.cell].mode] ?? data.cells[row.cell].mode],
  [row.lower ? "score (lower is better)" : "score", interval(row.score)],
  ["samples", String(row.score[3])],
  row.difference && ["minus full, paired", interval(row.difference, signed)],
  ["stored", `${percent(row.share)}, ${binary(row.stored)}`],
  ["read a step", `${percent(readShare(row))}, ${binary(row.read)}`],
  row.retention !== null && ["evidence kept", percent(row.retention)],
  ...Object.entries(row.measures).map(([measure, value]) => [measure, interval(value)]),
];
