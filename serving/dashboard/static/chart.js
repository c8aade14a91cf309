// Bars over time as SVG, with a sentence for who listens and a table for who wants the figures.

import { el, setAttribute, setText } from "./dom.js";
import { share } from "./format.js";
import { Table } from "./table.js";

const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 100;

/** Bars for points {key, label, value (a BigInt), text}. */
export class Bars {
  constructor({ title, point }) {
    this.title = title;
    this.svg = document.createElementNS(SVG, "svg");
    this.svg.setAttribute("preserveAspectRatio", "none");
    this.svg.setAttribute("role", "img");
    this.most = el("span", { class: "most", "aria-hidden": "true" });
    this.first = el("span");
    this.last = el("span");
    this.table = new Table({
      caption: title,
      columns: [
        { head: point, cell: (row) => row.label },
        { head: "Value", number: true, cell: (row) => ({ text: row.text, title: row.title }) },
      ],
      key: (row) => row.key,
      empty: "No usage in this time.",
    });
    this.points = [];
    this.details = el("details", { ontoggle: () => this.list() }, el("summary", {}, "As a table"), this.table.node);
    this.name = el("figcaption", {}, title);
    this.node = el(
      "figure",
      { class: "chart" },
      this.name,
      el("div", { class: "plot" }, this.most, this.svg),
      el("div", { class: "axis", "aria-hidden": "true" }, this.first, this.last),
      this.details,
    );
  }

  update(title, points) {
    setText(this.name, title);
    const highest = points.reduce((most, point) => (!most || point.value > most.value ? point : most), null);
    const used = highest !== null && highest.value > 0n;
    setAttribute(this.svg, "viewBox", `0 0 ${Math.max(points.length, 1) * 10} ${HEIGHT}`);
    setAttribute(
      this.svg,
      "aria-label",
      used ? `${title}: highest ${highest.text} (${highest.label}), last ${points.at(-1).text} (${points.at(-1).label})` : `${title}: nothing`,
    );
    while (this.svg.childElementCount > points.length) this.svg.lastElementChild.remove();
    points.forEach((point, place) => {
      let bar = this.svg.children[place];
      if (!bar) {
        bar = document.createElementNS(SVG, "rect");
        bar.append(document.createElementNS(SVG, "title"));
        this.svg.append(bar);
      }
      const height = used && point.value > 0n ? Math.max(1, (share(point.value, highest.value) * HEIGHT) / 1000) : 0;
      setAttribute(bar, "x", place * 10 + 1);
      setAttribute(bar, "width", 8);
      setAttribute(bar, "y", HEIGHT - height);
      setAttribute(bar, "height", height);
      setText(bar.firstElementChild, `${point.label}: ${point.text}`);
    });
    setText(this.most, used ? highest.text : "");
    setText(this.first, points[0]?.label ?? "");
    setText(this.last, points.at(-1)?.label ?? "");
    this.points = points;
    this.list();
  }

  /** What nobody looks at is not made. */
  list() {
    if (this.details.open) this.table.update([...this.points].reverse().filter((point) => point.value > 0n));
  }
}
