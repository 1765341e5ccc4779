// One answer while it grows: tokens tinted by the expert that weighed most, the bar of shares, what it cost, how it ended.

import { ShareBar, decisive, dress, element, shares } from "./experts.js";

const ENDINGS = { stop: "", length: "cut off at max tokens", tool_calls: "calls a tool" };

export class Answer {
  constructor(label, names, inspector) {
    this.names = names;
    this.inspector = inspector;
    this.content = "";
    this.tokens = []; // {node, text, entries, parts}
    this.started = performance.now();
    this.decoder = new TextDecoder();
    this.pending = []; // entries whose bytes do not yet make a character
    this.node = element("article", "answer");
    this.node.setAttribute("aria-busy", "true");
    this.text = element("div", "text");
    this.text.tabIndex = 0;
    this.text.setAttribute("role", "group");
    this.text.setAttribute("aria-label", `Answer of ${label}. Arrow keys go from token to token.`);
    this.bar = new ShareBar(names);
    this.foot = element("p", "foot muted", "waiting");
    this.node.append(element("h2", "", label), this.bar.node, this.text, this.foot);
    inspector.watch(this);
  }

  // A chunk's part of this answer: {delta, logprobs, finish_reason}.
  take(choice) {
    this.content += choice.delta.content ?? "";
    for (const entry of choice.logprobs?.content ?? []) this.#add(entry);
    if (choice.finish_reason) this.reason = choice.finish_reason;
    const seconds = (performance.now() - this.started) / 1000;
    this.foot.textContent = `${this.bar.count} tokens · ${seconds.toFixed(1)} s`;
  }

  #add(entry) {
    const weights = this.names.map((name) => entry.expert_weights?.[name] ?? 0);
    const parts = shares(weights);
    this.bar.add(parts);
    this.pending.push({ ...entry, weights, parts });
    const text = this.decoder.decode(new Uint8Array(entry.bytes ?? []), { stream: true });
    if (text) this.#show(text, this.pending.splice(0));
  }

  #show(text, entries) {
    const node = element("span", "token", text);
    const { parts } = entries.at(-1);
    const best = decisive(parts);
    if (best >= 0) {
      dress(node, best);
      node.style.setProperty("--share", parts[best].toFixed(3));
    } else {
      node.classList.add("tied");
    }
    this.tokens.push({ node, text, entries, parts });
    this.text.append(node);
  }

  finish() {
    this.#mark();
    this.#end(ENDINGS[this.reason] ?? this.reason ?? "");
  }

  // Ended by an error or by the reader. What has arrived stays.
  fail(message, stopped = false) {
    if (!this.tokens.length) this.bar.node.hidden = this.text.hidden = true;
    if (stopped) this.#end("stopped");
    else {
      this.#end(this.tokens.length ? "not complete" : "");
      const notice = element("p", "notice", message);
      notice.setAttribute("role", "alert");
      this.node.append(notice);
    }
  }

  #end(how) {
    this.node.setAttribute("aria-busy", "false");
    if (!this.tokens.length) this.foot.textContent = how;
    else if (how) this.foot.textContent += ` · ${how}`;
  }

  // Tokens that are no part of the text, such as the one that ends it, are shown as such.
  #mark() {
    let place = 0;
    for (const token of this.tokens) {
      const said = [token.text, token.text.trimStart()].find((text) => text && this.content.startsWith(text, place));
      if (said === undefined) {
        token.node.classList.add("unsaid");
        token.node.textContent = token.text.replace(/^<\|?|\|?>$/g, "");
      } else place += said.length;
    }
  }
}
