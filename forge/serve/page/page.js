"use strict";

const KINDS = {
  chat: { label: "Your message", help: "Ctrl+Enter sends, Escape stops.", path: "/v1/chat/completions" },
  completion: { label: "Text to continue", help: "Ctrl+Enter sends, Escape stops.", path: "/v1/completions" },
  classify: { label: "Text to classify", help: "Ctrl+Enter sends.", path: "/v1/classify" },
  fill: { label: "Text with masks", help: "Give the mask token where a word is to be filled in. Ctrl+Enter sends.", path: "/v1/fill-mask" },
  translate: { label: "Source", help: "The model writes its target. Ctrl+Enter sends.", path: "/v1/translate" },
  embed: { label: "Texts to compare, one per line", help: "Shows their cosine similarity.", path: "/v1/embeddings" },
};
const state = { model: null, kind: null, key: "", turns: [], abort: null };
const at = (id) => document.getElementById(id);

function kindOf(model) {
  if (model.kind === "causal-lm") return model.chat ? "chat" : "completion";
  return { seq2seq: "translate", embedding: "embed", "masked-lm": "fill" }[model.kind] || "classify";
}

async function request(path, body, signal) {
  const headers = state.key ? { Authorization: `Bearer ${state.key}` } : {};
  const options = body === undefined ? { headers } : {
    method: "POST", headers: { ...headers, "Content-Type": "application/json" }, body: JSON.stringify(body), signal,
  };
  const response = await fetch(path, options);
  if (response.ok) return response;
  const found = await response.json().catch(() => null);
  const error = new Error(found?.error?.message || `status ${response.status}`);
  error.status = response.status;
  throw error;
}

async function connect() {
  at("problem").textContent = "";
  try {
    const found = await (await request("/v1/models")).json();
    state.model = found.data[0];
  } catch (error) {
    at("access").hidden = error.status !== 401;
    at("about").textContent = error.status === 401 ? "This server needs an API key." : "Not connected.";
    if (error.status !== 401 || state.key) at("problem").textContent = error.message;
    if (error.status === 401) at("key").focus();
    return;
  }
  state.kind = kindOf(state.model);
  const kind = KINDS[state.kind];
  at("title").textContent = state.model.id;
  document.title = `${state.model.id} – forge serve`;
  const isText = ["chat", "completion"].includes(state.kind);
  const share = isText ? " in prompt and answer" : "";
  const length = state.model.max_model_len ? `, at most ${state.model.max_model_len} tokens${share}` : "";
  at("about").textContent = `A ${state.model.kind} model${length}.`;
  at("input-label").textContent = kind.label;
  at("input-help").textContent = kind.help;
  at("sampling").hidden = !isText;
  at("access").hidden = true;
  at("ask").hidden = at("answers").hidden = false;
  at("input").focus();
}

function addTurn(name, text) {
  const turn = document.createElement("div");
  turn.className = "turn";
  const head = document.createElement("b");
  head.textContent = name;
  const body = document.createElement("span");
  body.textContent = text;
  turn.append(head, body);
  at("answers").append(turn);
  turn.scrollIntoView({ block: "end" });
  return body;
}

function addTable(headings, rows) {
  const table = document.createElement("table");
  for (const [index, cells] of [headings, ...rows].entries()) {
    const row = table.insertRow();
    for (const cell of cells) {
      const element = document.createElement(index ? "td" : "th");
      if (!index) element.scope = "col";
      element.textContent = cell;
      row.append(element);
    }
  }
  at("answers").append(table);
}

function sampling() {
  const found = { stream: true };
  if (at("temperature").value) found.temperature = Number(at("temperature").value);
  if (at("max-tokens").value) found.max_tokens = Number(at("max-tokens").value);
  if (at("seed").value) found.seed = Number(at("seed").value);
  return found;
}

async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (held + value).split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function streamText(text, signal) {
  const isChat = state.kind === "chat";
  if (isChat) state.turns.push({ role: "user", content: text });
  addTurn(isChat ? "You" : "Text", text);
  const body = addTurn(isChat ? "Model" : "Continuation", "");
  const given = isChat ? { messages: state.turns } : { prompt: text };
  try {
    const response = await request(KINDS[state.kind].path, { model: state.model.id, ...given, ...sampling() }, signal);
    for await (const event of eventsOf(response)) {
      if (event.error) throw new Error(event.error.message);
      const choice = event.choices[0];
      if (!choice) continue;
      body.textContent += isChat ? choice.delta.content || "" : choice.text;
      body.scrollIntoView({ block: "end" });
    }
  } finally {
    if (isChat && body.textContent) state.turns.push({ role: "assistant", content: body.textContent });
    else if (isChat) state.turns.pop();
  }
}

async function askOnce(text, signal) {
  const input = state.kind === "embed" ? text.split("\n").filter((line) => line.trim()) : text;
  const body = { model: state.model.id, input };
  if (state.kind === "embed") body.encoding_format = "float";
  const { data } = await (await request(KINDS[state.kind].path, body, signal)).json();
  if (state.kind === "translate") {
    addTurn("Source", text);
    addTurn("Target", data[0].text);
  } else if (state.kind === "fill") {
    addTurn("Text", text);
    for (const mask of data[0].masks) addTable(["Token", "Probability"], mask.map((one) => [one.token, one.probability.toFixed(4)]));
  } else if (state.kind === "classify") {
    addTurn("Text", text);
    const scores = Object.entries(data[0].scores).sort((a, b) => b[1] - a[1]);
    if (scores.length) addTable(["Label", "Probability"], scores.slice(0, 20).map(([name, p]) => [name, p.toFixed(4)]));
    else addTurn("Result", data[0].value === null ? data[0].labels.join(" ") : String(data[0].value));
  } else {
    const norm = (v) => Math.sqrt(v.reduce((sum, x) => sum + x * x, 0)) || 1;
    const cosine = (a, b) => a.reduce((sum, x, i) => sum + x * b[i], 0) / norm(a) / norm(b);
    const vectors = data.map((each) => each.embedding);
    addTable(["", ...input], input.map((line, i) => [line, ...vectors.map((v) => cosine(vectors[i], v).toFixed(3))]));
  }
}

async function send(event) {
  event?.preventDefault();
  const text = at("input").value;
  if (!text.trim() || state.abort) return;
  state.abort = new AbortController();
  at("problem").textContent = "";
  at("send").disabled = true;
  at("stop").disabled = false;
  try {
    await (["chat", "completion"].includes(state.kind) ? streamText : askOnce)(text, state.abort.signal);
    if (state.kind === "chat") at("input").value = "";
  } catch (error) {
    if (error.name !== "AbortError") at("problem").textContent = error.message;
  } finally {
    state.abort = null;
    at("send").disabled = false;
    at("stop").disabled = true;
    at("input").focus();
  }
}

at("access").addEventListener("submit", (event) => {
  event.preventDefault();
  state.key = at("key").value.trim();
  connect();
});
at("ask").addEventListener("submit", send);
at("stop").addEventListener("click", () => state.abort?.abort());
at("clear").addEventListener("click", () => {
  state.turns = [];
  at("answers").replaceChildren();
  at("input").focus();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && document.activeElement === at("input")) send();
  if (event.key === "Escape") state.abort?.abort();
});
connect();
