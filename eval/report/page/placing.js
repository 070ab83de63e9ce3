// Names beside marks that cover neither each other nor a mark: the first free place of several around each mark.
const pen = document.createElement("canvas").getContext("2d");
const widthOf = (text, font) => {
  pen.font = font;
  return pen.measureText(text).width;
};
const LABEL_FONT = "11px system-ui, sans-serif";

// The box around a point or around a line that follows an axis.
const along = ([x, y], [u, v], room) => ({
  left: Math.min(x, u) - room,
  right: Math.max(x, u) + room,
  top: Math.min(y, v) - room,
  bottom: Math.max(y, v) + room,
});
const meet = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;

// `wanted`: {x, y, text, ...} by falling importance; `obstacles`: boxes that must stay free; `frame`: where names may
// stand. Returns those that found a place, with it; `far` where a line should join name and mark. Who finds none is
// still answered by the pointer and the legend.
const place = (wanted, obstacles, frame) => {
  const taken = [...obstacles];
  const placed = [];
  for (const each of wanted) {
    const width = widthOf(each.text, LABEL_FONT) + 2;
    const height = 12;
    for (const [dx, dy, reach] of SPOTS) {
      const x = each.x + dx * reach + (dx * width) / 2;
      const y = each.y + dy * reach + (dy * height) / 2;
      const box = { left: x - width / 2, right: x + width / 2, top: y - height / 2, bottom: y + height / 2 };
      const inside =
        box.left >= frame.left && box.right <= frame.right && box.top >= frame.top && box.bottom <= frame.bottom;
      if (!inside || taken.some((other) => meet(box, other))) continue;
      taken.push(box);
      placed.push({ ...each, middle: x, centre: y, box, far: reach > 14 });
      break;
    }
  }
  return placed;
};
const SPOTS = [7, 13, 20, 30, 42, 56, 72].flatMap((reach) =>
  [
    [1, 0],
    [-1, 0],
    [0.75, -0.75],
    [0.75, 0.75],
    [-0.75, -0.75],
    [-0.75, 0.75],
    [0, -1],
    [0, 1],
  ].map(([dx, dy]) => [dx, dy, reach]),
);

const drawLabels = (placed) =>
  placed.map((each) => {
    // The line ends at the name's nearest edge.
    const x = Math.max(each.box.left, Math.min(each.box.right, each.x));
    const y = Math.max(each.box.top + 2, Math.min(each.box.bottom - 2, each.y));
    return svg(
      "g",
      { class: `label ${each.kind}`, "data-family": each.family, "--hue": each.hue },
      each.far ? svg("line", { x1: each.x, y1: each.y, x2: x, y2: y }) : null,
      svg(
        "text",
        { x: each.middle, y: each.centre, "text-anchor": "middle", "dominant-baseline": "central" },
        each.text,
      ),
    );
  });
