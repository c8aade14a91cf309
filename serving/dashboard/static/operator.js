// What an operator sees of the whole installation.

import { el, section, setText } from "./dom.js";
import { at, count, dayOf, duration, mean, pico, short } from "./format.js";
import { Alerts, Below, OverTime, Ranked, Tiles, all, amount, average, money, number, plain, sums, tokens } from "./parts.js";
import { Table } from "./table.js";

export const tenantAddress = (tenantId) => (tenantId ? `#/tenant/${encodeURIComponent(tenantId)}` : null);
// The unit in which a producer states GPU time; see docs/dashboard.md.
const GPU_UNIT = "gpu_ms";
const LATE_MS = 10_000;

export class OperatorView {
  constructor() {
    this.tiles = new Tiles("Now");
    this.overTime = new OverTime();
    this.tenants = new Ranked("Top consumers", "Tenant", {
      note: "The last 30 days, by cost.", empty: "No tenant has used anything yet.", href: tenantAddress,
    });
    this.models = new Ranked("Models", "Model", { note: "The last 30 days, by cost.", empty: "No model was used yet." });
    this.alerts = new Alerts({ whose: tenantAddress });
    this.rejected = new Table({
      caption: "What was not accepted, by reason",
      columns: [{ head: "Reason", cell: (row) => row.reason.replaceAll("_", " ") }, { head: "Events", number: true, cell: (row) => number(row.count) }],
      key: (row) => row.reason,
      empty: "Everything that came was accepted.",
    });
    this.refused = el("p");
    this.complete = el("p");
    this.partitions = new Table({
      caption: "Partitions of the ledger",
      columns: [
        { head: "Partition", cell: (row) => String(row.partition) },
        { head: "Record", number: true, cell: (row) => number(row.sequence) },
        { head: "Log time (UTC)", number: true, cell: (row) => at(row.log_time, "time") },
        { head: "Record to database", number: true, wide: true, cell: (row) => duration(Date.parse(row.written) - Date.parse(row.log_time)) },
        { head: "Behind", number: true, cell: (row) => ({ text: duration(row.behindMs), mark: row.behindMs > LATE_MS ? "warning" : "ok" }) },
      ],
      key: (row) => String(row.partition),
      empty: "The database has no record yet: is the sink running?",
    });
    this.gpu = el("p");
    this.below = new Below(
      this.tenants.node, this.models.node,
      el("div", { class: "pair" },
        section("Refusals", "The last 30 days.", this.refused, this.rejected.node),
        section("GPU time", "The last 30 days.", this.gpu)),
      section("Pipeline", "How far the database is behind the ledger, and what has not come.", this.complete, this.partitions.node),
      this.alerts.node);
    this.node = el("div", { class: "view" }, el("h1", {}, "All tenants"), this.tiles.node, this.overTime.node, this.below.node);
  }

  /** `skewMs`: how far the server's clock is ahead of this one's. */
  update(overview, skewMs) {
    this.last = overview;
    const latest = overview.latest;
    const today = overview.days.filter((row) => dayOf(row.start) === dayOf(latest));
    const counts = all(today);
    const accounts = overview.accounts;
    const tenants = accounts.reduce((sum, row) => sum + BigInt(row.tenants), 0n);
    const idle = accounts.filter((row) => row.status !== "active").map((row) => `${count(row.tenants)} ${row.status}`);
    const hour = all(overview.minutes);
    const critical = overview.alerts.alerts.filter((row) => row.severity === "critical").length;
    this.tiles.update([
      { key: "today", name: "Spend today", lines: money(sums(today), "–"), note: latest ? `${at(latest, "date")}, UTC` : "no usage yet" },
      { key: "hour", name: "Spend, last 60 minutes", lines: money(sums(overview.minutes), "–"), note: `${short(tokens(hour))} tokens` },
      { key: "tokens", name: "Tokens today", lines: [plain(tokens(counts))], note: `${short(counts.input_tokens_all)} in, ${short(counts.output_tokens_all)} out` },
      { key: "requests", name: "Requests today", lines: [plain(counts.requests)], note: `${count(counts.refused_requests)} refused, ${count(counts.unrated_requests)} without a price` },
      { key: "average", name: "Tokens a request", lines: [average(today)], note: "average of today's served requests" },
      { key: "tenants", name: "Tenants", lines: [plain(tenants)], note: idle.join(", ") || (tenants ? "all active" : "create one: taximeter tenant create NAME") },
      { key: "balance", name: "Balances", lines: money(balances(accounts), "–"), note: "of all tenants" },
      { key: "alerts", name: "Active alerts", lines: [plain(overview.alerts.active)], note: critical ? `${critical} critical among the newest` : "", tone: critical ? "bad" : null },
    ]);
    this.overTime.update(overview.days, overview.minutes, latest, "UTC");
    this.below.update(() => this.fill(overview, skewMs));
  }

