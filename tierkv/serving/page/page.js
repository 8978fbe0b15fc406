"use strict";

const element = (id) => document.getElementById(id);
const LOOK_MS = 1000;
const history = [];
let model = null;
let asking = null; // the AbortController of the answer that comes

function headers() {
  const key = element("key").value;
  return key ? { Authorization: `Bearer ${key}` } : {};
}

// --- the live view ---

function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (count >= 1024 && unit < units.length - 1) { count /= 1024; unit += 1; }
  return `${unit ? count.toFixed(count < 10 ? 1 : 0) : count} ${units[unit]}`;
}

const number = (value) => value.toLocaleString("en");

function showModel(name) {
  const isPath = /^[./~]/.test(name);
  element("model").textContent = isPath ? name.split("/").filter(Boolean).pop() : name;
  element("model").title = name;
}

function showTier(name, tier) {
  const text = element(`${name}-text`);
  const bar = element(`${name}-bar`);
  if (!tier) { text.textContent = "none"; bar.value = 0; return; }
  const used = name === "cold" ? tier.stored_bytes : tier.used_bytes;
  bar.value = tier.capacity_bytes ? used / tier.capacity_bytes : 0;
  text.textContent = tier.capacity_bytes ? `${bytes(used)} of ${bytes(tier.capacity_bytes)}` : bytes(used);
}

function showStatus(status) {
  const serving = status.serving;
  showModel(model || status.model);
  for (const name of ["hot", "warm", "cold"]) showTier(name, status.tiers[name]);
  element("hit-rate").textContent = serving.prompt_tokens
    ? `${(100 * serving.cached_tokens / serving.prompt_tokens).toFixed(1)} %` : "–";
  element("saved").textContent = serving.saved_s < 10 ? serving.saved_s.toFixed(2) : number(Math.round(serving.saved_s));
  element("load").textContent = `${number(serving.engine.running)}, ${number(serving.engine.waiting)}`;
}

async function look() {
  let state = "";
  try {
    const answer = await fetch("/status", { headers: headers() });
    element("key-row").hidden = !(answer.status === 401 || element("key").value);
    if (answer.ok) showStatus(await answer.json());
    else state = answer.status === 401 ? "needs the API key" : `status ${answer.status}`;
    if (answer.ok && model === null) {
      const models = await (await fetch("/v1/models", { headers: headers() })).json();
      model = models.data[0].id;
      showModel(model);
    }
  } catch {
    state = "no connection";
  }
  element("state").textContent = state;
}

async function lookOn() {
  if (!document.hidden) await look();
  setTimeout(lookOn, LOOK_MS);
}

// --- the chat ---

function addMessage(role) {
  element("empty")?.remove();
  const box = document.createElement("div");
  box.className = `message ${role}`;
  const text = document.createElement("p");
  box.append(text);
  element("messages").append(box);
  return { box, text };
}

function addNote(box, text, isBad) {
  const note = document.createElement("div");
  note.className = isBad ? "note bad" : "note";
  note.textContent = text;
  box.append(note);
}

function scrollDown() {
  const messages = element("messages");
  messages.scrollTop = messages.scrollHeight;
}

async function* eventsOf(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data: ")) continue;
      const data = part.slice(6);
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

function requestBody() {
  const system = element("system").value;
  const messages = system ? [{ role: "system", content: system }, ...history] : history;
  return JSON.stringify({
    model, messages, stream: true, stream_options: { include_usage: true },
    max_completion_tokens: Number(element("max-tokens").value) || 256,
    temperature: Number(element("temperature").value) || 0,
  });
}

function showUsage(box, last) {
  const cached = last.usage.prompt_tokens_details.cached_tokens;
  element("last-cached").textContent = number(cached);
  element("last-prompt").textContent = `of ${number(last.usage.prompt_tokens)}`;
  const first = last.tierkv.ttft_s < 1
    ? `${Math.round(1000 * last.tierkv.ttft_s)} ms` : `${last.tierkv.ttft_s.toFixed(1)} s`;
  addNote(box, `${number(cached)} of ${number(last.usage.prompt_tokens)} tokens cached, first token in ${first}`);
}

async function receive(shown) {
  const answer = await fetch("/v1/chat/completions", {
    method: "POST", body: requestBody(), signal: asking.signal,
    headers: { "Content-Type": "application/json", ...headers() },
  });
  if (!answer.ok) throw new Error((await answer.json()).error.message);
  let text = "";
  try {
    for await (const event of eventsOf(answer)) {
      if (event.error) throw new Error(event.error.message);
      if (event.choices.length) text += event.choices[0].delta.content || "";
      else showUsage(shown.box, event);
      shown.text.textContent = text;
      scrollDown();
    }
  } finally {
    if (text) history.push({ role: "assistant", content: text });
  }
}

async function ask() {
  const prompt = element("prompt");
  if (!prompt.value.trim() || model === null) return;
  history.push({ role: "user", content: prompt.value });
  addMessage("user").text.textContent = prompt.value;
  prompt.value = "";
  const shown = addMessage("assistant");
  asking = new AbortController();
  element("send").textContent = "Stop";
  element("prompt").required = false;
  try {
    await receive(shown);
  } catch (error) {
    const isStopped = error.name === "AbortError";
    addNote(shown.box, isStopped ? "stopped" : String(error.message || error), !isStopped);
  } finally {
    asking = null;
    element("send").textContent = "Send";
    element("prompt").required = true;
    scrollDown();
    look();
  }
}

element("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (asking) asking.abort();
  else ask();
});
element("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!asking) ask();
});
element("clear").addEventListener("click", () => {
  history.length = 0;
  element("messages").replaceChildren();
});
lookOn();
