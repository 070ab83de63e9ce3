// Time and memory, a line a policy: against the prompt's length at one batch size, against the batch at one length.
const decades = (low, high, from, to) => logarithmic(low, high, from, to, { wanted: 5 });

// By powers of two, of which as many are named as have room.
const powersOfTwo = (low, high, from, to) => {
  const first = Math.ceil(Math.log2(low));
  const last = Math.floor(Math.log2(high));
  const step = Math.max(1, Math.ceil((last - first) / 5));
  const ticks = Array.from(
    { length: Math.max(0, Math.floor((last - first) / step) + 1) },
    (_, place) => 2 ** (first + place * step),
  );
  return Object.assign(logarithmic(low, high, from, to), { ticks });
};

const MEASURES = [
  ["cache_bytes", "resident cache", binary, powersOfTwo],
  ["peak_bytes", "peak while the prompt is read", binary, powersOfTwo],
  ["bytes_read", "cache read at a step", binary, powersOfTwo],
  ["prefill_seconds", "prefill", seconds, decades],
  ["step_seconds", "one decode step", seconds, decades],
];

const drawCosts = (node, data, looks) => {
  const models = unique(data.costs.map((cost) => cost.model));
  const body = html("div");
  const model = chooser(
    "Model",
    models,
    (name) => name,
    (name) => {
      const costs = data.costs.filter((cost) => cost.model === name);
      body.replaceChildren();
      for (const [axis, other, title, tick] of [
        ["length", "batch", "context length, tokens", tokens],
        ["batch", "length", "batch size", String],
      ])
        if (unique(costs.map((cost) => cost[axis])).length > 1)
          costGroup(body, costs, looks, { axis, other, title, tick });
      if (!body.childElementCount)
        costGroup(body, costs, looks, {
          axis: "length",
          other: "batch",
          title: "context length, tokens",
          tick: tokens,
        });
    },
  );
  node.append(html("div", { class: "choosers" }, model.node), body);
  model.start();
};

const costGroup = (body, costs, looks, { axis, other, title, tick }) => {
  const panels = html("div", { class: "panels" });
  // Most points first: the value at which most of the other axis was measured.
  const spread = (value) => unique(costs.filter((cost) => cost[other] === value).map((cost) => cost[axis])).length;
  const values = unique(costs.map((cost) => cost[other])).sort((a, b) => spread(b) - spread(a) || a - b);
  const fixed = other === "batch" ? (value) => `batch ${value}` : (value) => `${value} tokens`;
  let draws = [];
  const choice = chooser("At", values, fixed, (value) => {
    const rows = costs.filter((cost) => cost[other] === value);
    panels.replaceChildren();
    draws = MEASURES.filter(([key]) => rows.some((cost) => cost[key] > 0)).map(([key, name, show, scale]) => {
      const holder = html("div");
      let width = 0;
      const draw = () =>
        width && holder.replaceChildren(costPanel(rows, looks, { axis, title, tick, key, name, show, scale, width }));
      panels.append(html("figure", {}, html("figcaption", {}, name), holder));
      whenSized(holder, (now) => {
        width = now;
        draw();
      });
      return draw;
    });
  });
  whenFiltered(() => draws.forEach((draw) => draw()));
  const heading = axis === "length" ? "Against context length" : "Against batch size";
  body.append(
    html("h3", {}, values.length > 1 ? heading : `${heading}, ${fixed(values[0])}`),
    choice.node ?? "",
    panels,
  );
  choice.start();
};

const costPanel = (all, looks, { axis, title, tick, key, name, show, scale, width }) => {
  const height = Math.max(220, Math.min(280, width * 0.75));
  const frame = frameOf(width, height, 62);
  const rows = all.filter((cost) => cost[key] > 0);
  const drawn = rows.filter((cost) => visible(looks[cost.policy]));
  const values = rows.map((cost) => cost[key]);
  const inner = { ...frame, right: frame.right - 70 };
  const x = doubling(
    all.map((cost) => cost[axis]),
    inner.left + 8,
    inner.right,
  );
  // Three doublings at least, so that a difference of a few percent looks like one.
  const least = Math.min(...values);
  const most = Math.max(...values);
  const room = Math.max(1.3, Math.sqrt((8 * least) / most));
  const y = scale(least / room, most * room, frame.bottom, frame.top);
  const picture = drawing(width, height, `${name} against ${title}`);
  picture.append(drawAxes(frame, x, y, { xTick: tick, yTick: show, xTitle: title, yTitle: "" }));
  const targets = [];
  const ends = [];
  for (const [policy, ofPolicy] of grouped(drawn, (cost) => cost.policy)) {
    const look = looks[policy];
    const line = ofPolicy.sort((a, b) => a[axis] - b[axis]);
    const points = line.map((cost) => [x(cost[axis]), y(cost[key])]);
    picture.append(
      svg("path", { class: "cost", "data-family": look.familyIndex, "--hue": look.colour, d: path(points) }),
    );
    points.forEach(([px, py], index) => {
      picture.append(symbol(look, px, py, { radius: 2.6 }));
      targets.push({ x: px, y: py, title: look.label, facts: () => costFacts(line[index]) });
    });
    ends.push({ x: points.at(-1)[0], y: points.at(-1)[1], look });
  }
  // Names in the margin; those of a family's other budgets follow from the colour.
  const families = [...grouped(ends, (end) => end.look.familyIndex).values()]
    .map((members) => members.at(-1))
    .sort((a, b) => a.y - b.y);
  let below = frame.top - 12;
  const labels = [];
  for (const { x: px, y: py, look } of families) {
    const centre = Math.max(py, below + 11);
    if (centre - py > 34 || centre > frame.bottom) continue;
    below = centre;
    const most = Math.floor((width - px - 14) / 5.6);
    const text = look.family.length > most ? `${look.family.slice(0, most - 1)}…` : look.family;
    labels.push(
      svg(
        "g",
        { class: "label other", "data-family": look.familyIndex, "--hue": look.hue },
        svg("line", { x1: px + 4, y1: py, x2: px + 10, y2: centre }),
        svg("text", { x: px + 12, y: centre, "dominant-baseline": "central" }, text),
      ),
    );
  }
  picture.append(...labels);
  explore(picture, targets);
  return picture;
};

const costFacts = (cost) => [
  ["prompt", `${cost.length} tokens, batch ${cost.batch}`],
  ["resident", `${binary(cost.cache_bytes)}, of it metadata ${binary(cost.metadata_bytes)}`],
  ["peak", binary(cost.peak_bytes)],
  ["read a step", binary(cost.bytes_read)],
  ["prefill", seconds(cost.prefill_seconds)],
  ["decode step", seconds(cost.step_seconds)],
];
