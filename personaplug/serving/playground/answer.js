// One answer: ask, stream, show the persona and the probabilities.

import { events, send } from "./api.js";
import { bar, el } from "./dom.js";

const MAX_TOKENS = 200;

const REASONS = {
  "off-task": "The prompt is not in the wording of the task, so nobody gets a persona.",
  "no-history": "This user has no items yet, so the answer has the persona common to all.",
  "few-items": "This user has too few items for a persona of their own.",
  "persona-scale": "",
  "no-user": "",
};

/** The answer of one user, or of the plain model if `user` is null. */
export class Answer {
  constructor() {
    this.text = el("p", { className: "answer", ariaLive: "polite" });
    this.before = el("p", { className: "before" });
    this.persona = el("p", { className: "hint" });
    this.probabilities = el("div");
    this.elements = [this.text, this.before, this.persona, this.probabilities];
    this.running = null;
    this.clear();
  }

  clear() {
    this.running?.abort();
    this.requestId = this.answer = "";
    this.isPersonal = false;
    this.text.className = "answer";
    this.before.textContent = this.persona.textContent = "";
    this.text.replaceChildren();
    this.probabilities.replaceChildren();
  }

  /** Ask and show the answer as it is written. */
  async ask(prompt, { user, strength, model, showBefore = false }) {
    const earlier = this.answer;
    this.clear();
    if (showBefore && earlier) this.before.textContent = `Before: ${earlier}`;
    this.text.classList.toggle("label", prompt.hasLabels);
    this.text.textContent = "…";
    this.running = new AbortController();
    const { signal } = this.running;
    try {
      const reply = await this._send(prompt, { user, strength, model, signal });
      this.requestId = reply.headers.get("X-Request-Id") ?? "";
      this.isPersonal = reply.headers.get("X-Personaplug-Persona") === "user";
      this.persona.textContent = user === null ? "No soft tokens." : personaOf(reply.headers);
      for await (const event of events(reply)) this._add(event);
      this.text.textContent = this.answer || "(an empty answer)";
    } catch (error) {
      if (error.name === "AbortError") return;
      this.requestId = this.answer = "";
      this.text.className = "answer problem";
      this.text.textContent = error.message;
    }
  }

  async _send(prompt, { user, strength, model, signal }) {
    const options = { persona_scale: user === null ? 0 : strength };
    const body = { model, messages: [{ role: "user", content: prompt.value }], temperature: 0, stream: true };
    if (user !== null) body.user = user;
    if (!prompt.hasLabels) body.max_tokens = MAX_TOKENS;
    const post = (extra) =>
      send("POST", "v1/chat/completions", { ...body, personaplug: { ...options, ...extra } }, signal);
    if (!prompt.hasLabels) return post({});
    try {
      return await post({ probabilities: true });
    } catch (error) {
      if (error.status !== 400) throw error;
      return post({}); // some engines have no probabilities of labels, and some prompts have no labels
    }
  }

  _add(event) {
    const piece = event.choices?.[0]?.delta?.content;
    if (piece) {
      this.answer += piece;
      this.text.textContent = this.answer;
    }
    const probabilities = event.personaplug?.probabilities;
    if (probabilities) this.probabilities.replaceChildren(probabilityTable(probabilities));
  }
}

function personaOf(headers) {
  const applied = headers.get("X-Personaplug-Persona");
  const items = Number(headers.get("X-Personaplug-Items"));
  if (applied === "user") return `Own persona, from ${items} ${items === 1 ? "item" : "items"}.`;
  const reason = REASONS[headers.get("X-Personaplug-Reason")];
  return reason ?? (applied === "plain" ? "No soft tokens." : "The persona common to all users.");
}

function probabilityTable(probabilities) {
  const rows = Object.entries(probabilities).map(([label, share]) =>
    el(
      "tr",
      {},
      el("th", { scope: "row", textContent: label }),
      el("td", {}, bar(share)),
      el("td", { className: "number", textContent: (100 * share).toFixed(1) }),
    ),
  );
  return el(
    "table",
    {},
    el("caption", { textContent: "Probability of each answer, in percent" }),
    el("tbody", {}, ...rows),
  );
}