  fill(overview, skewMs) {
    this.tenants.update(overview.tenants);
    this.models.update(overview.models);
    this.rejected.update(overview.rejected);
    const days = all(overview.days);
    setText(this.refused, days.refused_requests === "0" ? "No request was refused." :
      `${count(days.refused_requests)} of ${count(days.requests)} requests, ${mean(BigInt(days.refused_requests) * 100n, BigInt(days.requests))} %, ` +
      "were refused by a gateway or not delivered by a back end. They are charged nothing.");
    setText(this.gpu, gpuText(days));
    this.alerts.update(overview.alerts);
    setText(this.complete, completeText(overview.completeness));
    this.tick(skewMs);
  }

  /** What changes with the clock alone. */
  tick(skewMs) {
    const now = Date.now() + skewMs;
    this.partitions.update((this.last?.partitions ?? []).map((row) => ({ ...row, behindMs: now - Date.parse(row.log_time) })));
  }

  get title() { return "All tenants"; }
  get asOf() { return { time: this.last?.as_of, zone: "UTC" }; }
}

function balances(accounts) {
  const by = new Map();
  for (const row of accounts) by.set(row.currency, (by.get(row.currency) ?? 0n) + pico(row.balance));
  return [...by].sort().map(([currency, sum]) => ({ currency, pico: sum }));
}

function gpuText(days) {
  const gpuMs = days.gpu_ms;
  if (gpuMs === "0") return `No producer states GPU time (the unit ${GPU_UNIT}), so there is nothing to hold against the ${short(tokens(days))} tokens that were billed.`;
  const seconds = BigInt(gpuMs) / 1000n;
  return `${count(seconds)} GPU seconds for ${count(tokens(days))} tokens billed: ${mean(tokens(days) * 1000n, BigInt(gpuMs))} tokens a GPU second.`;
}

function completeText(state) {
  if (!state) return "What has not come is being counted …";
  if (state.problem) return `What has not come cannot be told: ${state.problem}`;
  if (state.producers === "0") return "No producer numbers its events yet.";
  const missing = state.missing_events === "0" ? "Nothing is missing" : `${count(state.missing_events)} events are missing`;
  return `${missing} of what ${count(state.producers)} producers numbered; ${count(state.under_way_events)} are under way, ${count(state.silent_producers)} producers are silent.`;
}

const PAGE = 50;

/** Every tenant with its balance: searched and turned over here, read in large pages. */
export class TenantsView {
  constructor(get) {
    this.get = get;
    this.rows = [];
    this.page = 0;
    this.search = el("input", { id: "search", type: "search", autocomplete: "off", spellcheck: "false", oninput: () => { this.page = 0; this.show(); } });
    this.found = el("p", { class: "note", role: "status" });
    this.table = new Table({
      caption: "Tenants",
      columns: [
        { head: "Tenant", cell: (row) => ({ text: row.tenant_id, title: row.display_name || null, href: tenantAddress(row.tenant_id) }) },
        { head: "Name", wide: true, cell: (row) => row.display_name },
        { head: "Status", cell: (row) => ({ text: row.status, mark: row.status === "active" ? "ok" : "warning" }) },
        { head: "Requests", number: true, wide: true, cell: (row) => number(row.requests) },
        { head: "Spend", number: true, wide: true, cell: (row) => amount(row.spend, row.currency) },
        { head: "Balance", number: true, cell: (row) => amount(row.balance, row.currency) },
      ],
      key: (row) => row.tenant_id,
      empty: "No tenant fits.",
    });
    this.before = el("button", { type: "button", onclick: () => this.turn(-1) }, "Previous");
    this.after = el("button", { type: "button", onclick: () => this.turn(1) }, "Next");
    this.where = el("span", { class: "note" });
    this.node = el("div", { class: "view" }, el("h1", {}, "Tenants"),
      section("By name", null,
        el("div", { class: "field" }, el("label", { for: "search" }, "Search by ID or name"), this.search),
        this.found, this.table.node, el("div", { class: "pages" }, this.before, this.where, this.after)));
    this.load();
  }

  async load() {
    try {
      const rows = [];
      for (let token = ""; ;) {
        const answer = await this.get("/v1/tenants", { page_size: "1000", page_token: token });
        rows.push(...answer.tenants);
        this.rows = rows;
        this.show();
        token = answer.next_page_token;
        if (!token) return;
      }
    } catch (error) {
      setText(this.found, `The list could not be read: ${error.message}`);
    }
  }

  turn(pages) {
    this.page += pages;
    this.show();
    this.table.frame.scrollIntoView({ block: "nearest" });
  }

  show() {
    const asked = this.search.value.trim().toLowerCase();
    const fitting = this.rows.filter((row) => `${row.tenant_id}\n${row.display_name}`.toLowerCase().includes(asked));
    const pages = Math.max(1, Math.ceil(fitting.length / PAGE));
    this.page = Math.min(Math.max(this.page, 0), pages - 1);
    this.table.update(fitting.slice(this.page * PAGE, (this.page + 1) * PAGE));
    setText(this.found, this.rows.length ? `${count(fitting.length)} of ${count(this.rows.length)} tenants` : "There is no tenant yet: taximeter tenant create NAME");
    setText(this.where, `Page ${this.page + 1} of ${pages}`);
    this.before.disabled = this.page === 0;
    this.after.disabled = this.page === pages - 1;
  }

  get title() { return "Tenants"; }
}
