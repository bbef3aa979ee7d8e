"use strict";
function element(name, values = {}, ...children) {
  const made = Object.assign(document.createElement(name), values);
  made.append(...children);
  return made;
}

function sortable(table) {
  const heads = Array.from(table.tHead.rows[0].cells), body = table.tBodies[0];
  heads.forEach((head, column) => {
    const button = element("button", { type: "button" }, ...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      const value = (row) => row.cells[column].dataset.value;
      const compare = (a, b) => isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b;
      body.append(...Array.from(body.rows).sort((a, b) => {  // what has no value stays last, whichever way
        const x = value(a), y = value(b);
        return x === "" || y === "" ? (x === "") - (y === "") : sign * compare(x, y);
      }));
    });
  });
}

function filters(table, rows) {  // a choice for each column that says so: [its element, whether a row is chosen]
  const heads = Array.from(table.tHead.rows[0].cells);
  return heads.flatMap((head, column) => {
    if (!head.hasAttribute("data-filter")) return [];
    const value = (row) => row.cells[column].dataset.value;
    const choice = element("select", {}, element("option", { value: "" }, "all"));
    for (const one of new Set(rows.map(value))) choice.append(element("option", { value: one }, one));
    const label = element("label", {}, head.textContent + " ", choice);
    return [[label, (row) => choice.value === "" || value(row) === choice.value]];
  });
}

function searchable(table) {  // above the table: a search, its filters, and how many rows are shown
  const rows = Array.from(table.tBodies[0].rows);
  if (rows.length < 4) return;
  const search = element("input", { type: "search" }), count = element("output");
  const chosen = filters(table, rows);
  const tools = element("div", { className: "tools" }, element("label", {}, "search ", search),
    ...chosen.map(([label]) => label), count);
  table.closest(".frame").before(tools);
  tools.addEventListener("input", () => {
    const words = search.value.toLowerCase().split(/\s+/);
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !(words.every((word) => text.includes(word)) && chosen.every(([, fits]) => fits(row)));
    }
    const shown = rows.filter((row) => !row.hidden).length;
    count.textContent = shown < rows.length ? `${shown} of ${rows.length} rows` : "";
  });
}

for (const table of document.querySelectorAll("table")) {
  searchable(table);
  if (!table.classList.contains("listing")) sortable(table);
}

const dialog = element("dialog");
document.body.append(dialog);
dialog.addEventListener("click", () => dialog.close());
for (const image of document.querySelectorAll("figure img")) {
  const button = element("button", { type: "button", title: "open large" });
  image.replaceWith(button);
  button.append(image);
  button.addEventListener("click", () => {
    dialog.replaceChildren(element("img", { src: image.src, alt: image.alt }));
    dialog.showModal();
  });
}

function openTarget() {  // of a link to what is closed
  const closed = document.getElementById(location.hash.slice(1))?.closest("details");
  if (closed) closed.open = true;
}
addEventListener("hashchange", openTarget);
openTarget();
