"use strict";

/* Sorts the rows of a table by the column whose header was pressed; pressed again, the other way round.
   Unknown values, shown as "-", are last in both directions. Rows with equal values keep their order. */
function makeSorter(table, select, onChange) {
  const headers = [...table.tHead.rows[0].cells], last = headers.length - 1;
  const names = headers.map((header) => header.dataset.sort);
  const smallFirst = ["run", "state", "loss", "held-out ppl"];
  const collator = new Intl.Collator("en", { numeric: true });
  let column = last, isDown = true;

  const valueOf = (row) => {
    const cell = row.cells[column];
    if (column === 0) return cell.querySelector("a").textContent;
    if (column === 1) return row.status;
    if (column === last) return row.status === "running" ? Infinity : Number(cell.dataset.time);
    const [, number, whole] = cell.textContent.replaceAll(",", "").match(/^([\d.]+(?:e[-+]?\d+)?)(?:\/(\d+))?/) || [];
    return number === undefined ? null : whole === undefined ? Number(number) : Number(number) / Math.max(1, Number(whole));
  };
  const compare = (one, other) => {
    const a = one.sorted, b = other.sorted;
    if (a === null || b === null) return (a === null) - (b === null);
    const order = typeof a === "string" ? collator.compare(a, b) : a < b ? -1 : a > b ? 1 : 0;
    return isDown ? -order : order;
  };
  const use = (name, down) => {
    column = names.indexOf(name);
    if (column < 0) column = last;
    isDown = down ?? !smallFirst.includes(names[column]);
    headers.forEach((header) => header.removeAttribute("aria-sort"));
    headers[column].setAttribute("aria-sort", isDown ? "descending" : "ascending");
    select.value = names[column];
    table.caption.textContent = `Runs, sorted by ${names[column]}, ${isDown ? "descending" : "ascending"}`;
  };
  const press = (name) => {
    use(name, names[column] === name ? !isDown : undefined);
    onChange();
  };
  headers.forEach((header) => header.firstElementChild.addEventListener("click", () => press(header.dataset.sort)));
  select.addEventListener("change", () => {
    use(select.value);
    onChange();
  });

  return {
    /* Take the value of a row. Returns: whether it has changed. */
    index: (row) => {
      const value = valueOf(row), isChanged = value !== row.sorted;
      row.sorted = value;
      return isChanged;
    },
    sort: (rows) => rows.sort(compare),
    /* What stands in the address: `loss`, or `-USD` for the largest first; empty for the last updated first. */
    text: () => (column === last && isDown ? "" : `${isDown ? "-" : ""}${names[column]}`),
    read: (text) => use(text.replace(/^-/, ""), text ? text.startsWith("-") : undefined),
  };
}
