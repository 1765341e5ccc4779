// The playground: settings, the conversation, and what happens when a prompt is sent. Text from outside only ever becomes
// textContent.

import { Answer } from "./answer.js";
import { ApiError, chat, deployment, readiness } from "./api.js";
import { element, legendItem } from "./experts.js";
import { Inspector } from "./inspector.js";

const READY_SECONDS = 15;
const LOADING_SECONDS = 2;
const ALTERNATIVES = 5;
const EVERY_EXPERT = "*";

const $ = (id) => document.getElementById(id);
const inspector = new Inspector($("inspector"), $("spoken"));
const turns = []; // {prompt, texts: model -> its answer, if it gave any}
let known = null; // what GET /playground/deployment says
let running = null; // AbortController
let refused = null; // the key, perhaps empty, that was not accepted

function key() {
  return $("key").value.trim();
}

function notice(message) {
  $("notice").textContent = message;
  $("notice").hidden = !message;
}

// --- the deployment ---

async function look() {
  const { state, text } = await readiness();
  if ($("state").textContent !== text) $("state").textContent = text;
  $("state").dataset.state = state;
  if (!known && state !== "down" && refused !== key()) await learn();
  setTimeout(look, (state === "ready" ? READY_SECONDS : LOADING_SECONDS) * 1000);
}

async function learn() {
  try {
    known = await deployment(key());
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    if (error.status === 401) refused = key();
    notice(error.status === 401 ? "This server needs an API key: enter it in the settings." : error.message);
    return;
  }
  notice("");
  document.title = `${known.name} · polylogit playground`;
  $("deployment").textContent = known.name;
  $("legend").replaceChildren(...known.experts.map(legendItem));
  $("model").replaceChildren(...modelOptions());
  $("beside").replaceChildren(new Option("nothing", ""), ...everyExpert(), ...modelOptions());
  $("examples").replaceChildren(...known.examples.map(exampleButton));
}

function modelOptions() {
  const fused = known.policies.map((policy) => new Option(label(`${known.name}:${policy}`), `${known.name}:${policy}`));
  const named = new Option(label(known.name), known.name);
  const single = known.experts.map((name) => new Option(label(`${known.name}:${name}`), `${known.name}:${name}`));
  return [group("Fused", [named, ...fused]), group("One expert", single)];
}

function group(name, options) {
  const made = element("optgroup");
  made.label = name;
  made.append(...options);
  return made;
}

function everyExpert() {
  return known.experts.length > 1 && known.experts.length < 5 ? [new Option("every expert alone", EVERY_EXPERT)] : [];
}

function label(model) {
  const own = model.slice(known.name.length + 1);
  if (!own) return `${known.name} (${known.default_policy})`;
  return known.experts.includes(own) ? `${own} alone` : own;
}

function exampleButton(text) {
  const button = element("button", "quiet", text);
  button.type = "button";
  button.addEventListener("click", () => send(text));
  return button;
}

// --- a turn ---

async function send(prompt) {
  if (running || !prompt.trim()) return;
  if (!known) await learn();
  if (!known) return;
  notice("");
  running = new AbortController();
  showRunning(true);
  const models = chosenModels();
  const node = turnNode(prompt);
  const answers = models.map((model) => new Answer(label(model), known.experts, inspector));
  node.lastChild.append(...answers.map((answer) => answer.node));
  $("conversation").append(node);
  follow(node);
  $("spoken").textContent = "Answering.";
  const bodies = models.map((model) => request(model, prompt));
  await Promise.all(answers.map((answer, index) => run(answer, bodies[index], running.signal, node)));
  running = null;
  showRunning(false);
  node.dataset.done = "";
  if (!node.isConnected) return clear(); // a new chat was begun meanwhile
  const texts = models.map((model, index) => [model, answers[index].content]).filter(([, text]) => text);
  if (texts.length) turns.push({ prompt, texts: new Map(texts) });
  $("spoken").textContent = answers.map((answer, index) => `${label(models[index])}: ${answer.content}`).join(". ");
}

async function run(answer, body, signal, node) {
  try {
    for await (const chunk of chat(body, key(), signal)) {
      if (chunk.choices.length) answer.take(chunk.choices[0]);
      follow(node);
    }
    answer.finish();
  } catch (error) {
    if (error.name !== "AbortError" && !(error instanceof ApiError)) throw error;
    answer.fail(error.message, error.name === "AbortError");
  }
}

function chosenModels() {
  const beside = $("beside").value;
  const others = beside === EVERY_EXPERT ? known.experts.map((name) => `${known.name}:${name}`) : [beside];
  return [$("model").value, ...others.filter((model) => model && model !== $("model").value)];
}

function request(model, prompt) {
  const messages = turns.flatMap((turn) => [
    { role: "user", content: turn.prompt },
    { role: "assistant", content: turn.texts.get(model) ?? turn.texts.values().next().value },
  ]);
  if ($("system").value.trim()) messages.unshift({ role: "system", content: $("system").value });
  const body = {
    model,
    messages: [...messages, { role: "user", content: prompt }],
    temperature: Number($("temperature").value),
    max_tokens: Number($("max-tokens").value) || 1,
    logprobs: true,
    top_logprobs: ALTERNATIVES,
    expert_weights: true,
  };
  return $("seed").value === "" ? body : { ...body, seed: Number($("seed").value) };
}

function turnNode(prompt) {
  const node = element("div", "turn");
  const question = element("p", "question", prompt);
  question.prepend(element("span", "hidden", "You: "));
  node.append(question, element("div", "answers"));
  return node;
}

function follow(node) {
  const beyond = node.getBoundingClientRect().bottom - $("composer").getBoundingClientRect().top;
  if (beyond > 0 && beyond < innerHeight / 2) scrollBy({ top: beyond + 16 });
}

function showRunning(on) {
  const hadFocus = [$("send"), $("stop")].includes(document.activeElement);
  $("send").hidden = on;
  $("stop").hidden = !on;
  if (hadFocus) (on ? $("stop") : $("send")).focus();
  $("welcome").hidden = true;
  $("fresh").hidden = false;
}

// --- what the reader does ---

function clear() {
  running?.abort();
  turns.length = 0;
  inspector.close();
  $("conversation").replaceChildren();
  $("welcome").hidden = false;
  $("fresh").hidden = true;
  $("prompt").focus();
}

function submit(event) {
  event.preventDefault();
  const prompt = $("prompt").value;
  if (running || !prompt.trim()) return;
  $("prompt").value = "";
  fit();
  send(prompt);
}

function fit() {
  $("prompt").style.height = "auto";
  $("prompt").style.height = `${$("prompt").scrollHeight}px`;
}

$("composer").addEventListener("submit", submit);
$("prompt").addEventListener("input", fit);
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) submit(event);
});
$("stop").addEventListener("click", () => running?.abort());
$("fresh").addEventListener("click", clear);
$("key").addEventListener("change", () => known || learn());
$("temperature").addEventListener("input", () => {
  $("temperature-shown").textContent = Number($("temperature").value).toFixed(2);
});
if (matchMedia("(max-width: 56rem)").matches) $("settings").open = false;
look();
