// What a tenant sees of itself, and an operator of a tenant.

import { el, section, setText } from "./dom.js";
import { at, count, dayOf, exact, pico, share, short } from "./format.js";
import { Alerts, Below, OverTime, Ranked, Tiles, all, amount, average, money, plain, sums, tokens } from "./parts.js";
import { file } from "./stream.js";
import { Table } from "./table.js";

const SOON_MS = 7 * 86_400_000;

export class TenantView {
  constructor() {
    this.heading = el("h1", {}, "Your usage");
    this.period = el("p", { class: "note" });
    this.tiles = new Tiles("Now");
    this.overTime = new OverTime();
    this.projects = new Ranked("Projects", "Project", { note: "This billing period, by cost.", empty: "No usage in this period." });
    this.models = new Ranked("Models", "Model", { note: "This billing period, by cost.", empty: "No usage in this period." });
    this.users = new Ranked("Users", "User", { note: "This billing period, by cost; counted from the requests every few seconds.", empty: "No usage in this period." });
    this.budgets = new Table({
      caption: "Budgets",
      columns: [
        { head: "Of", cell: (row) => ({ text: row.project_id ? `project ${row.project_id}` : row.user_id ? `user ${row.user_id}` : "the tenant", bar: Math.min(1000, share(pico(row.spend), pico(row.amount))) }) },
        { head: "Spent", number: true, cell: (row) => amount(row.spend, row.currency) },
        { head: "Budget", number: true, cell: (row) => amount(row.amount, row.currency) },
        { head: "When used up", wide: true, cell: (row) => (row.hard_stop ? "requests are refused" : "an alert is raised") },
      ],
      key: (row) => `${row.project_id} ${row.user_id}`,
      empty: "No budget is set.",
    });
    this.invoices = new Table({
      caption: "Invoices",
      columns: [
        { head: "Number", cell: (row) => ({ text: row.number, title: `Save ${row.number} as PDF`, press: () => this.save(row.number) }) },
        { head: "Period", wide: true, cell: (row) => `${at(row.period_start, "date", this.zone)} – ${at(new Date(Date.parse(row.period_end) - 1).toISOString(), "date", this.zone)}` },
        { head: "Issued", cell: (row) => at(row.issued, "date", this.zone) },
        { head: "Total", number: true, cell: (row) => amount(row.total, row.currency) },
        { head: "Due", number: true, cell: (row) => amount(row.due, row.currency) },
      ],
      key: (row) => row.number,
      empty: "No invoice yet.",
    });
    this.saved = el("p", { class: "note", role: "status" });
    this.alerts = new Alerts({ whose: null });
    this.zone = "UTC";
    this.below = new Below(
      this.projects.node, this.models.node, this.users.node,
      el("div", { class: "pair" },
        section("Budgets", null, this.budgets.node),
        section("Invoices", "The newest; press a number to save it as PDF.", this.invoices.node, this.saved)),
      this.alerts.node);
    this.node = el("div", { class: "view" }, this.heading, this.period, this.tiles.node, this.overTime.node, this.below.node);
  }

  update(overview) {
    this.last = overview;
    const { balance, burn } = overview;
    const zone = (this.zone = overview.time_zone);
    const currency = balance.currency;
    const now = overview.as_of ?? balance.as_of;
    const today = overview.days.filter((row) => dayOf(row.start, zone) === dayOf(now, zone));
    const counts = all(overview.period);
    setText(this.heading, balance.display_name || balance.tenant_id);
    const until = new Date(Date.parse(overview.period_end) - 1).toISOString();
    const period = `billing period ${at(overview.period_start, "date", zone)} – ${at(until, "date", zone)} (${zone})`;
    setText(this.period, [balance.tenant_id, balance.status, balance.billing_mode, period].filter(Boolean).join(" · "));
    const left = pico(balance.balance) + pico(balance.credit_limit);
    const soon = burn.depleted && Date.parse(burn.depleted) - Date.parse(burn.end) < SOON_MS;
    this.tiles.update([
      { key: "balance", name: "Balance", lines: [amount(balance.balance, currency)], note: balanceNote(balance), tone: left <= 0n && balance.billing_mode !== "postpaid" ? "bad" : null },
      { key: "burn", name: "Burn rate, a day", lines: [amount(burn.cost_per_day, currency)], note: `from ${at(burn.start, "moment", zone)} on` },
      { key: "depleted", name: "Balance used up", lines: [{ text: !burn.depleted ? "not in sight" : left <= 0n ? "already" : at(burn.depleted, "date", zone), value: burn.depleted ?? "" }],
        note: burn.depleted ? (left <= 0n ? "there is nothing left" : "at this rate") : balance.billing_mode === "postpaid" && pico(balance.credit_limit) === 0n ? "postpaid, without a limit" : "nothing is being used", tone: soon ? "bad" : null },
      { key: "period", name: "Spend this period", lines: money(sums(overview.period), `0.00 ${currency}`), note: `${money(sums(today), `0.00 ${currency}`).map((line) => line.text).join(", ")} today` },
      { key: "tokens", name: "Tokens this period", lines: [plain(tokens(counts))], note: `${short(counts.input_tokens_all)} in, ${short(counts.output_tokens_all)} out` },
      { key: "requests", name: "Requests this period", lines: [plain(counts.requests)], note: `${count(counts.refused_requests)} refused, ${count(counts.unrated_requests)} without a price` },
      { key: "average", name: "Tokens a request", lines: [average(overview.period)], note: "average of this period's served requests" },
      { key: "alerts", name: "Active alerts", lines: [plain(overview.alerts.active)], note: "", tone: overview.alerts.alerts.some((row) => row.severity === "critical") ? "bad" : null },
    ]);
    this.overTime.update(overview.days, overview.minutes, now, zone);
    this.below.update(() => this.fill(overview));
  }

  fill(overview) {
    this.projects.update(overview.projects);
    this.models.update(overview.models);
    this.users.update(overview.users);
    this.budgets.update(overview.budgets);
    this.invoices.update(overview.invoices);
    this.alerts.update(overview.alerts);
  }

  async save(number) {
    setText(this.saved, `${number} is being made …`);
    try {
      const address = URL.createObjectURL(await file(`/v1/invoices/${encodeURIComponent(number)}/document`, { format: "pdf" }));
      el("a", { href: address, download: `${number}.pdf` }).click();
      setTimeout(() => URL.revokeObjectURL(address), 60_000);
      setText(this.saved, `${number} was saved.`);
    } catch (error) {
      setText(this.saved, `${number} could not be made: ${error.message}`);
    }
  }

  tick() {}
  get title() { return this.last ? this.last.balance.display_name || this.last.balance.tenant_id : "Tenant"; }
  get asOf() { return { time: this.last?.as_of, zone: this.zone }; }
}

function balanceNote({ credit_limit: limit, leased, currency }) {
  const parts = [];
  if (pico(limit) > 0n) parts.push(`and ${exact(pico(limit))} ${currency} of credit limit`);
  if (pico(leased) > 0n) parts.push(`${exact(pico(leased))} ${currency} held for running requests`);
  return parts.join("; ") || "granted less spent";
}
