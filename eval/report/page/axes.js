// The frame of a chart: grid, ticks and titles, with as few lines as will do.
const frameOf = (width, height, left = 44) => ({ left, right: width - 10, top: 20, bottom: height - 38 });

const drawAxes = (frame, x, y, { xTick, yTick, xTitle, yTitle }) =>
  svg(
    "g",
    { class: "axes" },
    y.ticks.map((tick) => [
      svg("line", { class: "grid", x1: frame.left, x2: frame.right, y1: y(tick), y2: y(tick) }),
      svg("text", { x: frame.left - 6, y: y(tick), "text-anchor": "end", "dominant-baseline": "central" }, yTick(tick)),
    ]),
    x.ticks.map((tick) => [
      svg("line", { class: "grid", x1: x(tick), x2: x(tick), y1: frame.top, y2: frame.bottom }),
      svg("text", { x: x(tick), y: frame.bottom + 13, "text-anchor": "middle" }, xTick(tick)),
    ]),
    svg("line", { class: "base", x1: frame.left, x2: frame.right, y1: frame.bottom, y2: frame.bottom }),
    svg("text", { class: "title", x: frame.right, y: frame.bottom + 30, "text-anchor": "end" }, xTitle),
    yTitle
      ? svg("text", { class: "title", x: frame.left - 36, y: frame.top - 9, "text-anchor": "start" }, yTitle)
      : null,
  );

const path = (points) => points.map(([x, y], index) => `${index ? "L" : "M"}${x.toFixed(1)},${y.toFixed(1)}`).join("");
