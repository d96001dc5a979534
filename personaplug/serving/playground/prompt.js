// The prompt: a query in the wording of the task, or any text.

import { el, field } from "./dom.js";

const VARYING = "{…}";

/** The part of the page where people write the prompt of a task. */
export class Prompt {
  constructor(place, task) {
    this.task = task;
    this.template = task.kind === "chat" ? "" : task.wordings.find((text) => text.trim() !== "{query}") ?? "";
    this.canUseWording = this.template !== "" && !task.query_pattern;
    this.text = el("textarea", { id: "prompt-text", rows: 3, required: true });
    this.varying = el("input", { id: "prompt-varying" });
    this.free = el("input", { id: "prompt-free", type: "checkbox", checked: !this.canUseWording });
    this.free.addEventListener("change", () => this.draw(place));
    this.draw(place);
  }

  draw(place) {
    const isWorded = this.isWorded;
    const label = isWorded ? "Question, in the wording of the plug's task" : "Prompt";
    place.replaceChildren(
      ...field(label, this.text),
      isWorded ? el("p", { className: "hint wording", textContent: `The model reads: ${this.template}` }) : "",
      ...(isWorded && this.template.includes(VARYING) ? field("The text that varies ({…})", this.varying) : []),
      this.canUseWording
        ? el("label", { className: "check", htmlFor: "prompt-free" }, this.free, " Ask something else, in my own words")
        : "",
    );
  }

  get isWorded() {
    return this.canUseWording && !this.free.checked;
  }

  /** The text for the model. */
  get value() {
    const query = this.text.value.trim();
    return this.isWorded ? this.template.replace(VARYING, () => this.varying.value).replace("{query}", () => query) : query;
  }

  /** Whether the answer is one of the task's labels. */
  get hasLabels() {
    return this.task.labels.length > 0 && (this.isWorded || !this.canUseWording);
  }

  set query(text) {
    this.text.value = text;
  }
}

/** Return the question of a history item, or "" if it has none or several. */
export function questionOf(item, task) {
  const names = (task.item_fields ?? []).filter((name) => name !== task.answer_field && item[name]);
  return names.length === 1 ? String(item[names[0]]) : "";
}
