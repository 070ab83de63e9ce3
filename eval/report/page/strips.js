// What each policy kept of a prompt, in a strip: where they agree, and where one stands alone.
const STEPS = 15;

// Two levels a byte, the first in the high bits.
const levels = (text, count) => {
  const bytes = atob(text);
  return Uint8Array.from({ length: count }, (_, place) =>
    place % 2 ? bytes.charCodeAt(place >> 1) & 15 : bytes.charCodeAt(place >> 1) >> 4,
  );
};

const levelName = (level) => (level === 0 ? "none" : level === STEPS ? "all" : `about ${percent(level / STEPS, 2)}`);

// A canvas takes computed colours only, so an element beside it tells those of all levels.
const heatColours = (beside) => {
  const probe = html("i", { hidden: true });
  beside.after(probe);
  const colours = Array.from({ length: STEPS + 1 }, (_, level) => {
    probe.style.background = heat(level / STEPS);
    return getComputedStyle(probe).backgroundColor;
  });
  probe.remove();
  return colours;
};

const drawStrips = (node, maps, looks, choose) => {
  const shownMaps = maps.filter((map) => visible(looks[map.policy]));
  const canvases = shownMaps.map((map) => html("canvas", { width: map.columns, height: 1, "aria-hidden": "true" }));
  node.replaceChildren(
    ...shownMaps.map((map, index) => {
      const look = looks[map.policy];
      return html(
        "button",
        {
          type: "button",
          title: look.text,
          "data-policy": map.policy,
          "data-family": look.familyIndex,
          "--hue": look.colour,
          onclick: () => choose(map),
        },
        html("span", {}, look.label),
        canvases[index],
      );
    }),
  );
  if (!canvases.length) return;
  const colours = heatColours(canvases[0]);
  shownMaps.forEach((map, index) => {
    const context = canvases[index].getContext("2d");
    const found = levels(map.image, map.layers * map.columns);
    for (let column = 0; column < map.columns; column += 1) {
      let sum = 0;
      for (let layer = 0; layer < map.layers; layer += 1) sum += found[layer * map.columns + column];
      context.fillStyle = colours[Math.round(sum / map.layers)];
      context.fillRect(column, 0, 1, 1);
    }
  });
};
