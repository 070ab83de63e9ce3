// How a policy looks: one hue and one shape for a family, a stronger colour for a larger budget.
const HUES = 12;
const SHAPES = [
  (r) => `M${-r},0a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0Z`,
  (r) => `M${-r * 0.88},${-r * 0.88}h${r * 1.76}v${r * 1.76}h${-r * 1.76}Z`,
  (r) => `M0,${-r * 1.2}L${r * 1.12},${r * 0.8}H${-r * 1.12}Z`,
  (r) => `M0,${-r * 1.3}L${r * 1.1},0L0,${r * 1.3}L${-r * 1.1},0Z`,
  (r) => `M0,${r * 1.2}L${r * 1.12},${-r * 0.8}H${-r * 1.12}Z`,
  (r) => {
    const a = 0.45 * r;
    const b = 0.7 * r;
    return `M${-a},${-a - b}h${2 * a}v${b}h${b}v${2 * a}h${-b}v${b}h${-2 * a}v${-b}h${-b}v${-2 * a}h${b}Z`;
  },
];

const lookOf = (data) => {
  const families = unique(data.policies.map((policy) => policy.family));
  const coloured = families.filter(
    (family) => !data.policies.some((policy) => policy.full && policy.family === family),
  );
  // A family's budgets by the bytes that they keep where both are known, else in the order of the job.
  const shares = grouped(data.rows, (row) => row.policy);
  const size = (policy) => {
    const rows = shares.get(policy) ?? [];
    return rows.length ? rows.reduce((sum, row) => sum + row.share, 0) / rows.length : policy;
  };
  return data.policies.map((policy, index) => {
    const family = families.indexOf(policy.family);
    const place = coloured.indexOf(policy.family);
    const members = data.policies
      .map((_, other) => other)
      .filter((other) => data.policies[other].family === policy.family);
    const rank = members.sort((a, b) => size(a) - size(b)).indexOf(index);
    const strength = members.length > 1 ? 50 + (50 * rank) / (members.length - 1) : 100;
    const hue = place < 0 ? "var(--ink)" : `var(--family-${place % HUES})`;
    return {
      ...policy,
      index,
      familyIndex: family,
      hue,
      colour: `color-mix(in oklab, ${hue} ${strength}%, var(--paper))`,
      shape: SHAPES[place < 0 ? 0 : (place + Math.floor(place / HUES)) % SHAPES.length],
    };
  });
};

const symbol = (look, x, y, { radius = 4.2, open = false } = {}) =>
  svg("path", {
    class: open ? "mark open" : "mark",
    "data-family": look.familyIndex,
    d: look.shape(radius),
    transform: `translate(${x.toFixed(1)},${y.toFixed(1)})`,
    "--hue": look.colour,
  });

// One sequential map for every share: its lightness is monotone, so it reads without hue and in grey.
const heat = (share) =>
  share < 0.5
    ? `color-mix(in oklab, var(--heat-middle) ${(200 * share).toFixed(0)}%, var(--heat-low))`
    : `color-mix(in oklab, var(--heat-high) ${(200 * share - 100).toFixed(0)}%, var(--heat-middle))`;

const heatKey = (low, high) =>
  html(
    "p",
    { class: "key" },
    low,
    html(
      "span",
      { class: "ramp", "aria-hidden": "true" },
      Array.from({ length: 16 }, (_, level) => html("i", { background: heat(level / 15) })),
    ),
    high,
  );
