// Tables are sorted by their headings; a method's name, score or row opens its runs and their signatures.

const announcer = element("div", { class: "unseen", role: "status" });
document.body.append(announcer);

for (const table of document.querySelectorAll("table.comparison")) {
  const heads = [...table.querySelectorAll("thead tr:last-child th")];
  heads.forEach((head, column) => {
    const title = head.textContent;
    head.replaceChildren(
      element("button", { type: "button", onclick: () => sortBy(table, heads, column, title) }, ...head.childNodes),
    );
    head.setAttribute("aria-sort", column === 0 ? "ascending" : "none");
  });
  for (const row of table.tBodies[0].rows) {
    row.addEventListener("click", (event) => {
      event.preventDefault();
      if (getSelection().isCollapsed) showRuns(table.closest("article").id, Number(row.dataset.method));
    });
  }
}

/** Sort rows by a column: best first, then reversed. Values that were not measured stay last. */
function sortBy(table, heads, column, title) {
  const head = heads[column];
  const opposite = { ascending: "descending", descending: "ascending" };
  const order = opposite[head.getAttribute("aria-sort")] ?? head.dataset.first;
  heads.forEach((other) => other.setAttribute("aria-sort", other === head ? order : "none"));
  const sign = order === "ascending" ? 1 : -1;
  const value = (row) => row.cells[column].dataset.value;
  const rows = [...table.tBodies[0].rows];
  rows.sort((a, b) => {
    if (value(a) === "" || value(b) === "") return (value(a) === "") - (value(b) === "");
    return sign * (Number(value(a)) - Number(value(b))) || Number(a.dataset.method) - Number(b.dataset.method);
  });
  table.tBodies[0].append(...rows);
  announcer.textContent = `sorted by ${title}, ${order}`;
}

const dialog = element("dialog", { class: "runs-dialog", "aria-labelledby": "runs-title" });
document.body.append(dialog);
dialog.addEventListener("click", (event) => {
  if (event.target === dialog) dialog.close();
});

/** Show a method's runs in a dialog; without scripts the same links lead to them further down the page. */
function showRuns(experiment, method) {
  const runs = [...document.getElementById(`${experiment}-m${method}`).querySelectorAll(".run")];
  const copies = runs.map((run) => run.cloneNode(true));
  copies[0].open = true;
  dialog.replaceChildren(
    element(
      "div",
      { class: "dialog-head" },
      element("h2", { id: "runs-title" }, DATA[experiment].methods[method].label),
      element("button", { class: "button", type: "button", onclick: () => dialog.close() }, "Close"),
    ),
    ...copies,
  );
  dialog.showModal();
  dialog.scrollTop = 0;
}
