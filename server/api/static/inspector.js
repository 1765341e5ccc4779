// The panel beside a token: every expert's weight, their entropy, the alternatives. Follows the pointer, and the arrow keys
// where an answer has the focus. A click keeps it open; Escape closes it.

import { dress, element, entropy, percent } from "./experts.js";

const KEYS = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -Infinity, End: Infinity };
const MARGIN = 8; // pixels

export class Inspector {
  constructor(panel, spoken) {
    this.panel = panel;
    this.spoken = spoken;
    this.token = null;
    addEventListener("keydown", (event) => event.key === "Escape" && this.close());
    addEventListener("resize", () => this.close());
    document.addEventListener("scroll", () => this.token && this.#place(), { passive: true });
  }

  watch(answer) {
    const { text } = answer;
    const under = (event) => answer.tokens.find((token) => token.node === event.target);
    text.addEventListener("pointerover", (event) => this.open(answer, under(event)));
    text.addEventListener("pointerleave", () => document.activeElement !== text && this.close());
    text.addEventListener("click", (event) => this.open(answer, under(event)));
    text.addEventListener("focus", () => {
      if (text.matches(":focus-visible")) this.open(answer, answer.tokens[0], true);
    });
    text.addEventListener("blur", () => this.close());
    text.addEventListener("keydown", (event) => this.#step(answer, event));
  }

  #step(answer, event) {
    const step = KEYS[event.key];
    if (step === undefined || !answer.tokens.length) return;
    event.preventDefault();
    const from = answer.tokens.indexOf(this.token);
    const to = Math.min(Math.max(from + step, 0), answer.tokens.length - 1);
    this.open(answer, answer.tokens[to], true);
    answer.tokens[to].node.scrollIntoView({ block: "nearest" });
    this.#place();
  }

  open(answer, token, aloud = false) {
    if (!token) return;
    this.close();
    this.token = token;
    token.node.classList.add("chosen");
    this.panel.replaceChildren(...this.#lines(answer.names, token));
    // Until it is kept open it must not come between the pointer and the tokens below it.
    this.panel.classList.toggle("kept", document.activeElement === answer.text);
    this.panel.hidden = false;
    this.#place();
    if (aloud) this.spoken.textContent = inWords(answer.names, token);
  }

  close() {
    this.token?.node.classList.remove("chosen");
    this.token = null;
    this.panel.hidden = true;
  }

  #lines(names, token) {
    const entry = token.entries.at(-1);
    const head = element("p", "head");
    head.append(element("code", "", visible(token.text)), element("span", "muted", chance(entry.logprob)));
    const lines = [head, weightTable(names, entry), line("entropy of the weights", `${entropy(entry.parts).toFixed(2)} bit`)];
    if (token.entries.length > 1) lines.push(line("tokens in this character", String(token.entries.length)));
    if (entry.top_logprobs?.length) lines.push(element("p", "title", "Most probable after fusion"), topTable(entry));
    return lines;
  }

  // Below the token, above it where there is no room; on narrow screens the style sheet puts it at the bottom.
  #place() {
    const box = this.token.node.getClientRects()[0];
    if (!box) return;
    const { offsetWidth: width, offsetHeight: height } = this.panel;
    const left = Math.max(MARGIN, Math.min(box.left - 2 * MARGIN, innerWidth - width - MARGIN));
    const above = box.bottom + MARGIN + height > innerHeight && box.top - MARGIN - height > 0;
    this.panel.style.left = `${left}px`;
    this.panel.style.top = `${above ? box.top - height - MARGIN : box.bottom + MARGIN}px`;
  }
}

function inWords(names, token) {
  const entry = token.entries.at(-1);
  const weights = names.map((name, index) => `${name} ${percent(entry.parts[index])}`);
  return `${visible(token.text)}: ${weights.join(", ")}`;
}

function weightTable(names, entry) {
  const table = element("div", "weights");
  names.forEach((name, index) => {
    const meter = element("span", "meter");
    const filled = dress(element("span"), index);
    filled.style.width = `${(entry.parts[index] * 100).toFixed(1)}%`;
    meter.append(filled);
    const weight = entry.weights[index];
    table.append(dress(element("span", "sample", name), index), meter, element("span", "figure", weight.toFixed(3)));
  });
  return table;
}

function topTable(entry) {
  const table = element("div", "tops");
  for (const top of entry.top_logprobs) {
    const chosen = top.token === entry.token && top.logprob === entry.logprob;
    table.append(element("code", chosen ? "chosen" : "", visible(top.token)), element("span", "figure", chance(top.logprob)));
  }
  return table;
}

function line(what, value) {
  const node = element("p", "line");
  node.append(element("span", "muted", what), element("span", "figure", value));
  return node;
}

function chance(logprob) {
  const value = Math.exp(logprob) * 100;
  return value < 0.1 ? "<0.1 %" : `${value.toFixed(1)} %`;
}

function visible(text) {
  return text.replace(/ /g, "␣").replace(/\n/g, "↵").replace(/\t/g, "⇥") || "∅";
}
