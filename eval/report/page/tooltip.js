// The box beside the pointer, and one way to explore a drawing: by pointer, by touch, or by the arrow keys.
const tooltip = document.getElementById("tooltip");

const say = (title, facts, x, y) => {
  tooltip.replaceChildren(
    html("strong", {}, title),
    html(
      "dl",
      {},
      facts.filter(Boolean).map(([name, value]) => html("div", {}, html("dt", {}, name), html("dd", {}, value))),
    ),
  );
  tooltip.hidden = false;
  const { width, height } = tooltip.getBoundingClientRect();
  const left = x + 16 + width > innerWidth ? x - width - 16 : x + 16;
  const top = y + 16 + height > innerHeight ? y - height - 16 : y + 16;
  tooltip.style.left = `${Math.max(4, Math.min(left, innerWidth - width - 4))}px`;
  tooltip.style.top = `${Math.max(4, top)}px`;
};
const hush = () => {
  tooltip.hidden = true;
};
addEventListener("scroll", hush, { passive: true });
addEventListener("keydown", (event) => event.key === "Escape" && hush());

// Each target: x, y in the drawing's own units; title and facts, made when they are asked for. The nearest within reach
// answers, so that small marks need no aim. Arrow keys go through the targets by x.
const explore = (picture, targets, reach = 26) => {
  const ring = svg("circle", { class: "ring", r: 8, visibility: "hidden" });
  picture.append(ring);
  picture.setAttribute("tabindex", "0");
  const ordered = [...targets].sort((a, b) => a.x - b.x || a.y - b.y);
  let at = -1;
  const show = (target) => {
    const box = picture.getBoundingClientRect();
    const zoom = box.width / picture.viewBox.baseVal.width;
    at = ordered.indexOf(target);
    ring.setAttribute("cx", target.x);
    ring.setAttribute("cy", target.y);
    ring.setAttribute("visibility", "visible");
    const same = unique(
      ordered.filter((each) => Math.hypot(each.x - target.x, each.y - target.y) < 2).map((each) => each.title),
    );
    const others = same.filter((title) => title !== target.title);
    say(
      target.title,
      [...target.facts(), others.length && ["also here", others.join(", ")]],
      box.left + target.x * zoom,
      box.top + target.y * zoom,
    );
  };
  const leave = () => {
    ring.setAttribute("visibility", "hidden");
    hush();
  };
  picture.addEventListener("pointermove", (event) => {
    const box = picture.getBoundingClientRect();
    const zoom = picture.viewBox.baseVal.width / box.width;
    const x = (event.clientX - box.left) * zoom;
    const y = (event.clientY - box.top) * zoom;
    let nearest = null;
    let distance = reach;
    for (const target of ordered) {
      const away = Math.hypot(target.x - x, target.y - y);
      if (away < distance) [nearest, distance] = [target, away];
    }
    if (nearest) show(nearest);
    else leave();
  });
  picture.addEventListener("pointerleave", leave);
  picture.addEventListener("blur", leave);
  picture.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!step || !ordered.length) return;
    event.preventDefault();
    show(ordered[(at + step + ordered.length) % ordered.length]);
  });
};
