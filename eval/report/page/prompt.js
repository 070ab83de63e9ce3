// The text of a prompt, a page at a time, each token shaded by the share of (layer, head) pairs that kept it.
const PAGE = 1024;

const promptText = () => {
  const text = html("p", { class: "prompt", tabindex: "0", "aria-label": "The prompt" });
  const pages = html("div", { class: "pages" });
  let words = [];
  let shares = [];
  let first = 0;
  // Of a long prompt only the start and the end are here: places in the page's data are not places in the prompt.
  let omitted = 0;
  const position = (place) => (place >= words.length / 2 ? place + omitted : place);
  const placeOf = (token) => (token >= words.length / 2 ? Math.max(words.length / 2, token - omitted) : token);

  const draw = () => {
    const last = Math.min(first + PAGE, words.length);
    const button = (name, to, disabled) =>
      html("button", { type: "button", class: "chip", disabled, onclick: () => turn(to) }, name);
    pages.replaceChildren(
      button("earlier", first - PAGE, first === 0),
      html("span", {}, `tokens ${position(first)} to ${position(last - 1)} of ${words.length + omitted}`),
      button("later", first + PAGE, last === words.length),
    );
    text.replaceChildren(
      ...words.slice(first, last).flatMap((word, offset) => {
        const place = first + offset;
        const kept = { class: shares[place] ? "" : "gone", "--kept": `${(shares[place] * 100) / STEPS}%` };
        const span = html("span", { ...kept, "data-place": place }, word === "\n" ? "↵\n" : word);
        const gap = omitted && place === words.length / 2;
        return gap ? [html("em", {}, ` … ${omitted} tokens are not shown … `), span] : [span];
      }),
    );
    text.scrollTop = 0;
  };
  const turn = (place) => {
    first = Math.max(0, Math.floor(Math.min(place, words.length - 1) / PAGE) * PAGE);
    draw();
  };
  text.addEventListener("pointermove", (event) => {
    const place = event.target.dataset.place;
    if (place === undefined) return hush();
    const facts = [
      ["text", JSON.stringify(words[place])],
      ["kept by", `${levelName(shares[place])} of (layer, head)`],
    ];
    return say(`token ${position(Number(place))}`, facts, event.clientX, event.clientY);
  });
  text.addEventListener("pointerleave", hush);

  const show = (prompt, map) => {
    // Another policy of the same prompt is read where the last one was.
    if (words !== prompt.tokens) first = 0;
    words = prompt.tokens;
    omitted = prompt.count - words.length;
    shares = levels(map.shares, words.length);
    draw();
  };
  const to = (token) => {
    turn(placeOf(token));
    const span = text.querySelector(`[data-place="${placeOf(token)}"]`);
    if (span) text.scrollTop = span.offsetTop - text.offsetTop - 8;
  };
  return { nodes: [pages, text], show, to, step: (by) => turn(first + by * PAGE) };
};
