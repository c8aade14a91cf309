// The application: who is signed in, which view is shown, and that it stays up to date.

import { el, setAttribute, setText } from "./dom.js";
import { at } from "./format.js";
import { OperatorView, TenantsView } from "./operator.js";
import { Watch, get, storeKey, storedKey } from "./stream.js";
import { TenantView } from "./tenant.js";

const main = document.getElementById("main");
const nav = document.getElementById("nav");
const status = document.getElementById("status");
const themeButton = document.getElementById("theme");
const signOutButton = document.getElementById("sign-out");
const THEMES = ["system", "light", "dark"];

let watch = null;
let view = null;
let isOperator = sessionStorage.getItem("taximeter.operator") === "yes";
let skewMs = 0;

function show(node, title) {
  main.replaceChildren(node);
  document.title = `${title} · Taximeter`;
}

function say(state, text) {
  setAttribute(status, "data-state", state);
  setText(status, text);
}

function leave() {
  watch?.close();
  watch = view = null;
}

function signIn(problem = "") {
  leave();
  nav.replaceChildren();
  signOutButton.hidden = true;
  say("", "");
  const key = el("input", { id: "key", type: "password", autocomplete: "off", spellcheck: "false", required: true, "aria-describedby": "key-note key-problem" });
  const form = el("form", { class: "sign-in panel", onsubmit: (event) => {
    event.preventDefault();
    const given = key.value.trim();
    // What cannot stand in a header is no key.
    if (!/^[\x21-\x7e]+$/.test(given)) return setText(form.querySelector("#key-problem"), "That is no API key: it has spaces or letters that keys never have.");
    storeKey(given);
    route();
  } },
    el("h1", {}, "Sign in"),
    el("div", { class: "field" }, el("label", { for: "key" }, "API key"), key),
    el("p", { class: "note", id: "key-note" }, "A key with the scope “read”: an operator's, or a tenant's. It stays in this tab and is forgotten with it."),
    el("p", { class: "problem", id: "key-problem", role: "alert" }, problem),
    el("button", { type: "submit", class: "primary" }, "Sign in"));
  show(form, "Sign in");
  key.focus();
}

/** Which views there are to go to. What a key may see is for the server to say. */
function setOperator(is) {
  isOperator = is;
  sessionStorage.setItem("taximeter.operator", is ? "yes" : "no");
}

/** The view of an address: #/ the caller's own, #/tenants, #/tenant/ID. */
function route() {
  if (!storedKey()) return signIn();
  leave();
  const [, place = "", name = ""] = location.hash.split("/");
  signOutButton.hidden = false;
  if (place === "tenants" && isOperator) {
    view = new TenantsView(get);
    show(view.node, view.title);
    say("", "");
    return mark();
  }
  let tenantId = "";
  try {
    if (place === "tenant") tenantId = decodeURIComponent(name);
  } catch {
    // Half an escape names nobody: the caller's own view.
  }
  if (!main.querySelector(".view")) show(el("p", { class: "empty", role: "status" }, "The figures are being read …"), "Taximeter");
  say("waiting", "Connecting …");
  watch = new Watch(tenantId, { onAnswer: (kind, overview) => update(kind, overview, tenantId), onState, onClock });
}

function update(kind, overview, tenantId) {
  const Kind = kind === "installation" ? OperatorView : TenantView;
  if (!(view instanceof Kind)) {
    if (!tenantId) setOperator(kind === "installation");
    view = new Kind();
    view.update(overview, skewMs);
    show(view.node, view.title);
    mark();
    // An address that only an operator has a view for.
    if (location.hash === "#/tenants" && isOperator) return route();
  } else view.update(overview, skewMs);
  document.title = `${view.title} · Taximeter`;
  // Log time is the server's: what has just come is as old as it looks.
  live();
}

function live() {
  const { time, zone } = view?.asOf ?? {};
  say("live", time ? `Live · as of ${at(time, "time", zone)}` : "Live · nothing yet");
}

/** The clock of this device may be wrong by minutes: lags are measured by the server's, which is told in whole seconds. */
function onClock(serverMs) {
  const aheadMs = serverMs - Date.now();
  if (!Number.isNaN(aheadMs)) skewMs = Math.abs(aheadMs) < 3_000 ? 0 : aheadMs;
}

function onState(state, text, code) {
  if (state === "live") return view && live();
  if (state === "lost") return say("lost", `Not up to date: ${text}; trying again …`);
  if (code === 404) {
    say("", "");
    return show(el("div", { class: "view" }, el("h1", {}, "Not found"), el("p", {}, text), el("p", {}, el("a", { href: "#/" }, "Back"))), "Not found");
  }
  storeKey("");
  signIn(text);
}

function mark() {
  const tenantId = location.hash.startsWith("#/tenant/");
  const links = isOperator ? [["#/", "Overview"], ["#/tenants", "Tenants"]] : [];
  nav.replaceChildren(...links.map(([address, name]) => {
    const here = address === (location.hash || "#/") || (tenantId && address === "#/tenants");
    return el("a", { href: address, "aria-current": here ? "page" : null }, name);
  }));
}

function theme() {
  const chosen = document.documentElement.dataset.theme ?? "system";
  setText(themeButton, `Theme: ${chosen}`);
  setAttribute(themeButton, "aria-label", `Theme: ${chosen}. Press for ${THEMES[(THEMES.indexOf(chosen) + 1) % 3]}`);
}

themeButton.addEventListener("click", () => {
  const next = THEMES[(THEMES.indexOf(document.documentElement.dataset.theme ?? "system") + 1) % 3];
  if (next === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = next;
  try {
    localStorage.setItem("taximeter.theme", next);
  } catch {
    // Without storage it holds for this page.
  }
  theme();
});
signOutButton.addEventListener("click", () => {
  storeKey("");
  setOperator(false);
  location.hash = "#/";
  signIn();
});
document.getElementById("skip").addEventListener("click", (event) => {
  event.preventDefault();
  main.focus();
});
addEventListener("hashchange", () => {
  if (!storedKey()) return;
  route();
  scrollTo(0, 0);
});
setInterval(() => view?.tick?.(skewMs), 1_000);
theme();
route();
