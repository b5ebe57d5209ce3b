const NUM_ALTERNATIVES = 5;
const by = (id) => document.getElementById(id);

/** The objects of a stream of server-sent events, as they come. */
async function* eventsOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const content = part.replace(/^data: /, "");
      if (content === "[DONE]") return;
      yield JSON.parse(content);
    }
  }
}

/** The page as a whole. */
class Playground {
  constructor() {
    this.messages = []; // of the chat so far
    this.mayEnter = true;
    this.leaving = null; // ends the answer under way
    this.tip = new Tip(by("tip"));
    const [place, head, said, pick] = [by("tree"), by("rounds-head"), by("tree-said"), by("round-pick")];
    this.rounds = new Rounds({ place, head, said, pick, slider: by("round"), number: by("round-number") });
    this.busy = new Busy(by("strips"), by("load"), (path) => this.get(path), () => this.mayEnter);
    by("ask").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    by("stop").addEventListener("click", () => this.leaving?.abort());
    by("clear").addEventListener("click", () => this.clear());
    by("rule").addEventListener("change", () => this.showRule());
    by("key").addEventListener("change", () => this.enter());
    by("prompt").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) by("ask").requestSubmit();
    });
    addEventListener("keydown", (event) => event.key === "Escape" && this.leaving?.abort());
    for (const mode of document.getElementsByName("mode")) mode.addEventListener("change", () => this.showMode());
    this.enter();
  }

  get isChat() {
    return document.querySelector("[name=mode]:checked").value === "chat";
  }

  headers() {
    return by("key").value ? { authorization: `Bearer ${by("key").value}` } : {};
  }

  get(path) {
    return fetch(path, { headers: this.headers(), credentials: "omit" });
  }

  /** Learns what is served, and what may be asked of it. */
  async enter() {
    try {
      const answer = await this.get("v1/models");
      this.mayEnter = answer.status !== 401;
      if (answer.ok) {
        this.offer((await answer.json()).data[0]);
        this.busy.ask();
      } else await this.refused(answer);
    } catch (error) {
      this.fail(`The server is not reached: ${error.message}`);
    }
  }

  offer(model) {
    this.fail("");
    by("model").textContent = `${model.id}, ${model.max_model_len} tokens of context`;
    const may = model.speculative;
    const methods = may.methods.map((name) => {
      const [label, box] = [element("label", "", ` ${name}`), element("input")];
      Object.assign(box, { type: "checkbox", value: name, checked: true });
      label.prepend(box);
      return label;
    });
    by("methods").replaceChildren(...(methods.length ? methods : [element("small", "", "This server has none.")]));
    for (const [id, names] of [["rule", may.rules], ["judge", may.judges]]) {
      by(id).replaceChildren(...names.map((name) => element("option", "", name)));
    }
    for (const id of ["budget", "depth"]) by(id).max = may[`max_${id}`];
    for (const id of ["epsilon", "delta", "threshold"]) by(id).min = may[`min_${id}`];
    this.showRule();
  }

  showRule() {
    for (const rule of ["typical", "judge"]) {
      for (const field of document.querySelectorAll(`.of-${rule}`)) field.hidden = by("rule").value !== rule;
    }
  }

  showMode() {
    for (const part of document.querySelectorAll(".chat-only")) part.hidden = !this.isChat;
  }

  /** What the fields below say, those that are empty or hidden left out. */
  numbers(...ids) {
    const filled = ids.filter((id) => by(id).value !== "" && !by(id).closest("[hidden]"));
    return Object.fromEntries(filled.map((id) => [id, Number(by(id).value)]));
  }

  speculative() {
    const chosen = [...by("methods").querySelectorAll("input:checked")].map((box) => box.value);
    const said = { origins: true, tree: by("told").checked, ...this.numbers("budget", "depth") };
    if (chosen.length) said.method = chosen;
    else said.budget = 0;
    if (by("rule").value && by("rule").value !== "exact") said.rule = by("rule").value;
    if (said.rule === "judge") said.judge = by("judge").value;
    return { ...said, ...this.numbers("epsilon", "delta", "threshold") };
  }

  /** The path and the body of a request. */
  request(prompt) {
    const told = by("told").checked;
    const body = {
      stream: true,
      stream_options: { include_usage: true, continuous_usage_stats: true },
      speculative: this.speculative(),
      ...this.numbers("temperature", "seed", "max_tokens"),
    };
    if (!this.isChat) return ["v1/completions", { ...body, prompt, ...(told ? { logprobs: NUM_ALTERNATIVES } : {}) }];
    const system = by("system").value ? [{ role: "system", content: by("system").value }] : [];
    const messages = [...system, ...this.messages, { role: "user", content: prompt }];
    const reported = told ? { logprobs: true, top_logprobs: NUM_ALTERNATIVES } : {};
    return ["v1/chat/completions", { ...body, messages, ...reported }];
  }

  async send() {
    if (this.leaving) return;
    const prompt = by("prompt").value;
    const [path, body] = this.request(prompt);
    const isChat = this.isChat;
    this.leaving = new AbortController();
    this.fail("");
    this.rounds.clear();
    if (!isChat) by("transcript").replaceChildren();
    const [turn, place] = [element("div", "turn"), element("div", "answer")];
    turn.append(element("p", "asked", prompt), place);
    by("transcript").append(turn);
    this.answer = new AnswerView(place, this.tip);
    this.show({ isUnderWay: true });
    const state = await this.stream(path, body);
    this.leaving = null;
    this.rounds.follow();
    if (isChat && this.answer.text && state !== "failed") {
      this.messages.push({ role: "user", content: prompt }, { role: "assistant", content: this.answer.text });
    }
    if (state !== "stop" && this.answer.text) this.answer.note(state === "length" ? " … (cut at the limit)" : ` … (${state})`);
    if (!this.answer.text && state === "failed") turn.remove();
    this.show({ isUnderWay: false, state });
  }

  /** Why the answer ended. */
  async stream(path, body) {
    const clock = { first: 0, firstTokens: 0, rounds: 0 };
    let ended = "failed";
    try {
      const headers = { ...this.headers(), "content-type": "application/json" };
      const answer = await fetch(path, {
        method: "POST", headers, body: JSON.stringify(body), signal: this.leaving.signal, credentials: "omit",
      });
      if (!answer.ok) {
        await this.refused(answer);
        return ended;
      }
      for await (const chunk of eventsOf(answer.body)) {
        if (chunk.error) {
          this.fail(chunk.error.message);
          return "failed";
        }
        this.busy.wake();
        for (const choice of chunk.choices) {
          this.answer.add(choice, chunk.usage.speculative.rounds);
          this.rounds.add(choice);
          ended = choice.finish_reason ?? ended;
        }
        if (chunk.usage) this.count(chunk.usage, clock);
      }
    } catch (error) {
      if (error.name === "AbortError") return "stopped";
      this.fail(`The stream broke: ${error.message}`);
    }
    return ended;
  }

  count(usage, clock) {
    const now = performance.now();
    const [tokens, said] = [usage.completion_tokens, usage.speculative];
    if (!clock.first) Object.assign(clock, { first: now, firstTokens: tokens });
    // The chunk after the last token repeats its counts: no time passes for it.
    if (tokens !== clock.tokens) Object.assign(clock, { tokens, last: now });
    const seconds = (clock.last - clock.first) / 1000;
    by("num-tokens").textContent = tokens;
    by("speed").textContent = seconds > 0 ? ((tokens - clock.firstTokens) / seconds).toFixed(1) : "–";
    by("length").textContent = said.rounds ? (tokens / said.rounds).toFixed(2) : "–";
    by("accepted").textContent = said.drafted ? percent(said.accepted / said.drafted) : "–";
    by("kept").textContent = said.kept;
  }

  /** An answer of HTTP that is an error. */
  async refused(answer) {
    let message = answer.statusText;
    try {
      message = (await answer.json()).error.message;
    } catch {
      // Somebody between the two answered; the status has to do.
    }
    if (answer.status === 401) {
      by("key-box").hidden = false;
      if (!this.leaving) by("key").focus();
    }
    this.fail(`${answer.status}: ${message}`);
  }

  fail(message) {
    by("error").textContent = message;
    by("error").hidden = !message;
  }

  clear() {
    this.leaving?.abort();
    this.messages = [];
    by("transcript").replaceChildren();
    this.rounds.clear();
    this.tip.hide();
    this.fail("");
    for (const id of ["num-tokens", "speed", "length", "accepted", "kept"]) by(id).textContent = "–";
  }

  show({ isUnderWay, state = "" }) {
    by("send").disabled = isUnderWay;
    by("stop").disabled = !isUnderWay;
    document.body.dataset.state = isUnderWay ? "busy" : state || "idle";
    by("status").textContent = isUnderWay ? "answering …" : { stop: "done", length: "cut at the limit" }[state] || state;
  }
}

new Playground();
