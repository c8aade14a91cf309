// What both views are made of: tiles, figures over time, tables of usage, alerts.

import { Bars } from "./chart.js";
import { el, reconcile, section, setAttribute, setText } from "./dom.js";
import { at, count, dayOf, exact, mean, pico, rounded, share, short } from "./format.js";
import { Table } from "./table.js";

const DAY_MS = 86_400_000;
const NOTHING = { cost: "0", requests: "0", refused_requests: "0", unrated_requests: "0", input_tokens_all: "0", output_tokens_all: "0", gpu_ms: "0" };

/** An amount for a cell or a tile: short to read, exact in `value` and on hover. */
export const amount = (text, currency) => {
  const value = pico(text);
  return { text: `${rounded(value)} ${currency}`, title: `${exact(value)} ${currency}`, value: text };
};
export const number = (text) => ({ text: count(text), value: text });
const brief = (text) => ({ text: short(text), title: count(text), value: String(text) });

export const tokens = (row) => BigInt(row.input_tokens_all) + BigInt(row.output_tokens_all);
// What was refused used nothing.
export const served = (row) => BigInt(row.requests) - BigInt(row.refused_requests);

/** Several rows as one, for each currency. */
export function sums(rows) {
  const by = new Map();
  for (const row of rows) {
    const sum = by.get(row.currency) ?? { ...NOTHING, currency: row.currency, pico: 0n };
    for (const name of Object.keys(NOTHING)) if (name !== "cost") sum[name] = String(BigInt(sum[name]) + BigInt(row[name]));
    sum.pico += pico(row.cost);
    by.set(row.currency, sum);
  }
  return [...by.values()].sort((a, b) => (a.currency < b.currency ? -1 : 1));
}

/** The counts of rows of all currencies. */
export const all = (rows) =>
  rows.reduce((sum, row) => Object.fromEntries(Object.keys(NOTHING).map((name) =>
    [name, name === "cost" ? "0" : String(BigInt(sum[name]) + BigInt(row[name]))])), NOTHING);

/** Figures at the top: {key, name, lines: [{text, title, value}], note, tone}. */
export class Tiles {
  constructor(label) {
    this.node = el("dl", { class: "tiles", "aria-label": label });
  }

  update(tiles) {
    reconcile(this.node, tiles, (tile) => tile.key, () => el("div", { class: "tile" }, el("dt"), el("dd", { class: "figures" }), el("dd", { class: "note" })),
      (node, tile) => {
        const [name, figures, note] = node.children;
        setAttribute(node, "data-tone", tile.tone ?? null);
        setText(name, tile.name);
        reconcile(figures, tile.lines.map((line, place) => ({ ...line, place: String(place) })), (line) => line.place, () => el("data"), (data, line) => {
          setText(data, line.text);
          setAttribute(data, "title", line.title ?? null);
          setAttribute(data, "value", line.value ?? line.text);
        });
        setText(note, tile.note ?? "");
      });
  }
}

export const money = (rows, none) => rows.length
  ? rows.map((row) => ({ text: `${rounded(row.pico)} ${row.currency}`, title: `${exact(row.pico)} ${row.currency}`, value: exact(row.pico, 0).replaceAll(",", "").replace("−", "-") }))
  : [{ text: none }];

export const plain = brief;

/** Average tokens of a request that was served. */
export const average = (rows) => {
  const row = all(rows);
  return { text: mean(tokens(row), served(row)) };
};

/** What is further down the page: filled and laid out when the first figures have been painted. */
export class Below {
  constructor(...children) {
    this.node = el("div", { class: "below", hidden: true }, ...children);
    this.fill = null;
  }

  update(fill) {
    const isFirst = !this.fill;
    this.fill = fill;
    if (!this.node.hidden) fill();
    else if (isFirst) requestAnimationFrame(() => setTimeout(() => {
      this.node.hidden = false;
      this.fill();
    }));
  }
}

const METRICS = {
  spend: { name: "Spend", of: (row) => pico(row.cost), text: (value, currency) => `${rounded(value)} ${currency}`, title: (value, currency) => `${exact(value)} ${currency}` },
  tokens: { name: "Tokens", of: tokens, text: (value) => short(value), title: (value) => count(value) },
  requests: { name: "Requests", of: (row) => BigInt(row.requests), text: (value) => count(value) },
  refused: { name: "Refused", of: (row) => BigInt(row.refused_requests), text: (value) => count(value) },
};

/** Usage over the last hour and the last days; what is drawn can be chosen. */
export class OverTime {
  constructor() {
    this.metric = "spend";
    this.days = new Bars({ title: "By day", point: "Day" });
    this.minutes = new Bars({ title: "Last 60 minutes", point: "Minute" });
    const choices = Object.entries(METRICS).map(([name, metric]) => el("label", {},
      el("input", { type: "radio", name: "metric", value: name, checked: name === this.metric, onchange: () => this.choose(name) }), el("span", {}, metric.name)));
    this.node = section("Usage over time", null,
      el("fieldset", { class: "choices" }, el("legend", { class: "hidden" }, "What is drawn"), ...choices),
      el("div", { class: "charts" }, this.days.node, this.minutes.node));
  }

