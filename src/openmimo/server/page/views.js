// What is drawn beside the conversation: drafts, a token's alternatives, experts, the cache.

const element = (id) => document.getElementById(id);

export function node(kind, attributes = {}, ...children) {
  const made = document.createElement(kind);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "text") made.textContent = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

// Spaces and line breaks that would not be seen are shown as signs.
export const visible = (text) => (text === "" ? "∅" : text.replaceAll("\n", "⏎").replaceAll(" ", "·"));

// What the steps of an answer gave, and how fast.
export class Tally {
  constructor(numHeads) {
    this.accepted = new Array(numHeads).fill(0);
    this.verified = new Array(numHeads).fill(0);
    this.histogram = new Array(numHeads + 1).fill(0);
    this.tokens = 0;
    this.steps = 0;
    this.began = this.last = performance.now();
  }

  add(step, isFirst) {
    const now = performance.now();
    if (isFirst) this.began = now;
    else {
      // The first token comes with the prompt and is no step.
      this.steps += 1;
      const kept = step.tokens.filter((token) => token.head !== null).length;
      this.histogram[Math.min(kept, this.histogram.length - 1)] += 1;
      for (const token of step.tokens) if (token.head) { this.accepted[token.head - 1] += 1; this.verified[token.head - 1] += 1; }
      for (const token of step.rejected) if (token.head <= this.verified.length) this.verified[token.head - 1] += 1;
      this.tokens += step.tokens.length;
    }
    this.last = now;
  }

  get speed() { return this.last > this.began ? (1000 * this.tokens) / (this.last - this.began) : 0; }
  get length() { return this.steps ? this.tokens / this.steps : 0; }
}

export function showTally(tally) {
  element("speed").textContent = tally.speed ? Math.round(tally.speed).toLocaleString("en") : "–";
  element("length").textContent = tally.length ? tally.length.toFixed(2) : "–";
  const most = Math.max(1, ...tally.histogram);
  element("steps").replaceChildren(
    ...tally.histogram.map((count, place) => node("i", { style: `height:${(100 * count) / most}%`, title: `${count} steps gave ${place + 1}` })),
  );
  element("heads").tBodies[0].replaceChildren(
    ...tally.accepted.map((count, head) =>
      node("tr", {}, node("td", { text: String(head + 1) }),
        node("td", { text: tally.verified[head] ? `${((100 * count) / tally.verified[head]).toFixed(0)}% (${count})` : "–" }),
        node("td", { text: String(tally.verified[head]) }))),
  );
}

export function showComparison(runs) {
  element("compare").tBodies[0].replaceChildren(
    ...Object.entries(runs).map(([name, run]) =>
      node("tr", {}, node("td", { text: name }), node("td", { text: Math.round(run.speed).toLocaleString("en") }), node("td", { text: run.length.toFixed(2) }))),
  );
}

export function showToken(token) {
  const rows = token.top.map(([, text, logprob]) =>
    node("tr", {}, node("td", { text: visible(text) }), node("td", { text: `${(100 * Math.exp(logprob)).toFixed(1)}%` }), node("td", { text: logprob.toFixed(3) })));
  const by = token.head === null ? "the model itself" : `head ${token.head}, accepted`;
  element("inspector").replaceChildren(
    node("p", {}, node("b", { text: visible(token.text) }), ` id ${token.id}, by ${by}` + (token.logprob === null ? "" : `, ${(100 * Math.exp(token.logprob)).toFixed(1)}%`)),
    node("table", {}, node("caption", { text: "Most probable here" }), node("thead", {}, node("tr", {}, node("th", { text: "Token" }), node("th", { text: "Probability" }), node("th", { text: "Log" }))), node("tbody", {}, ...rows)),
  );
}

// `routes` has shape [tokens, layers, k]; `row` chooses a token, null counts over all rows from `first` on.
export function drawExperts(routes, numExperts, row, first) {
  const canvas = element("experts");
  const [rows, layers, k] = routes.shape;
  const counts = Array.from({ length: layers }, () => new Array(numExperts).fill(0));
  for (let token = row ?? first; token < (row === null ? rows : Math.min(row + 1, rows)); token += 1)
    for (let layer = 0; layer < layers; layer += 1)
      for (let place = 0; place < k; place += 1) counts[layer][routes.data[(token * layers + layer) * k + place]] += 1;
  const size = Math.max(4, Math.floor(352 / numExperts));
  canvas.width = numExperts * size;
  canvas.height = layers * Math.max(size, 10);
  const context = canvas.getContext("2d");
  const most = Math.max(1, ...counts.flat());
  const colour = getComputedStyle(document.documentElement).getPropertyValue("--accent");
  context.fillStyle = colour;
  const height = canvas.height / layers;
  counts.forEach((line, layer) => line.forEach((count, expert) => {
    context.globalAlpha = 0.06 + 0.94 * (count / most);
    context.fillRect(expert * size, layer * height, size - 1, height - 1);
  }));
  element("experts-text").textContent = row === null
    ? `${layers} sparse layers down, ${numExperts} experts across; darker was chosen more often.`
    : counts.map((line, layer) => `${layer + 1}: ${line.flatMap((count, expert) => (count ? [expert] : [])).join(" ")}`).join("; ");
  canvas.setAttribute("aria-label", element("experts-text").textContent);
}

export function showCache(load, tokens, meta) {
  const bytes = (count) => (count >= 1e6 ? `${(count / 1e6).toFixed(1)} MB` : `${(count / 1e3).toFixed(0)} kB`);
  const bar = (name, used, total, text) =>
    node("div", {}, node("p", { class: "small", text: `${name}: ${bytes(used)} of ${bytes(total)}. ${text}` }),
      node("div", { class: "meter", role: "img", "aria-label": `${name} ${((100 * used) / Math.max(1, total)).toFixed(1)}% full` }, node("i", { style: `width:${(100 * used) / Math.max(1, total)}%` })));
  const pages = Math.ceil(tokens / meta.page_tokens);
  const sliding = meta.layer_kinds.filter((kind) => kind === "sliding").length;
  element("cache").replaceChildren(
    bar("Global layers", load.page_bytes, load.page_bytes_total, `This conversation: ${tokens} tokens, ${pages} pages, ${bytes(pages * meta.page_bytes)}; it grows with every ${meta.page_tokens} tokens.`),
    bar("Sliding layers and heads", load.ring_bytes, load.ring_bytes_total, `This conversation: ${bytes(meta.ring_bytes)} whatever its length, because ${sliding} layers keep ${meta.window_keys} keys.`),
    bar("Of it the prefix cache", load.prefix_bytes, load.page_bytes_total + load.ring_bytes_total, "Beginnings that need not be computed again."),
  );
}
