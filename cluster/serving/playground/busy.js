const [NUM_SAMPLES, SOON_MS, LATER_MS, AWAKE_MS] = [60, 1000, 5000, 10000];
const BUSY = /^outrider_busy_seconds_total\{(.*)\} (\S+)$/;

/** Seconds of work from the text of /metrics: {worker: {kind: seconds}}. */
function readBusy(text) {
  const found = {};
  for (const line of text.split("\n")) {
    const match = BUSY.exec(line);
    if (!match) continue;
    const labels = Object.fromEntries([...match[1].matchAll(/(\w+)="([^"]*)"/g)].map((label) => label.slice(1)));
    (found[labels.worker] ??= {})[labels.kind] = Number(match[2]);
  }
  return found;
}

/** A gauge from the text of /metrics. */
function readGauge(text, name) {
  const line = text.split("\n").find((other) => other.startsWith(`${name}{`));
  return line ? Number(line.slice(line.lastIndexOf(" "))) : null;
}

/** One worker: its name, its busy share over the last minute, and now. */
class Strip {
  constructor(worker) {
    this.row = element("div", `strip${worker === "draft" ? " of-draft" : ""}`);
    this.drawing = drawn("svg", { viewBox: `0 0 ${NUM_SAMPLES} 100`, preserveAspectRatio: "none", role: "img" });
    this.share = element("span", "share", "–");
    this.kinds = element("span", "kinds");
    this.row.append(element("span", "", worker), this.drawing, this.share, this.kinds);
    this.worker = worker;
    this.shares = [];
  }

  /** `shares`: fraction of the time, by kind of work; `wait` is none. */
  add(shares) {
    const kinds = Object.entries(shares).filter(([kind]) => kind !== "wait");
    const share = Math.min(kinds.reduce((sum, [, part]) => sum + part, 0), 1);
    this.shares = [...this.shares, share].slice(-NUM_SAMPLES);
    const first = NUM_SAMPLES - this.shares.length;
    this.drawing.replaceChildren(
      ...this.shares.map((part, at) => drawn("rect", { x: first + at, y: 100 - 100 * part, width: 0.85, height: 100 * part })),
    );
    this.share.textContent = `${Math.round(100 * share)} %`;
    const largest = kinds.filter(([, part]) => part >= 0.005).sort((a, b) => b[1] - a[1]);
    this.kinds.textContent = largest.map(([kind, part]) => `${kind} ${Math.round(100 * part)} %`).join(" · ") || "idle";
    this.drawing.setAttribute("aria-label", `${this.worker} is busy ${this.share.textContent} of the time`);
  }
}

/** Asks /metrics who is busy: every second while something happens, less often otherwise, not in a hidden page. */
class Busy {
  /** `get`: fetches a path; `isOpen`: whether the server lets this page in. */
  constructor(place, load, get, isOpen) {
    Object.assign(this, { place, load, get, isOpen, strips: {}, before: null, awakeUntil: 0, timer: 0 });
    document.addEventListener("visibilitychange", () => this.ask());
  }

  /** An answer begins or goes on. */
  wake() {
    const slept = performance.now() > this.awakeUntil;
    this.awakeUntil = performance.now() + AWAKE_MS;
    if (slept) this.ask();
  }

  async ask() {
    clearTimeout(this.timer);
    if (document.hidden || !this.isOpen()) return;
    this.timer = setTimeout(() => this.ask(), performance.now() < this.awakeUntil ? SOON_MS : LATER_MS);
    try {
      const answer = await this.get("metrics");
      if (answer.ok) this.take(await answer.text(), performance.now());
      else this.load.textContent = "The server does not tell.";
    } catch {
      this.load.textContent = "The server is not reached.";
    }
  }

  take(text, now) {
    const [running, waiting, pages] = ["num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"].map(
      (name) => readGauge(text, `vllm:${name}`),
    );
    const isStanding = running !== null && pages !== null;
    this.load.textContent = isStanding
      ? `${running} running, ${waiting} waiting, ${percent(pages)} of the KV pages in use`
      : "Workers are being started.";
    const said = readBusy(text);
    if (this.before) {
      const seconds = (now - this.before.now) / 1000;
      for (const [worker, kinds] of Object.entries(said)) {
        const known = this.before.said[worker] || {};
        // A worker that was started again counts from zero.
        const part = ([kind, total]) => [kind, Math.max(total - (known[kind] ?? total), 0) / seconds];
        if (!this.strips[worker]) this.place.append((this.strips[worker] = new Strip(worker)).row);
        this.strips[worker].add(Object.fromEntries(Object.entries(kinds).map(part)));
      }
    }
    this.before = { said, now };
  }
}