  choose(name) {
    this.metric = name;
    if (this.last) this.update(...this.last);
  }

  /** Until `latest`, in the days of `zone`. Amounts of several currencies are not added: the one with most days is drawn. */
  update(days, minutes, latest, zone) {
    this.last = [days, minutes, latest, zone];
    const metric = METRICS[this.metric];
    const names = days.map((row) => row.currency);
    const currency = [...new Set(names)].sort((a, b) => names.filter((name) => name === b).length - names.filter((name) => name === a).length)[0] ?? "";
    const drawn = (rows) => (this.metric === "spend" ? rows.filter((row) => row.currency === currency) : rows);
    const point = (key, label, rows) => {
      const value = rows.reduce((sum, row) => sum + metric.of(row), 0n);
      return { key, label, value, text: metric.text(value, currency), title: metric.title?.(value, currency) ?? null };
    };
    const byDay = groupBy(drawn(days), (row) => dayOf(row.start, zone));
    const byMinute = groupBy(drawn(minutes), (row) => Date.parse(row.start));
    const end = latest ? Date.parse(latest) : 0;
    const last = lastDays(end, zone);
    this.days.update(`${metric.name} by day (${zone})`, last.map(({ key, label }) => point(key, label, byDay.get(key) ?? [])));
    const minute = Math.floor(end / 60_000) * 60_000;
    this.minutes.update(`${metric.name}, last 60 minutes`, Array.from({ length: 60 }, (_, place) => minute - (59 - place) * 60_000).map((ms) =>
      point(String(ms), at(new Date(ms).toISOString(), "minute", zone), byMinute.get(ms) ?? [])));
  }
}

function groupBy(rows, key) {
  const by = new Map();
  for (const row of rows) by.set(key(row), [...(by.get(key(row)) ?? []), row]);
  return by;
}

/** The last 30 days of a zone until `end`: each as `dayOf` names it. A day there may have 23 or 25 hours. */
function lastDays(end, zone) {
  const found = new Map();
  for (let ms = end; found.size < 30 && ms > end - 32 * DAY_MS; ms -= DAY_MS / 4) {
    const text = new Date(ms).toISOString();
    const key = dayOf(text, zone);
    if (!found.has(key)) found.set(key, at(text, "day", zone));
  }
  return [...found].reverse().map(([key, label]) => ({ key, label }));
}

/** A table of usage by name, the most expensive first, with how many more there are. */
export class Ranked {
  constructor(title, head, { empty, note = null, unnamed = "(none)", href = null }) {
    this.empty = empty;
    this.table = new Table({
      caption: title,
      columns: [
        { head, cell: (row) => ({ text: row.name || unnamed, href: href?.(row.name) ?? null, bar: row.share }) },
        { head: "Requests", number: true, cell: (row) => number(row.requests) },
        { head: "Refused", number: true, wide: true, cell: (row) => number(row.refused_requests) },
        { head: "Tokens in", number: true, wide: true, cell: (row) => brief(row.input_tokens_all) },
        { head: "Tokens out", number: true, wide: true, cell: (row) => brief(row.output_tokens_all) },
        { head: "Tokens a request", number: true, wide: true, cell: (row) => mean(tokens(row), served(row)) },
        { head: "Cost", number: true, cell: (row) => amount(row.cost, row.currency) },
      ],
      key: (row) => `${row.name} ${row.currency}`,
      empty,
    });
    this.more = el("p", { class: "note" });
    this.node = section(title, note, this.table.node, this.more);
  }

  /** Nothing: it has not come yet. */
  update(top) {
    const rows = top?.rows ?? [];
    setText(this.table.empty, top ? this.empty : "Being counted …");
    const most = rows.reduce((highest, row) => (pico(row.cost) > highest ? pico(row.cost) : highest), 0n);
    this.table.update(rows.map((row) => ({ ...row, share: share(pico(row.cost), most) })));
    const more = BigInt(top?.names ?? 0) - BigInt(rows.length);
    setText(this.more, more > 0n ? `The first ${rows.length} by cost; ${count(more)} more are not shown.` : "");
  }
}

/** Alerts that are not resolved. */
export class Alerts {
  constructor({ whose }) {
    const columns = [
      { head: "Severity", plain: true, cell: (row) => ({ text: row.severity, mark: row.severity }) },
      { head: "What", cell: (row) => ({ text: row.summary || row.rule, title: row.rule }) },
      { head: "State", plain: true, wide: true, cell: (row) => row.state },
      { head: "Raised", plain: true, wide: true, cell: (row) => at(row.raised, "moment") },
    ];
    if (whose) columns.splice(2, 0, { head: "Tenant", wide: true, cell: (row) => ({ text: row.tenant_id || "the system", href: row.tenant_id ? whose(row.tenant_id) : null }) });
    this.table = new Table({ caption: "Active alerts", columns, key: (row) => row.alert_id, empty: "No alert is active." });
    this.more = el("p", { class: "note" });
    this.node = section("Alerts", "Not resolved, newest first; times are UTC.", this.table.node, this.more);
  }

  update({ alerts, active }) {
    this.table.update(alerts);
    const more = BigInt(active) - BigInt(alerts.length);
    setText(this.more, more > 0n ? `${count(more)} more are active.` : "");
  }
}
