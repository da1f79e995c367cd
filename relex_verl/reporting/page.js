// Everything is on the page without this: it adds copying, sorting, and folds long tables.
for (const block of document.querySelectorAll(".command")) {
  const button = document.createElement("button");
  button.className = "copy";
  button.textContent = "copy";
  button.onclick = async () => {
    const text = block.querySelector("pre").textContent;
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "copied";
    } catch {  // a page opened from disk may not write to the clipboard: select, and the user copies
      getSelection().selectAllChildren(block.querySelector("pre"));
      button.textContent = "selected";
    }
    setTimeout(() => { button.textContent = "copy"; }, 1500);
  };
  block.append(button);
}

const SHOWN = 100;
const number = (cell) => {
  const value = Number.parseFloat(cell.dataset.value ?? cell.textContent);
  return Number.isNaN(value) ? null : value;
};

for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const fold = () => [...body.rows].forEach((row, i) => row.classList.toggle("more", i >= SHOWN));
  const sortBy = (column, header) => {
    const down = header.getAttribute("aria-sort") !== "descending";
    for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", "none");
    header.setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = [...body.rows].map((row) => [row, number(row.cells[column]), row.cells[column].textContent]);
    rows.sort(([, a, said], [, b, other]) => {
      if (a === null && b === null) return said.localeCompare(other, undefined, { numeric: true }) * (down ? -1 : 1);
      if (a === null || b === null) return a === null ? 1 : -1;  // what is not defined comes last, either way
      return (a - b) * (down ? -1 : 1);
    });
    body.append(...rows.map(([row]) => row));
    fold();
  };
  [...table.tHead.rows[0].cells].forEach((header, column) => {
    const button = document.createElement("button");
    button.textContent = header.textContent;
    header.replaceChildren(button);
    header.setAttribute("aria-sort", "none");
    button.onclick = () => sortBy(column, header);
  });
  fold();
  if (body.rows.length > SHOWN) {
    const button = document.createElement("button");
    button.className = "show";
    button.textContent = `show all ${body.rows.length}`;
    button.onclick = () => { table.classList.add("all"); button.remove(); };
    table.closest(".wide").after(button);
  }
}
