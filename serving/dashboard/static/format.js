// Figures for people. Money and counts come as texts and stay exact: whole numbers of any size, never floating point.

const PICO_DIGITS = 12;
const group = (digits) => digits.replace(/\B(?=(\d{3})+$)/g, ",");

/** Whole pico of a decimal text: "-1.5" is -1500000000000n. */
export function pico(text) {
  const match = /^(-?)(\d+)(?:\.(\d{1,12}))?$/.exec(text);
  if (!match) throw new RangeError(`amount ${text}: is no decimal number with at most 12 decimals`);
  const value = BigInt(match[2] + (match[3] ?? "").padEnd(PICO_DIGITS, "0"));
  return match[1] ? -value : value;
}

/** All of an amount: "1,234.5000000001". */
export function exact(value, decimals = 2) {
  const digits = (value < 0n ? -value : value).toString().padStart(PICO_DIGITS + 1, "0");
  const rest = digits.slice(-PICO_DIGITS).replace(/0+$/, "").padEnd(decimals, "0");
  return `${value < 0n ? "−" : ""}${group(digits.slice(0, -PICO_DIGITS))}${rest ? "." : ""}${rest}`;
}

/** An amount to be read at a glance: two decimals, or as many as show four digits of what is below one. Half away from zero. */
export function rounded(value) {
  const size = value < 0n ? -value : value;
  let kept = 2;
  if (size > 0n && size < 10n ** 12n) kept = Math.min(PICO_DIGITS, Math.max(2, PICO_DIGITS - size.toString().length + 4));
  const unit = 10n ** BigInt(PICO_DIGITS - kept);
  const near = ((size + unit / 2n) / unit) * unit;
  return exact(value < 0n ? -near : near);
}

/** "1,234,567" */
export const count = (value) => group(BigInt(value).toString());

/** "1.2 M"; exact below ten thousand. */
export function short(value) {
  const whole = BigInt(value);
  for (const [size, name] of [[10n ** 12n, "T"], [10n ** 9n, "G"], [10n ** 6n, "M"], [10n ** 3n, "k"]]) {
    if (whole >= size * (name === "k" ? 10n : 1n)) {
      const tenths = (whole * 10n) / size;
      return `${group((tenths / 10n).toString())}.${tenths % 10n} ${name}`;
    }
  }
  return count(whole);
}

/** `part` / `whole` with one decimal, rounded down; a dash where there is nothing to divide by. */
export function mean(part, whole) {
  if (!whole) return "–";
  const tenths = (part * 10n) / whole;
  return `${group((tenths / 10n).toString())}.${tenths % 10n}`;
}

/** Of `whole`, in thousandths, as a plain number: for lengths of bars alone. */
export const share = (part, whole) => (whole > 0n && part > 0n ? Number((part * 1000n) / whole) : 0);

const MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
const two = (value) => String(value).padStart(2, "0");
const zones = new Map();

/** What a clock and a calendar on a wall of the zone say. A browser takes its time to make what knows zones: UTC needs none. */
function wall(text, zone) {
  const date = new Date(text);
  if (zone === "UTC") {
    return { year: date.getUTCFullYear(), month: date.getUTCMonth() + 1, day: date.getUTCDate(), hour: date.getUTCHours(), minute: date.getUTCMinutes(), second: date.getUTCSeconds() };
  }
  if (!zones.has(zone)) {
    const options = { year: "numeric", month: "numeric", day: "numeric", hour: "numeric", minute: "numeric", second: "numeric" };
    zones.set(zone, new Intl.DateTimeFormat("en-GB", { ...options, calendar: "gregory", hourCycle: "h23", timeZone: zone }));
  }
  return Object.fromEntries(zones.get(zone).formatToParts(date).map(({ type, value }) => [type, Number(value)]));
}

const KINDS = {
  day: ({ day, month }) => `${day} ${MONTHS[month - 1]}`,
  date: (on) => `${KINDS.day(on)} ${on.year}`,
  minute: ({ hour, minute }) => `${two(hour)}:${two(minute)}`,
  time: (on) => `${KINDS.minute(on)}:${two(on.second)}`,
  moment: (on) => `${KINDS.day(on)}, ${KINDS.minute(on)}`,
};

/** A time of an answer; a dash where there never was one. */
export const at = (text, kind, zone = "UTC") => (text ? KINDS[kind](wall(text, zone)) : "–");

/** Which day of a zone that is, as a text that can be compared. */
export const dayOf = (text, zone = "UTC") => at(text, "date", zone);

/** "3 s", "2 min", "5 h", "4 days" */
export function duration(ms) {
  const s = Math.max(0, Math.round(ms / 1000));
  if (s < 120) return `${s} s`;
  if (s < 7200) return `${Math.floor(s / 60)} min`;
  if (s < 172800) return `${Math.floor(s / 3600)} h`;
  return `${count(Math.floor(s / 86400))} days`;
}
