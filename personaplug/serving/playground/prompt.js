// The prompt: a question in the wording of the task, or any text.

import { el, field } from "./dom.js";

const VARYING = "{…}";

/** The part of the page where people write a question. */
export class Prompt {
  constructor(place, task) {
    this.place = place;
    this.task = task;
    this.template = task.kind === "chat" ? "" : task.wordings.find((text) => text.trim() !== "{query}") ?? "";
    this.canUseWording = this.template !== "" && !task.query_pattern;
    this.text = el("textarea", { id: "prompt-text", rows: 2, required: true });
    this.varying = el("input", { id: "prompt-varying" });
    this.free = el("input", { id: "prompt-free", type: "checkbox", checked: !this.canUseWording });
    this.free.addEventListener("change", () => {
      this._draw();
      this.free.focus();
    });
    this._draw();
  }

  /** Return what the columns ask, `{ text, hasLabels }`, or null without a question. */
  get question() {
    const query = this.text.value.trim();
    if (!query) return null;
    const text = this._isWorded ? this.template.replace(VARYING, () => this.varying.value).replace("{query}", () => query) : query;
    const hasLabels = this.task.labels.length > 0 && (this._isWorded || !this.canUseWording);
    return { text, query, hasLabels };
  }

  /** Write a question of the task, in the task's wording. */
  write(query) {
    this.text.value = query;
    if (this.canUseWording && this.free.checked) {
      this.free.checked = false;
      this._draw();
    }
  }

  get _isWorded() {
    return this.canUseWording && !this.free.checked;
  }

  _draw() {
    const reads = this.template.replace("{query}", "[the question]").replace(VARYING, "[the varying text]");
    this.place.replaceChildren(
      ...field("Question", this.text),
      this._isWorded ? el("p", { className: "hint wording", textContent: `The model reads: ${reads}` }) : "",
      ...(this._isWorded && this.template.includes(VARYING) ? field("Varying text", this.varying) : []),
      this.canUseWording
        ? el("label", { className: "check", htmlFor: "prompt-free" }, this.free, " Send only my text. A text outside the plug's task gets no persona.")
        : "",
    );
  }
}

/** Return the question of a history item, or "" if it has none or several. */
export function questionOf(item, task) {
  const names = (task.item_fields ?? []).filter((name) => name !== task.answer_field && item[name]);
  return names.length === 1 ? String(item[names[0]]) : "";
}
