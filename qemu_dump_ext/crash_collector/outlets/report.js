"use strict";
// Search, filter and sort what is in the page; without, everything is shown.
(() => {
  const overview = document.querySelector("table.overview");
  const copy = async (button) => {
    const text = button.previousElementSibling.textContent;
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      const area = document.createElement("textarea");
      area.value = text;
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    button.textContent = "copied";
    setTimeout(() => { button.textContent = "copy"; }, 1500);
  };
  for (const button of document.querySelectorAll("button.copy")) {
    button.hidden = false;
    button.addEventListener("click", () => copy(button));
  }
  const open = () => {
    const found = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (found && found.tagName === "DETAILS") {
      found.open = true;
      found.scrollIntoView();
    }
  };
  addEventListener("hashchange", open);
  open();
  if (!overview) return;
  const body = overview.tBodies[0];
  const rows = [...body.rows].map((row) => ({
    row,
    text: row.dataset.search,
    state: row.dataset.state,
    section: document.getElementById(row.dataset.section),
  }));
  const search = document.getElementById("search");
  const state = document.getElementById("state");
  const count = document.getElementById("count");
  const filter = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const one of rows) {
      const fits = (!state.value || one.state === state.value ||
          (state.value === "unresolved" && !["resolved", "merged"].includes(one.state)))
        && words.every((word) => one.text.includes(word));
      one.row.hidden = !fits;
      if (one.section) one.section.hidden = !fits;
      shown += fits;
    }
    count.textContent = `${shown} of ${rows.length}`;
  };
  document.querySelector(".controls").hidden = false;
  search.addEventListener("input", filter);
  state.addEventListener("change", filter);
  filter();
  const value = (one, column) => {
    const cell = one.row.cells[column];
    const key = cell.dataset.key;
    return key === undefined ? cell.textContent.toLowerCase() : Number(key);
  };
  [...overview.tHead.rows[0].cells].forEach((head, column) => {
    head.classList.add("sortable");
    head.tabIndex = 0;
    const sort = () => {
      const up = head.getAttribute("aria-sort") === "descending";
      for (const other of overview.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      rows.sort((a, b) => {
        const [x, y] = [value(a, column), value(b, column)];
        return (x < y ? -1 : x > y ? 1 : 0) * (up ? 1 : -1);
      });
      body.append(...rows.map((one) => one.row));
    };
    head.addEventListener("click", sort);
    head.addEventListener("keydown", (event) => { if (event.key === "Enter") sort(); });
  });
})();
