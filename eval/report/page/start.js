// Everything is drawn once, section by section; a section that is not in the page has nothing to show.
const data = JSON.parse(document.getElementById("data").textContent);
const looks = lookOf(data);
drawLegend(
  document.getElementById("legend"),
  looks,
  unique([...data.cells.map((cell) => cell.mode), ...data.depths.map((each) => each.mode)]),
  data.modes,
);
for (const [name, draw] of Object.entries({
  frontier: drawFrontier,
  depths: drawDepths,
  budgets: drawBudgets,
  kept: drawKept,
  costs: drawCosts,
  table: drawTable,
})) {
  const figure = document.querySelector(`#${name} > .figure`);
  if (figure) draw(figure, data, looks);
}
