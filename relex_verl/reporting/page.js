// The page is whole without this script: it adds copy buttons, sorting, and a cap on long tables.
"use strict";

function copyButton(pre) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "copy";
  button.textContent = "Copy";
  button.setAttribute("aria-live", "polite");
  button.addEventListener("click", async () => {
    let copied = true;
    try {
      await navigator.clipboard.writeText(pre.textContent);
    } catch {
      getSelection().selectAllChildren(pre); // without a clipboard, at least it is marked
      copied = document.execCommand("copy");
    }
    button.textContent = copied ? "Copied" : "Marked";
    setTimeout(() => (button.textContent = "Copy"), 2000);
  });
  pre.parentElement.querySelector("header").append(button);
}

const words = new Intl.Collator("en", { numeric: true });

// Numbers as numbers, words as words with the numbers in them in order; what is not known comes last either way.
function compare(a, b, sign) {
  if (a === null || b === null) return (a === null) - (b === null);
  return sign * (typeof a === "number" ? a - b : words.compare(a, b));
}

function sortBy(table, header) {
  const sign = header.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  for (const other of header.parentElement.children) other.setAttribute("aria-sort", "none");
  header.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
  const numbers = header.classList.contains("number");
  const keyed = Array.from(table.tBodies[0].rows, (row) => {
    const cell = row.cells[header.cellIndex];
    const known = cell.dataset.value ?? cell.textContent;
    return { row, key: !numbers ? known : known === "-" ? null : Number(known) };
  });
  keyed.sort((a, b) => compare(a.key, b.key, sign));
  table.tBodies[0].replaceChildren(...keyed.map((one) => one.row));
}

function sortable(table) {
  for (const header of table.tHead.rows[0].cells) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    header.append(button);
    header.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => sortBy(table, header));
  }
}

function capped(table) {
  const rows = table.tBodies[0].rows.length;
  if (rows <= 200) return; // as page.css says
  const button = document.createElement("button");
  button.type = "button";
  button.className = "all";
  button.textContent = `Show all ${rows.toLocaleString("en")} rows`;
  button.addEventListener("click", () => {
    table.classList.remove("capped");
    button.remove();
  });
  table.classList.add("capped");
  table.parentElement.after(button);
}

document.querySelectorAll(".next pre").forEach(copyButton);
document.querySelectorAll("table.sortable").forEach((table) => {
  sortable(table);
  capped(table);
});
