const SVG = "http://www.w3.org/2000/svg";
const [ROW, BOX_HEIGHT, GAP, CHARACTER, MOST_CHARACTERS] = [32, 24, 34, 7.9, 14];

/** An element of a drawing. */
function drawn(name, attributes, className = "") {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (className) made.setAttribute("class", className);
  return made;
}

/**
 * A round as nodes to draw: {text, parent, kind, children, depth}. What came out stands first among its siblings,
 * and the target's own token at its end.
 */
function nodesOf(round) {
  const { tree, origins, own } = round;
  const nodes = tree.tokens.map((text, at) => ({ text, parent: tree.parents[at], kind: at ? "refused" : "root" }));
  tree.accepted.forEach((node, at) => (nodes[node].kind = origins[at]));
  const last = tree.accepted.at(-1) ?? 0;
  if (own !== null) nodes.push({ text: own, parent: last, kind: "target" });
  for (const node of nodes) node.children = [];
  nodes.forEach((node, at) => {
    if (!at) return void (node.depth = 0);
    node.depth = nodes[node.parent].depth + 1;
    const siblings = nodes[node.parent].children;
    if (node.kind === "refused") siblings.push(at);
    else siblings.unshift(at);
  });
  return nodes;
}

/** Gives every node its row: the first child stands beside its parent, the others below. */
function placeRows(nodes) {
  let rows = 0;
  const waiting = [[0, 0]];
  while (waiting.length) {
    const [at, isFirst] = waiting.pop();
    nodes[at].row = isFirst ? nodes[nodes[at].parent].row : rows++;
    const children = nodes[at].children.map((child, place) => [child, place === 0]);
    waiting.push(...children.reverse());
  }
  return rows;
}

/** A drawing of what a round verified. */
function drawTree(round) {
  const nodes = nodesOf(round);
  const rows = placeRows(nodes);
  const widths = []; // by depth
  for (const node of nodes) {
    const characters = [...visible(node.text)];
    const isCut = characters.length > MOST_CHARACTERS;
    node.label = isCut ? `${characters.slice(0, MOST_CHARACTERS - 1).join("")}…` : characters.join("");
    node.width = Math.max([...node.label].length, 1) * CHARACTER + 14;
    widths[node.depth] = Math.max(widths[node.depth] || 0, node.width);
  }
  const lefts = [2];
  widths.forEach((width, depth) => (lefts[depth + 1] = lefts[depth] + width + GAP));
  const [width, height] = [lefts.at(-1) - GAP + 2, rows * ROW];
  const drawing = drawn("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": tell(round) });
  const middle = (node) => node.row * ROW + ROW / 2;
  for (const node of nodes.slice(1).sort((a, b) => (a.kind !== "refused") - (b.kind !== "refused"))) {
    const above = nodes[node.parent];
    const [x, y, toX, toY] = [lefts[above.depth] + above.width, middle(above), lefts[node.depth], middle(node)];
    const bend = lefts[node.depth] - GAP / 2;
    const line = `M${x} ${y}H${bend - GAP / 4}C${bend + 4} ${y} ${bend - 4} ${toY} ${bend + GAP / 4} ${toY}H${toX}`;
    drawing.append(drawn("path", { d: line }, node.kind === "refused" ? "" : "taken"));
  }
  for (const node of nodes) {
    const group = drawn("g", { transform: `translate(${lefts[node.depth]} ${middle(node) - BOX_HEIGHT / 2})` }, node.kind);
    const label = drawn("text", { x: 7, y: 16.5 });
    label.textContent = node.label;
    const title = drawn("title", {});
    title.textContent = `${visible(node.text)}: ${{ root: "where the round began", refused: "refused" }[node.kind] || node.kind}`;
    group.append(title, drawn("rect", { width: node.width, height: BOX_HEIGHT, rx: 5 }), label);
    drawing.append(group);
  }
  return drawing;
}

/** The same in a sentence. */
function tell(round) {
  const [drafted, accepted] = [round.tree.tokens.length - 1, round.tree.accepted.length];
  if (!drafted) return "Nothing was drafted: the target's own token alone came out.";
  const after = round.own === null ? "" : ", then the target's own";
  return `${drafted} drafted, ${accepted} accepted${after}.`;
}

/** Trees of an answer's rounds, one of them drawn: the last, unless another is picked. */
class Rounds {
  constructor(parts) {
    this.parts = parts; // place, head, said, pick, slider, number
    this.rounds = [];
    this.wanted = null;
    parts.slider.addEventListener("input", () => this.choose(Number(parts.slider.value) - 1));
  }

  clear() {
    this.rounds = [];
    if (this.wanted !== null) cancelAnimationFrame(this.wanted);
    this.wanted = null;
    this.parts.head.textContent = "Tree of the last round";
    this.parts.place.hidden = this.parts.pick.hidden = true;
    this.parts.said.textContent = "What was drafted appears here, and what became of it.";
  }

  /** A chunk's choice came. Whose token follows the accepted ones is the target's own. */
  add(choice) {
    const said = choice.speculative;
    if (!said.tree) return;
    const at = said.tree.accepted.length;
    const reported = choice.logprobs;
    const text = reported && (reported.content ? reported.content[at]?.token : reported.tokens[at]);
    const own = said.token_origins[at] === "target" ? text ?? null : null;
    this.rounds.push({ tree: said.tree, origins: said.token_origins, own });
    this.wanted ??= requestAnimationFrame(() => this.follow());
  }

  /** Draws the last round, once for all that came meanwhile. */
  follow() {
    if (this.wanted !== null) cancelAnimationFrame(this.wanted);
    this.wanted = null;
    const { slider } = this.parts;
    const isAtEnd = slider.value === slider.max;
    slider.max = this.rounds.length;
    if (isAtEnd || this.parts.place.hidden) slider.value = slider.max;
    if (this.rounds.length) this.choose(Number(slider.value) - 1);
  }

  choose(at) {
    const { place, head, said, pick, number } = this.parts;
    head.textContent = at === this.rounds.length - 1 ? "Tree of the last round" : `Tree of round ${at + 1}`;
    number.textContent = `${at + 1} of ${this.rounds.length}`;
    said.textContent = tell(this.rounds[at]);
    place.replaceChildren(drawTree(this.rounds[at]));
    place.hidden = pick.hidden = false;
  }
}
