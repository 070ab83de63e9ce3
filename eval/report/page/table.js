// All numbers: every row with its intervals, sorted by whichever heading was pressed.
const drawTable = (node, data, looks) => {
  const several = (key) => unique(data.cells.map((cell) => cell[key])).length > 1;
  const cell = (row) => data.cells[row.cell];
  const bold = (row) => row.difference && (row.difference[1] > 0 || row.difference[2] < 0);
  const measures = unique(data.rows.flatMap((row) => Object.keys(row.measures)));
  const columns = [
    several("model") && { title: "model", value: (row) => cell(row).model },
    { title: "task", value: (row) => cell(row).task },
    { title: "tokens", value: (row) => cell(row).length, text: String },
    several("mode") && { title: "mode", value: (row) => cell(row).mode },
    { title: "policy", value: (row) => looks[row.policy].text, head: true },
    { title: "score", value: (row) => row.score[0], text: (_, row) => interval(row.score) },
    { title: "samples", value: (row) => row.score[3], text: String },
    {
      title: "minus full",
      value: (row) => row.difference?.[0] ?? null,
      text: (_, row) => interval(row.difference, signed),
      bold,
    },
    { title: "of bf16", value: (row) => row.share, text: (share) => percent(share) },
    { title: "stored", value: (row) => row.stored, text: (bytes) => binary(bytes) },
    { title: "read a step", value: (row) => row.read, text: (bytes) => binary(bytes) },
    { title: "evidence kept", value: (row) => row.retention, text: (share) => percent(share) },
    ...measures.map((name) => ({
      title: name,
      value: (row) => row.measures[name]?.[0] ?? null,
      text: (_, row) => interval(row.measures[name]),
    })),
  ].filter((column) => column && data.rows.some((row) => column.value(row) !== null));
  let sorted = null;
  let rising = true;
  const body = html("tbody");
  const count = html("p", { class: "note", role: "status" });
  const task = chooser(
    "Task",
    [null, ...unique(data.cells.map((each) => each.task))],
    (name) => name ?? "all",
    () => draw(),
  );
  const draw = () => {
    const wanted = task.select.selectedIndex > 0 ? task.select.value : null;
    const rows = data.rows.filter(
      (row) =>
        visible(looks[row.policy]) && visibleMode(cell(row).mode) && (wanted === null || cell(row).task === wanted),
    );
    // What is missing comes last in both directions.
    if (sorted)
      rows.sort((a, b) => {
        const [u, v] = [sorted.value(a), sorted.value(b)];
        if (u === null || v === null) return (u === null) - (v === null);
        return (rising ? 1 : -1) * (u < v ? -1 : u > v ? 1 : 0);
      });
    body.replaceChildren(
      ...rows.map((row) =>
        html(
          "tr",
          { "data-family": looks[row.policy].familyIndex, "--hue": looks[row.policy].hue },
          columns.map((column) => {
            const value = column.value(row);
            const text = value === null ? "" : column.text ? column.text(value, row) : value;
            const kind = [column.text && "number", column.bold?.(row) && "bold"].filter(Boolean).join(" ");
            return html(column.head ? "th" : "td", { scope: column.head && "row", class: kind || null }, text);
          }),
        ),
      ),
    );
    count.textContent = `${rows.length} of ${data.rows.length} rows.`;
  };
  const heads = columns.map((column) => {
    const head = html(
      "th",
      { scope: "col", class: column.text && "number" },
      html(
        "button",
        {
          type: "button",
          onclick: () => {
            rising = sorted === column ? !rising : true;
            sorted = column;
            heads.forEach((each) => each.removeAttribute("aria-sort"));
            head.setAttribute("aria-sort", rising ? "ascending" : "descending");
            draw();
          },
        },
        column.title,
      ),
    );
    return head;
  });
  whenFiltered(draw);
  node.append(
    html("div", { class: "choosers" }, task.node, count),
    html(
      "div",
      { class: "scroll", tabindex: "0", role: "region", "aria-label": "All numbers" },
      html("table", { class: "numbers" }, html("thead", {}, html("tr", {}, heads)), body),
    ),
  );
  task.start();
};
