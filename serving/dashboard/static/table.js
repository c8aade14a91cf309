// Tables that are kept up to date in place.

import { el, reconcile, setAttribute, setText } from "./dom.js";

/**
 * A table of rows. Columns: `head`, `cell(row)`, which gives a text or {text, title, href, mark, bar}, `number` for what is
 * aligned right, `wide` for what a phone does without, and `plain` for what stays in one line.
 */
export class Table {
  constructor({ caption, columns, key, empty }) {
    this.columns = columns;
    this.key = key;
    this.body = el("tbody");
    const heads = columns.map((column) => el("th", { scope: "col", class: kind(column) }, column.head));
    this.table = el("table", {}, el("caption", { class: "hidden" }, caption), el("thead", {}, el("tr", {}, ...heads)), this.body);
    this.frame = el("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": caption }, this.table);
    this.empty = el("p", { class: "empty" }, empty);
    this.node = el("div", {}, this.frame, this.empty);
    this.update([]);
  }

  update(rows) {
    this.frame.hidden = rows.length === 0;
    this.empty.hidden = rows.length > 0;
    reconcile(this.body, rows, this.key, () => this.row(), (node, row) => this.fill(node, row));
  }

  row() {
    const cells = this.columns.map((column, place) =>
      el(place ? "td" : "th", { scope: place ? null : "row", class: kind(column) }));
    return el("tr", {}, ...cells);
  }

  fill(node, row) {
    this.columns.forEach((column, place) => {
      const given = column.cell(row);
      fillCell(node.children[place], typeof given === "string" ? { text: given } : given);
    });
  }
}

const kind = (column) => ["number", "wide", "plain"].filter((name) => column[name]).join(" ") || null;

function fillCell(cell, { text, title = null, value = null, href = null, press = null, mark = null, bar = null }) {
  let inner = cell.firstElementChild;
  if (!inner) {
    inner = press ? el("button", { type: "button", class: "link" }) : el(href ? "a" : value === null ? "span" : "data");
    cell.append(inner);
  }
  if (press) inner.onclick = press;
  setText(inner, text);
  setAttribute(inner, "href", href);
  setAttribute(inner, "title", title);
  setAttribute(inner, "value", value);
  if (mark !== null) setAttribute(inner, "class", `mark ${mark}`);
  if (bar !== null) {
    let length = cell.querySelector(".share");
    if (!length) {
      length = el("span", { class: "share", "aria-hidden": "true" }, el("span"));
      cell.append(length);
    }
    length.firstElementChild.style.width = `${bar / 10}%`;
  }
}
