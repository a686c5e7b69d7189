"use strict";
// Sorting: a button in each column header. Figures are in data-value; rows without one stay at the end.
for (const table of document.querySelectorAll("table.sortable")) {
  const headers = [...table.tHead.rows[0].cells];
  headers.forEach((header, column) => {
    header.querySelector("button")?.addEventListener("click", () => {
      const descending = header.getAttribute("aria-sort") === "ascending";
      const text = header.classList.contains("text");
      const value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
      const rows = [...table.tBodies[0].rows];
      rows.sort((first, second) => {
        const a = value(first), b = value(second);
        if (a === "" || b === "") return (a === "") - (b === "");
        const order = text ? a.localeCompare(b, undefined, { numeric: true }) : Number(a) - Number(b);
        return descending ? -order : order;
      });
      table.tBodies[0].append(...rows);
      headers.filter((other) => other.hasAttribute("aria-sort")).forEach((other) => other.setAttribute("aria-sort", "none"));
      header.setAttribute("aria-sort", descending ? "descending" : "ascending");
    });
  });
}
// The heat map: the cell under the pointer, or the one that the arrow keys choose, is named below.
const heat = document.getElementById("heat");
if (heat) {
  const { names, matrix } = JSON.parse(document.getElementById("matrix").textContent);
  const cursor = document.getElementById("cursor"), cell = document.getElementById("cell");
  const columns = names.length, rows = columns - 1;
  let x = 0, y = 0;
  const show = () => {
    cursor.setAttribute("x", x);
    cursor.setAttribute("y", y);
    cursor.setAttribute("visibility", "visible");
    const total = matrix[y].reduce((sum, count) => sum + count, 0);
    const share = total ? `${(100 * matrix[y][x] / total).toFixed(2)} % of its pixels` : "no labelled pixel";
    cell.textContent = `${names[y]} predicted as ${names[x]}: ${share} (${matrix[y][x].toLocaleString("en")})`;
  };
  heat.addEventListener("pointermove", (event) => {
    const place = new DOMPoint(event.clientX, event.clientY).matrixTransform(heat.getScreenCTM().inverse());
    if (place.x < 0 || place.y < 0 || place.x >= columns || place.y >= rows) return;
    x = Math.floor(place.x);
    y = Math.floor(place.y);
    show();
  });
  const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  heat.addEventListener("keydown", (event) => {
    const step = steps[event.key];
    if (!step) return;
    event.preventDefault();
    x = Math.min(columns - 1, Math.max(0, x + step[0]));
    y = Math.min(rows - 1, Math.max(0, y + step[1]));
    show();
  });
  heat.addEventListener("focus", show);
}
