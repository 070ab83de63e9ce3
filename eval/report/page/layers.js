// One policy's image of a prompt: a row a layer, the first on top, shaded by the share of its heads that kept a token.
const layerImage = (chosen, stepped) => {
  const canvas = html("canvas", { class: "layers", tabindex: "0", role: "img" });
  let map = null;
  let shares = [];
  let count = 0;

  const under = (event) => {
    const box = canvas.getBoundingClientRect();
    const within = (part, size, parts) => Math.max(0, Math.min(parts - 1, Math.floor((part / size) * parts)));
    const column = within(event.clientX - box.left, box.width, map.columns);
    const layer = within(event.clientY - box.top, box.height, map.layers);
    const edge = (place) => Math.floor((place * count) / map.columns);
    return { column, layer, from: edge(column), to: edge(column + 1) - 1 };
  };
  canvas.addEventListener("pointermove", (event) => {
    const { column, layer, from, to } = under(event);
    const facts = [
      ["tokens", from < to ? `${from} to ${to}` : String(from)],
      ["kept by", `${levelName(shares[layer * map.columns + column])} of the heads`],
    ];
    say(`layer ${layer}`, facts, event.clientX, event.clientY);
  });
  canvas.addEventListener("pointerleave", hush);
  canvas.addEventListener("click", (event) => chosen(under(event).from));
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step) stepped(step);
  });

  const show = (prompt, now, policy) => {
    map = now;
    count = prompt.count;
    shares = levels(map.image, map.layers * map.columns);
    const high = Math.max(2, Math.min(8, Math.round(160 / map.layers)));
    canvas.width = map.columns;
    canvas.height = map.layers * high;
    canvas.setAttribute(
      "aria-label",
      `${policy}: kept by layer and token; arrow keys turn the pages of the text below`,
    );
    const context = canvas.getContext("2d");
    const colours = heatColours(canvas);
    shares.forEach((level, place) => {
      context.fillStyle = colours[level];
      context.fillRect(place % map.columns, Math.floor(place / map.columns) * high, 1, high);
    });
  };
  return { node: canvas, show };
};
