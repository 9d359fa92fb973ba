// The conversation: asks, streams, stops, asks again; every token remembers where it came from.

import { getJson, streamChat } from "./api.js";
import { Tally, drawExperts, node, showCache, showComparison, showTally, showToken, visible } from "./views.js";

const element = (id) => document.getElementById(id);
const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed"];
const STORED = [...NUMBERS, "system", "tools"];

const state = { model: null, meta: null, messages: [], abort: null, routes: null, firstRow: 0, tokens: 0, runs: {} };

async function start() {
  for (const name of STORED) element(name).value = localStorage.getItem(`openmimo.${name}`) ?? "";
  try {
    const [model] = (await getJson("v1/models")).data;
    state.model = model.id;
    state.meta = model.meta;
  } catch (error) {
    addMessage("error", String(error.message));
    return;
  }
  element("model-name").textContent = state.model;
  const heads = state.meta.draft_heads;
  element("drafting").disabled = heads === 0;
  element("drafting").checked = heads > 0;
  showTally(new Tally(heads));
  refreshCache();
}

function addMessage(role, text = "") {
  const item = node("li", { class: role });
  if (text) item.append(text);
  element("messages").append(item);
  return item;
}

function request() {
  const body = { model: state.model, messages: [...state.messages], token_events: true, logprobs: true, top_logprobs: 5, return_routed_experts: state.meta.num_sparse_layers > 0 };
  const system = element("system").value.trim();
  if (system) body.messages.unshift({ role: "system", content: system });
  for (const name of NUMBERS) {
    const value = element(name).value;
    if (value !== "") body[name] = Number(value);
  }
  if (element("thinking").checked) body.chat_template_kwargs = { enable_thinking: true };
  if (element("tools").value.trim()) body.tools = JSON.parse(element("tools").value);
  if (state.meta.draft_heads) body.draft_heads = element("drafting").checked ? "auto" : 0;
  return body;
}

async function answer() {
  let body;
  try {
    body = request();
  } catch (error) {
    addMessage("error", `The tools are no JSON: ${error.message}`);
    return;
  }
  const drafting = body.draft_heads !== 0;
  const view = new AnswerView(addMessage("assistant"));
  const tally = new Tally(state.meta.draft_heads);
  const message = { role: "assistant", content: "", reasoning_content: "", tool_calls: [] };
  let usage = null;
  let frame = 0;
  let isFirst = true;
  state.abort = new AbortController();
  setBusy(true);
  try {
    await streamChat(body, state.abort.signal, (chunk) => {
      usage = chunk.usage ?? usage;
      for (const choice of chunk.choices) {
        const delta = choice.delta;
        message.content += delta.content ?? "";
        message.reasoning_content += delta.reasoning_content ?? "";
        for (const call of delta.tool_calls ?? []) {
          message.tool_calls.push({ id: call.id, type: "function", function: call.function });
          view.addCall(call);
        }
        if (choice.token_events) {
          tally.add(choice.token_events, isFirst);
          isFirst = false;
          view.addStep(choice.token_events);
        }
        if (choice.routed_experts) keepRoutes(choice.routed_experts);
        if (choice.finish_reason === "length") view.note("cut off: the most tokens were reached");
      }
      frame ||= requestAnimationFrame(() => { frame = 0; showTally(tally); scrollDown(); });
    });
  } catch (error) {
    view.note(error.name === "AbortError" ? "stopped" : "");
    if (error.name !== "AbortError") addMessage("error", error.message);
  }
  state.abort = null;
  setBusy(false);
  showTally(tally);
  if (message.content || message.reasoning_content || message.tool_calls.length) {
    if (!message.tool_calls.length) delete message.tool_calls;
    if (!message.reasoning_content) delete message.reasoning_content;
    state.messages.push(message);
  }
  if (tally.steps > 3) {
    state.runs[drafting ? "with drafts" : "without"] = { speed: tally.speed, length: tally.length };
    showComparison(state.runs);
  }
  if (usage) {
    state.tokens = usage.total_tokens;
    state.firstRow = usage.prompt_tokens;
    view.note(`${usage.completion_tokens} tokens, ${tally.length.toFixed(2)} per step, ${Math.round(tally.speed).toLocaleString("en")} tokens/s`);
  }
  if (state.routes) showExperts(null);
  refreshCache();
  for (const call of message.tool_calls ?? []) askForResult(call);
  scrollDown();
}

// One answer in the list: thoughts folded, every token a span, rejected drafts struck through.
class AnswerView {
  constructor(item) {
    this.item = item;
    this.body = node("span", { class: "body" });
    this.thoughts = null;
    this.thinking = false;
    this.count = 0;
    item.append(this.body);
  }

  addStep(step) {
    for (const token of step.tokens) this.addToken(token);
    for (const token of step.rejected)
      this.target.append(node("span", { class: `token rejected h${token.head}`, title: `head ${token.head}, rejected`, text: visible(token.text) }));
  }

  get target() { return this.thinking ? this.thoughts : this.body; }

