// Elements of HTML and SVG. Text only ever becomes text nodes, and styles only ever properties, so nothing is parsed.
const build = (node, attributes, children) => {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name.startsWith("--") || name === "fill" || name === "background") node.style.setProperty(name, value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return node;
};
const html = (name, attributes = {}, ...children) => build(document.createElement(name), attributes, children);
const svg = (name, attributes = {}, ...children) =>
  build(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);

// A drawing of a fixed size that shrinks with its column, for instance in print.
const drawing = (width, height, about) =>
  svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": about });

// A labelled choice among values; nothing where there is no choice. `changed` gets the value, now and at every change.
const chooser = (title, values, name, changed) => {
  const select = html(
    "select",
    { onchange: () => changed(values[select.selectedIndex]) },
    values.map((value) => html("option", {}, name(value))),
  );
  const node = values.length > 1 ? html("label", { class: "chooser" }, `${title} `, select) : null;
  return { node, select, start: () => changed(values[Math.max(0, select.selectedIndex)]) };
};

// Draws now, and again whenever the width of `node` changes. A page that is not shown has no width.
const whenSized = (node, draw) => {
  let last = 0;
  new ResizeObserver(([entry]) => {
    const width = Math.floor(entry.contentRect.width);
    if (width > 0 && width !== last) draw((last = width));
  }).observe(node);
};

const unique = (values) => [...new Set(values)];
const grouped = (values, key) => {
  const groups = new Map();
  for (const value of values) {
    const name = key(value);
    if (groups.has(name)) groups.get(name).push(value);
    else groups.set(name, [value]);
  }
  return groups;
};
