// Questions to the API, and the watch that keeps the page up to date. The key goes in a header alone, never in an address.

const STORED = "taximeter.key";
// The server says something every 15 s.
const SILENCE_MS = 40_000;
const WAIT_MS_MAX = 15_000;

/** What the API answered instead: RFC 9457. */
export class Refused extends Error {
  constructor(status, problem) {
    super(problem.detail ?? problem.title ?? `HTTP ${status}`);
    this.status = status;
  }
}

// The tab's own: it ends with the tab, and no request carries it by itself.
export const storedKey = () => sessionStorage.getItem(STORED) ?? "";
export const storeKey = (key) => (key ? sessionStorage.setItem(STORED, key) : sessionStorage.removeItem(STORED));

async function ask(path, query, signal) {
  const given = Object.entries(query).filter(([, value]) => value);
  const answer = await fetch(`${path}${given.length ? "?" : ""}${new URLSearchParams(given)}`, {
    headers: { authorization: `Bearer ${storedKey()}` },
    cache: "no-store",
    credentials: "omit",
    redirect: "error",
    signal,
  });
  if (!answer.ok) throw new Refused(answer.status, await answer.json().catch(() => ({})));
  return answer;
}

/** The answer of a route. */
export const get = async (path, query = {}) => (await ask(path, query, AbortSignal.timeout(30_000))).json();

/** An answer as a file. */
export const file = async (path, query = {}) => (await ask(path, query, AbortSignal.timeout(60_000))).blob();

/** Watches one overview until it is closed; goes on by itself where a connection was lost. */
export class Watch {
  constructor(tenantId, { onAnswer, onState, onClock }) {
    this.tenantId = tenantId;
    this.onAnswer = onAnswer;
    this.onState = onState;
    this.onClock = onClock;
    this.position = "";
    this.closed = false;
    this.onVisible = () => (document.hidden ? this.abort?.abort() : this.wake?.());
    document.addEventListener("visibilitychange", this.onVisible);
    this.run();
  }

  close() {
    this.closed = true;
    document.removeEventListener("visibilitychange", this.onVisible);
    this.abort?.abort();
    this.wake?.();
  }

  async run() {
    let waitMs = 500;
    while (!this.closed) {
      try {
        // Nobody looks: nothing is asked.
        if (document.hidden) await new Promise((resolve) => (this.wake = resolve));
        if (this.closed) return;
        await this.read(() => (waitMs = 500));
        this.tell("lost", "the connection ended");
      } catch (error) {
        if (this.closed) return;
        if (error instanceof Refused && [401, 403, 404].includes(error.status)) {
          this.onState("refused", error.message, error.status);
          return;
        }
        this.tell("lost", error instanceof Refused ? error.message : "no connection");
      }
      if (document.hidden) continue;
      await new Promise((resolve) => {
        this.wake = resolve;
        setTimeout(resolve, waitMs * (0.5 + Math.random() / 2));
      });
      waitMs = Math.min(waitMs * 2, WAIT_MS_MAX);
    }
  }

  tell(state, text) {
    if (!this.closed && !document.hidden) this.onState(state, text);
  }

  async read(onAnswered) {
    this.abort = new AbortController();
    let silence = setTimeout(() => this.abort.abort(), SILENCE_MS);
    try {
      const answer = await ask("/v1/overview/watch", { tenant_id: this.tenantId, after: this.position }, this.abort.signal);
      this.onClock(Date.parse(answer.headers.get("date") ?? ""));
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      let text = "";
      for (;;) {
        const { value, done } = await reader.read();
        if (done) return;
        clearTimeout(silence);
        silence = setTimeout(() => this.abort.abort(), SILENCE_MS);
        text += value;
        const events = text.split("\n\n");
        text = events.pop();
        for (const event of events) this.take(event, onAnswered);
      }
    } finally {
      clearTimeout(silence);
      this.abort.abort();
    }
  }

  take(event, onAnswered) {
    const fields = Object.fromEntries(event.split("\n").map((line) => [line.split(": ", 1)[0], line.slice(line.indexOf(": ") + 2)]));
    if (!fields.data || this.closed) return;
    const data = JSON.parse(fields.data);
    if (fields.event === "problem") throw new Refused(data.status, data);
    onAnswered();
    this.position = data.position;
    this.onState("live", "");
    if (fields.event !== "position") this.onAnswer(fields.event, data[fields.event]);
  }
}
