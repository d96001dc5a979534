// One answer: ask, stream, show the persona and the probabilities.

import { events, send } from "./api.js";
import { bar, el } from "./dom.js";

const MAX_TOKENS = 200;

const REASONS = {
  "off-task": "The question is outside the plug's task, so nobody gets a persona.",
  "no-history": "This user has no items yet, so the answer has the persona common to all users.",
  "few-items": "This user has too few items for an own persona, so the answer has the one common to all users.",
};

export class Answer {
  constructor() {
    this.persona = el("p", { className: "hint" });
    this.text = el("p", { className: "answer" });
    this.before = el("p", { className: "hint before" });
    this.probabilities = el("div");
    this.elements = [this.persona, this.text, this.before, this.probabilities];
    this.running = null;
    this.clear();
  }

  clear() {
    this.running?.abort();
    this.requestId = this.answer = this.summary = "";
    this.isPersonal = this.isOffTask = false;
    this.text.className = "answer";
    this.before.textContent = this.persona.textContent = this.text.textContent = "";
    this.probabilities.replaceChildren();
  }

  /** Ask, show the answer while it is written, and return whether it is complete. `user` null = the plain model. */
  async ask(question, { user, strength, model, showBefore = false }) {
    const earlier = showBefore ? this.summary : "";
    this.clear();
    this.before.textContent = earlier && `Before: ${earlier}`;
    this.text.classList.toggle("label", question.hasLabels);
    this.text.textContent = "…";
    this.running = new AbortController();
    const { signal } = this.running;
    try {
      const reply = await post(question, { user, strength, model, signal });
      this._describe(reply.headers, user);
      for await (const event of events(reply)) this._add(event);
      this.text.textContent = this.answer || "(an empty answer)";
      this.requestId = reply.headers.get("X-Request-Id") ?? "";
      return true;
    } catch (error) {
      if (signal.aborted) return false;
      this.answer = this.summary = "";
      this.text.className = "answer problem";
      this.text.textContent = error.message;
      return true;
    }
  }

  _describe(headers, user) {
    const items = Number(headers.get("X-Personaplug-Items"));
    this.isPersonal = headers.get("X-Personaplug-Persona") === "user";
    this.isOffTask = headers.get("X-Personaplug-Reason") === "off-task";
    const own = `Own persona, from ${items} ${items === 1 ? "item" : "items"}.`;
    const other = REASONS[headers.get("X-Personaplug-Reason")] ?? "The persona common to all users.";
    this.persona.textContent = user === null ? "Without a persona." : this.isPersonal ? own : other;
  }

  _add(event) {
    const choice = event.choices?.[0];
    const piece = choice?.delta?.content;
    if (choice?.finish_reason === "length") this.persona.textContent += ` The answer ends after ${MAX_TOKENS} tokens.`;
    if (piece) this.summary = this.text.textContent = this.answer += piece;
    const probabilities = event.personaplug?.probabilities;
    if (!probabilities) return;
    this.probabilities.replaceChildren(probabilityTable(probabilities));
    this.summary = Object.entries(probabilities).map(([label, share]) => `${label}: ${percent(share)} %`).join(", ");
  }
}

async function post(question, { user, strength, model, signal }) {
  const options = { persona_scale: user === null ? 0 : strength };
  const messages = [{ role: "user", content: question.text }];
  const body = { model, messages, temperature: 0, stream: true, ...(user === null ? {} : { user }) };
  const request = (more, extra) =>
    send("POST", "v1/chat/completions", { ...body, ...more, personaplug: { ...options, ...extra } }, signal);
  if (!question.hasLabels) return request({ max_tokens: MAX_TOKENS });
  try {
    return await request({}, { probabilities: true });
  } catch (error) {
    if (error.status !== 400) throw error;
    return request({ max_tokens: MAX_TOKENS }); // some engines have no probabilities, and some prompts have no labels
  }
}

function percent(share) {
  return (100 * share).toFixed(1);
}

function probabilityTable(probabilities) {
  const rows = Object.entries(probabilities).map(([label, share]) =>
    el(
      "tr",
      {},
      el("th", { scope: "row", textContent: label }),
      el("td", {}, bar(share)),
      el("td", { className: "number", textContent: percent(share) }),
    ),
  );
  return el("table", {}, el("caption", { textContent: "Probability of each answer, in percent" }), el("tbody", {}, ...rows));
}
