// Feedback on an answer: thumbs, an edited text, or another label. The next answer uses it.

import { call, userPath } from "./api.js";
import { busy, el, field } from "./dom.js";

export class Feedback {
  constructor({ id, labels, getAnswer, getUser, onChange }) {
    this.getAnswer = getAnswer;
    this.getUser = getUser;
    this.onChange = onChange;
    this.problem = el("p", { className: "problem", role: "alert" });
    const up = this._button("Good answer", () => ({ rating: "up" }));
    const down = this._button("Not like this", () => ({ rating: "down" }));
    this.buttons = [up, down];
    this.text = labels.length
      ? el("select", { id: `${id}-edit` }, ...labels.map((label) => el("option", { value: label, textContent: label })))
      : el("textarea", { id: `${id}-edit`, rows: 4 });
    const save = this._button("Save this answer", () => this._edited());
    this.editor = el(
      "details",
      {},
      el("summary", { textContent: "Correct the answer" }),
      ...field("What this user would have answered", this.text),
      el("div", { className: "row" }, save),
    );
    this.elements = [this.problem, this.editor];
    this.clear();
  }

  clear() {
    this.problem.textContent = "";
    for (const element of [...this.buttons, this.editor]) element.hidden = true;
  }

  offer(answer, isRemembered) {
    for (const element of [...this.buttons, this.editor]) element.hidden = !isRemembered;
    this.editor.open = false;
    this.text.value = answer;
  }

  _edited() {
    const { text } = this.getAnswer();
    const edited = this.text.value.trim();
    if (!edited) throw new Error("Write the answer first.");
    return edited === text ? { answer: edited } : { answer: edited, rejected: text };
  }

  _button(text, feedback) {
    const button = el("button", { type: "button", textContent: text });
    button.addEventListener("click", () =>
      busy(button, this.problem, async () => {
        const body = { request_id: this.getAnswer().requestId, ...feedback() };
        await call("POST", userPath(this.getUser(), "history"), body);
        await this.onChange();
      }),
    );
    return button;
  }
}