  addToken(token) {
    const row = this.count;
    this.count += 1;
    if (token.text === "<think>") {
      this.thoughts = node("span");
      this.item.prepend(node("details", { open: "" }, node("summary", { text: "Thoughts" }), this.thoughts));
      this.thinking = true;
      return;
    }
    if (token.text === "</think>") {
      this.thinking = false;
      this.thoughts?.parentElement.removeAttribute("open");
      return;
    }
    if (token.piece === "") return;
    const span = node("span", { class: `token ${token.head === null ? "plain" : `h${token.head}`}`, tabindex: row === 0 ? "0" : "-1", text: token.piece });
    const show = () => { showToken(token); chooseToken(span, row); };
    span.addEventListener("mouseenter", () => showToken(token));
    span.addEventListener("focus", show);
    span.addEventListener("click", show);
    span.addEventListener("keydown", (event) => walk(event, span));
    this.target.append(span);
  }

  addCall(call) {
    this.item.append(node("div", { class: "call" }, node("b", { text: call.function.name }), ` ${call.function.arguments}`));
  }

  note(text) { if (text) this.item.append(node("small", { class: "note", text })); }
}

function walk(event, span) {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step) return;
  event.preventDefault();
  const tokens = [...document.querySelectorAll(".token[tabindex]")];
  tokens[tokens.indexOf(span) + step]?.focus();
}

function chooseToken(span, row) {
  document.querySelector(".token.chosen")?.classList.remove("chosen");
  span.classList.add("chosen");
  const last = [...document.querySelectorAll("#messages li.assistant")].pop();
  if (state.routes && last?.contains(span)) showExperts(state.firstRow + row, span.textContent);
}

function showExperts(row, text) {
  const last = row !== null && row >= state.routes.shape[0];
  element("experts-of").textContent = row === null ? "How often each expert was chosen in the last answer; choose a token to see its own."
    : last ? "The last token was never fed to the model, so no expert answered for it." : `Experts that answered for ${visible(text)}, layer by layer.`;
  drawExperts(state.routes, state.meta.num_experts, last ? null : row, state.firstRow);
}

function keepRoutes(record) {
  const bytes = Uint8Array.from(atob(record.data), (character) => character.charCodeAt(0));
  state.routes = { shape: record.shape, data: record.dtype === "uint16" ? new Uint16Array(bytes.buffer) : bytes };
}

function askForResult(call) {
  const field = node("textarea", { rows: "2", "aria-label": `Result of ${call.function.name}` });
  const item = addMessage("tool");
  const form = node("form", {}, node("label", { text: `Result of ${call.function.name}` }), field, node("button", { type: "submit", text: "Give result" }));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    state.messages.push({ role: "tool", tool_call_id: call.id, content: field.value });
    item.replaceChildren(field.value);
    if (!document.querySelector("#messages li.tool form")) answer();
  });
  item.append(form);
  field.focus();
}

async function refreshCache() {
  try {
    showCache(await getJson("load"), state.tokens, state.meta);
  } catch { /* shown with the next answer */ }
}

function setBusy(busy) {
  element("send").hidden = busy;
  element("stop").hidden = !busy;
  element("retry").disabled = busy || !state.messages.some((message) => message.role === "user");
  if (busy) state.poll = setInterval(refreshCache, 500);
  else clearInterval(state.poll);
}

function scrollDown() {
  const list = element("messages");
  if (list.scrollHeight - list.scrollTop - list.clientHeight < 200) list.scrollTop = list.scrollHeight;
}

function stop() { state.abort?.abort(); }

element("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = element("text").value.trim();
  if (!text || state.abort || !state.model) return;
  element("text").value = "";
  state.messages.push({ role: "user", content: text });
  addMessage("user", text);
  answer();
});
element("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); element("ask").requestSubmit(); }
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") { stop(); closeSide(); } });
element("stop").addEventListener("click", stop);
element("retry").addEventListener("click", () => {
  if (state.abort) return;
  while (state.messages.length && state.messages.at(-1).role !== "user") state.messages.pop();
  const items = [...element("messages").children];
  while (items.length && !items.at(-1).classList.contains("user")) items.pop().remove();
  answer();
});
element("clear").addEventListener("click", () => {
  stop();
  Object.assign(state, { messages: [], routes: null, tokens: 0 });
  element("messages").replaceChildren();
  element("text").focus();
});
for (const name of STORED) element(name).addEventListener("change", () => localStorage.setItem(`openmimo.${name}`, element(name).value));
element("show-rejected").addEventListener("change", (event) => document.body.classList.toggle("hide-rejected", !event.target.checked));

const tabs = [...document.querySelectorAll("[role=tab]")];
function select(tab) {
  for (const other of tabs) {
    other.setAttribute("aria-selected", String(other === tab));
    other.tabIndex = other === tab ? 0 : -1;
    element(other.getAttribute("aria-controls")).hidden = other !== tab;
  }
}
for (const tab of tabs) {
  tab.addEventListener("click", () => select(tab));
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = tabs[(tabs.indexOf(tab) + step + tabs.length) % tabs.length];
    select(next);
    next.focus();
  });
}
function closeSide() { element("side").classList.remove("open"); element("open-side").setAttribute("aria-expanded", "false"); }
element("open-side").addEventListener("click", () => {
  const open = element("side").classList.toggle("open");
  element("open-side").setAttribute("aria-expanded", String(open));
});
document.addEventListener("click", (event) => { if (!event.target.closest("aside, #open-side")) closeSide(); });

start();
