// Feedback on an answer: thumbs, an edited text, or another label. The next answer uses it.

import { call, userPath } from "./api.js";
import { busy, el, field, problemLine } from "./dom.js";

export class Feedback {
  /** `getAnswer` returns the user, the text and the request id; `readsRejections` tells what the plug was trained with. */
  constructor({ id, labels, readsRejections, getAnswer, onChange }) {
    this.getAnswer = getAnswer;
    this.onChange = onChange;
    this.readsRejections = readsRejections;
    this.problem = problemLine();
    const up = this._button("Good answer", () => ({ rating: "up" }));
    const down = this._button("Not like this", () => ({ rating: "down" }));
    this.buttons = readsRejections ? [up, down] : [up];
    this.text = labels.length
      ? el("select", { id: `${id}-edit` }, ...labels.map((label) => el("option", { value: label, textContent: label })))
      : el("textarea", { id: `${id}-edit`, rows: 4 });
    const save = this._button("Save this answer", (answer) => this._edited(answer));
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

  offer(answer, isPossible) {
    for (const element of [...this.buttons, this.editor]) element.hidden = !isPossible;
    this.editor.open = false;
    this.text.value = answer;
  }

  _edited({ text }) {
    const edited = this.text.value.trim();
    if (!edited) throw new Error("Write the answer first.");
    return { answer: edited, ...(this.readsRejections && edited !== text ? { rejected: text } : {}) };
  }

  _button(text, feedback) {
    const button = el("button", { type: "button", textContent: text });
    button.addEventListener("click", () =>
      busy(button, this.problem, async () => {
        const answer = this.getAnswer();
        await call("POST", userPath(answer.user, "history"), { request_id: answer.requestId, ...feedback(answer) });
        await this.onChange(answer.user);
      }),
    );
    return button;
  }
}
