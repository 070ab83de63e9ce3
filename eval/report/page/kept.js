// What was kept of a prompt: its text shaded by token, and an image of layers by tokens that says where to read.
const STEPS = 15;
const PAGE = 1024;

const levels = (text, count) => {
  const bytes = atob(text);
  return Uint8Array.from({ length: count }, (_, place) => (place % 2 ? bytes.charCodeAt(place >> 1) & 15 : bytes.charCodeAt(place >> 1) >> 4));
};

const drawKept = (node, data, looks) => {
  const { maps, prompts } = data.kept;
  const canvas = html("canvas", { tabindex: "0", role: "img" }), strip = html("div", { class: "strip" }, canvas);
  const text = html("p", { class: "prompt", tabindex: "0", "aria-label": "The prompt" }), about = html("p", { class: "note" });
  const pages = html("div", { class: "pages" });
  let map = null, first = 0;

  const show = () => {
    const { count, tokens: shownTokens } = prompts[map.prompt], shares = levels(map.shares, shownTokens.length);
    const omitted = count - shownTokens.length, half = shownTokens.length / 2;
    const position = (place) => (omitted && place >= half ? place + omitted : place);
    const last = Math.min(first + PAGE, shownTokens.length);
    text.replaceChildren(
      ...shownTokens.slice(first, last).flatMap((token, offset) => {
        const place = first + offset, level = shares[place];
        const span = html("span", { class: level ? "" : "gone", "data-place": place, "--kept": `${(level * 100) / STEPS}%` }, token === "\n" ? "↵\n" : token);
        return omitted && place === half ? [html("em", {}, ` … ${omitted} tokens are not shown … `), span] : [span];
      }),
    );
    text.scrollTop = 0;
    const mean = map.counts.flat().reduce((sum, kept) => sum + kept, 0) / (map.layers * map.heads);
    about.textContent = `${looks[map.policy].text} keeps ${digits(mean)} of ${count} tokens, mean over ${map.layers} layers of ${map.heads} KV heads (${percent(mean / count)}).`;
    pages.replaceChildren(
      html("button", { type: "button", class: "chip", disabled: first === 0, onclick: () => turn(first - PAGE) }, "earlier"),
      html("span", {}, `tokens ${position(first)} to ${position(last - 1)} of ${count}`),
      html("button", { type: "button", class: "chip", disabled: last === shownTokens.length, onclick: () => turn(first + PAGE) }, "later"),
    );
    text.onpointermove = (event) => {
      const place = event.target.dataset?.place;
      if (place === undefined) return hush();
      say(`token ${position(Number(place))}`, [["text", JSON.stringify(shownTokens[place])], ["kept by", `${levelName(shares[place])} of (layer, head)`]], event.clientX, event.clientY);
    };
    text.onpointerleave = hush;
    canvas.setAttribute("aria-label", `${looks[map.policy].text}: share of heads by layer and token; arrow keys turn the pages of the text below`);
    paint(canvas, map);
  };
  const turn = (place) => {
    const count = prompts[map.prompt].tokens.length;
    first = Math.max(0, Math.min(Math.floor((count - 1) / PAGE) * PAGE, Math.floor(place / PAGE) * PAGE));
    show();
  };
  const under = (event) => {
    const box = canvas.getBoundingClientRect(), { count } = prompts[map.prompt];
    const column = Math.max(0, Math.min(map.columns - 1, Math.floor(((event.clientX - box.left) / box.width) * map.columns)));
    const layer = Math.max(0, Math.min(map.layers - 1, Math.floor(((event.clientY - box.top) / box.height) * map.layers)));
    return { column, layer, from: Math.floor((column * count) / map.columns), to: Math.max(1, Math.floor(((column + 1) * count) / map.columns)) - 1 };
  };
  canvas.addEventListener("pointermove", (event) => {
    const { column, layer, from, to } = under(event);
    const share = levels(map.image, map.layers * map.columns)[layer * map.columns + column];
    say(`layer ${layer}`, [["tokens", from < to ? `${from} to ${to}` : String(from)], ["kept by", `${levelName(share)} of the heads`]], event.clientX, event.clientY);
  });
  canvas.addEventListener("pointerleave", hush);
  canvas.addEventListener("click", (event) => {
    const { from } = under(event), { count, tokens: shownTokens } = prompts[map.prompt];
    const omitted = count - shownTokens.length, half = shownTokens.length / 2;
    const place = omitted && from >= half ? Math.max(half, from - omitted) : from;
    turn(place);
    const span = text.querySelector(`[data-place="${place}"]`);
    if (span) text.scrollTop = span.offsetTop - text.offsetTop - 8;
  });
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowRight: PAGE, ArrowLeft: -PAGE }[event.key];
    if (step) turn(first + step);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => map && paint(canvas, map));

  // Compared policies are looked at in one place: a change of policy keeps the page, and a change of prompt the policy.
  const policies = html("select", { onchange: () => { map = maps[Number(policies.value)]; show(); } });
  const cells = chooser("Prompt of", unique(maps.map((each) => each.cell)), (cell) => cellName(data, cell), (cell) => {
    const before = map;
    const members = maps.map((each, index) => ({ ...each, index })).filter((each) => each.cell === cell).sort((a, b) => a.policy - b.policy);
    policies.replaceChildren(...members.map((each) => html("option", { value: each.index }, looks[each.policy].label)));
    // The first view is of a policy that let something go.
    const lets = (each) => each.counts.flat().some((count) => count < prompts[each.prompt].count);
    map = members.find((each) => before && each.policy === before.policy) ?? members.find(lets) ?? members[0];
    policies.value = String(map.index);
    if (before && before.prompt !== map.prompt) first = 0;
    show();
  });
  node.append(
    html("div", { class: "choosers" }, cells.node, html("label", { class: "chooser" }, "Policy ", policies), heatKey("none", "all")),
    about, strip, pages, text,
  );
  cells.start();
};

const levelName = (level) => (level === 0 ? "none" : level === STEPS ? "all" : `about ${percent(level / STEPS, 2)}`);

const paint = (canvas, map) => {
  const high = Math.max(2, Math.min(8, Math.round(160 / map.layers)));
  canvas.width = map.columns;
  canvas.height = map.layers * high;
  const context = canvas.getContext("2d"), found = levels(map.image, map.layers * map.columns);
  // A canvas takes computed colours only, so one element tells those of all levels.
  const probe = html("i", { hidden: true });
  canvas.after(probe);
  const colours = Array.from({ length: STEPS + 1 }, (_, level) => {
    probe.style.background = heat(level / STEPS);
    return getComputedStyle(probe).backgroundColor;
  });
  probe.remove();
  found.forEach((level, place) => {
    context.fillStyle = colours[level];
    context.fillRect(place % map.columns, Math.floor(place / map.columns) * high, 1, high);
  });
};
