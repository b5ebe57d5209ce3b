"use strict";
// Texts of models come into the page as text nodes alone: nothing here makes markup of a string.

/** An element with a class and a text. */
function element(name, className = "", text = "") {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
}

/** A token's text so that its blanks can be seen. */
function visible(text) {
  return text.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥") || "∅";
}

/** Log-probabilities of a chunk's choice, of either route: one {text, logprob, top} for each token. */
class LogprobReader {
  constructor() {
    this.decoder = new TextDecoder();
  }

  read(said) {
    if (!said) return [];
    if (said.content) {
      // Bytes, because a character may be parted between tokens.
      return said.content.map((entry) => ({
        text: this.decoder.decode(Uint8Array.from(entry.bytes), { stream: true }),
        logprob: entry.logprob,
        top: entry.top_logprobs.map((other) => [other.token, other.logprob]),
      }));
    }
    return said.tokens.map((text, at) => ({
      text,
      logprob: said.token_logprobs[at],
      top: Object.entries(said.top_logprobs[at]),
    }));
  }
}

/** One answer: its text as spans, one for each token where tokens are told, else for each segment. */
class AnswerView {
  constructor(place, tip) {
    this.place = place;
    this.tip = tip;
    this.reader = new LogprobReader();
    this.waiting = []; // tokens whose text has not come: it may be held back
    this.texts = [];
    this.shown = null;
    place.tabIndex = 0;
    place.setAttribute("role", "group");
    place.setAttribute("aria-label", "Answer; arrow keys go from token to token");
    place.addEventListener("pointerover", (event) => this.point(event.target));
    place.addEventListener("pointerleave", () => this.point(null));
    place.addEventListener("click", (event) => this.point(event.target));
    place.addEventListener("keydown", (event) => this.step(event));
    place.addEventListener("blur", () => this.point(null));
  }

  get text() {
    return this.texts.join("");
  }

  /** What a chunk says of a choice; `round` is shown with its tokens. */
  add(choice, round) {
    const said = choice.speculative;
    const reported = this.reader.read(choice.logprobs);
    said.token_ids.forEach((id, at) => {
      if (reported[at]) this.waiting.push({ ...reported[at], id, origin: said.token_origins[at], round });
    });
    for (const segment of said.segments) this.append(segment, this.tokenOf(segment));
  }

  /** The token that gave this text, if it is found among those that wait. */
  tokenOf(segment) {
    const at = this.waiting.findIndex(
      (token) => token.text && token.text.startsWith(segment.text) && token.origin === segment.origin,
    );
    if (at < 0) return null;
    const token = this.waiting[at];
    const rest = token.text.slice(segment.text.length);
    this.waiting.splice(0, rest ? at : at + 1);
    if (rest) this.waiting[0] = { ...token, text: rest };
    return token;
  }

  append(segment, token) {
    const span = element("span", `token ${segment.origin}`, segment.text);
    span.told = { origin: segment.origin, text: segment.text, ...token };
    this.place.append(span);
    this.texts.push(segment.text);
  }

  note(text) {
    this.place.append(element("span", "note", text));
  }

  point(target) {
    const span = target && target.classList.contains("token") ? target : null;
    if (this.shown) this.shown.classList.remove("shown");
    this.shown = span;
    if (!span) return this.tip.hide();
    span.classList.add("shown");
    this.tip.show(span, span.told);
  }

  /** Arrow keys go from token to token. */
  step(event) {
    const spans = [...this.place.querySelectorAll(".token")];
    const now = spans.indexOf(this.shown);
    const next = { ArrowRight: now + 1, ArrowLeft: Math.max(now - 1, 0), Home: 0, End: spans.length - 1 }[event.key];
    if (event.key === "Escape" && this.shown) {
      event.stopPropagation(); // it hides what is told of a token, and the answer goes on
      this.point(null);
    }
    if (next === undefined || !spans[next]) return;
    event.preventDefault();
    spans[next].scrollIntoView({ block: "nearest" });
    this.point(spans[next]);
  }
}

/** What is told of one token, beside it. */
class Tip {
  constructor(box) {
    this.box = box;
    addEventListener("scroll", () => this.hide(), true);
  }

  hide() {
    this.box.hidden = true;
  }

  show(span, told) {
    const head = element("div", "", `${visible(told.text)} `);
    const sure = told.logprob === undefined ? "" : `, ${percent(Math.exp(told.logprob))}`;
    head.append(element("small", "", `${told.origin}${told.round ? `, round ${told.round}` : ""}${sure}`));
    this.box.replaceChildren(head);
    if (told.top && told.top.length) this.box.append(alternatives(told));
    this.box.hidden = false;
    const at = span.getClientRects()[0] || span.getBoundingClientRect();
    const own = this.box.getBoundingClientRect();
    const left = Math.min(Math.max(at.left, 8), innerWidth - own.width - 8);
    const below = at.bottom + 8;
    const top = below + own.height < innerHeight ? below : Math.max(at.top - own.height - 8, 8);
    this.box.style.left = `${left}px`;
    this.box.style.top = `${top}px`;
  }
}

/** The likeliest tokens at a token's place, as a table. */
function alternatives(told) {
  const table = element("table");
  for (const [text, logprob] of [...told.top].sort((a, b) => b[1] - a[1])) {
    const row = element("tr", text === told.text ? "chosen" : "");
    const bar = element("div", "bar");
    bar.style.width = `${Math.max(100 * Math.exp(logprob), 1)}%`;
    const cell = element("td");
    cell.append(bar);
    row.append(element("td", "", visible(text)), element("td", "", percent(Math.exp(logprob))), cell);
    table.append(row);
  }
  return table;
}

/** A fraction as it is shown. */
function percent(fraction) {
  const value = 100 * fraction;
  return `${value >= 9.95 || value === 0 ? Math.round(value) : value.toPrecision(2)} %`;
}
