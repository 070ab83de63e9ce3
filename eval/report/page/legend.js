// The legend is the filter: which families and which modes every figure and the table show.
const shown = { families: new Set(), modes: new Set(), listeners: [] };
const visible = (look) => shown.families.has(look.familyIndex);
const visibleMode = (mode) => shown.modes.has(mode);
const whenFiltered = (draw) => shown.listeners.push(draw);
const announce = () => shown.listeners.forEach((draw) => draw());

// Everything else steps back while a family is pointed at.
const single = (family) =>
  document
    .querySelectorAll("[data-family]")
    .forEach((node) => node.classList.toggle("faded", family !== null && node.dataset.family !== String(family)));

// The first choice among all is of one alone; later ones join it or leave it.
const toggles = (values, chosen, content, attributes = () => ({})) => {
  const buttons = values.map((value) =>
    html(
      "button",
      {
        type: "button",
        class: "chip",
        "aria-pressed": "true",
        ...attributes(value),
        onclick: () => change(chosen.has(value) && chosen.size === values.length ? [value] : flipped(value)),
      },
      content(value),
    ),
  );
  const flipped = (value) => values.filter((each) => chosen.has(each) !== (each === value));
  const change = (now) => {
    chosen.clear();
    now.forEach((value) => chosen.add(value));
    buttons.forEach((button, index) => button.setAttribute("aria-pressed", String(chosen.has(values[index]))));
    announce();
  };
  values.forEach((value) => chosen.add(value));
  return { buttons, change, all: () => change(values) };
};

const drawLegend = (node, looks, modes, named) => {
  const samples = [...grouped(looks, (look) => look.familyIndex).values()].map((members) => members.at(-1));
  const families = toggles(
    samples.map((look) => look.familyIndex),
    shown.families,
    (family) => {
      const look = samples.find((each) => each.familyIndex === family);
      return [
        svg(
          "svg",
          { width: 14, height: 14, viewBox: "-7 -7 14 14", "aria-hidden": "true" },
          symbol({ ...look, colour: look.hue }, 0, 0),
        ),
        look.family,
      ];
    },
    (family) => ({
      onmouseenter: () => single(family),
      onmouseleave: () => single(null),
      onfocus: () => single(family),
      onblur: () => single(null),
    }),
  );
  const order = toggles(modes, shown.modes, (mode) => named[mode] ?? mode);
  const all = html(
    "button",
    {
      type: "button",
      class: "plain",
      onclick: () => {
        families.all();
        order.all();
      },
    },
    "show all",
  );
  const hint = html("span", { class: "hint" }, "Choose names to see them alone,", all);
  node.append(
    html("div", { class: "chips", role: "group", "aria-label": "Policies shown" }, families.buttons),
    modes.length > 1
      ? html(
          "div",
          { class: "chips modes", role: "group", "aria-label": "What a policy knew of the question" },
          order.buttons,
        )
      : "",
    hint,
  );
};
