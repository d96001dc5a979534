// The columns: one for each of two users, and one for the plain model.

import { Answer } from "./answer.js";
import { el, field } from "./dom.js";
import { Erasure } from "./erasure.js";
import { Feedback } from "./feedback.js";
import { History } from "./history.js";
import { Preferences } from "./preferences.js";
import { Why } from "./why.js";

export class UserColumn {
  /**
   * `getSettings` returns the model and the strength of the personas, `getQuestion` the last question of all columns.
   * `onChosen` runs after a choice of a user, `onChanged` after a change of a user's data.
   */
  constructor({ id, title, tasks, model, getSettings, getQuestion, onChosen, onChanged, announce }) {
    Object.assign(this, { title, getSettings, getQuestion, onChosen, announce });
    this.user = "";
    this.asked = null;
    this.answer = new Answer();
    const getUser = () => this.user;
    const kinds = tasks.flatMap((task) => task.item_kinds);
    this.history = new History({ id, tasks, model, getUser, onChange: onChanged });
    this.preferences = new Preferences({ id, getUser, onChange: onChanged, areUsed: kinds.includes("preference") });
    this.feedback = new Feedback({
      id,
      labels: tasks.length === 1 ? tasks[0].labels : [],
      readsRejections: kinds.includes("rejection"),
      getAnswer: () => ({ user: this.asked.user, text: this.answer.answer, requestId: this.answer.requestId }),
      onChange: onChanged,
    });
    this.why = new Why(() => ({
      user: this.asked.user,
      model: this.asked.settings.model,
      prompt: this.asked.question.text,
      answer: this.answer.answer,
      persona_scale: this.asked.settings.strength,
    }));
    this.erasure = new Erasure({ getUser, onErased: onChanged });
    this.element = el("section", { className: `column ${id}`, ariaLabel: title }, ...this._contents(id));
  }

  _contents(id) {
    this.input = el("input", { id: `${id}-user`, autocomplete: "off" });
    this.input.setAttribute("list", "users");
    this.input.addEventListener("change", () => this.choose(this.input.value));
    return [
      el("h2", { textContent: this.title }),
      ...field("User: choose one, or type a new id", this.input),
      ...this.answer.elements,
      el("div", { className: "row" }, ...this.feedback.buttons, this.why.button),
      ...this.feedback.elements,
      ...this.why.elements,
      ...this.history.elements,
      ...this.preferences.elements,
      ...this.erasure.elements,
    ];
  }

  /** Show another user, and answer the last question. */
  async choose(user) {
    this.user = this.input.value = user;
    this.asked = null;
    for (const part of [this.answer, this.feedback, this.why, this.history, this.preferences, this.erasure]) part.clear();
    const question = this.getQuestion();
    if (question) this.ask(question);
    await this.refresh();
    await this.onChosen();
  }

  async refresh() {
    await Promise.all([this.history.refresh(), this.preferences.refresh()]);
  }

  /** After a change of this user's data: show them, and answer the last question again. */
  async changed() {
    await this.refresh();
    if (this.asked) this.ask(this.asked.question, { showBefore: true }); // shows its own errors
  }

  async ask(question, { showBefore = false } = {}) {
    this.why.clear();
    this.feedback.clear();
    if (!this.user) return;
    const asked = { user: this.user, question, settings: this.getSettings() };
    this.asked = asked;
    const isComplete = await this.answer.ask(question, { user: this.user, showBefore, ...asked.settings });
    if (!isComplete || this.asked !== asked) return;
    const { answer, requestId, isPersonal, isOffTask } = this.answer;
    this.why.offer(isPersonal && answer !== "");
    this.feedback.offer(answer, requestId !== "" && answer !== "" && !isOffTask);
    this.announce(`${this.title}: ${this.answer.text.textContent}`);
    if (this.history.hasFailed) await this.refresh();
  }
}

export class PlainColumn {
  constructor({ getSettings, announce }) {
    Object.assign(this, { getSettings, announce });
    this.answer = new Answer();
    this.element = el(
      "section",
      { className: "column", ariaLabel: "Plain model" },
      el("h2", { textContent: "Plain model" }),
      el("p", { className: "hint", textContent: "The frozen model alone, for comparison." }),
      ...this.answer.elements,
    );
  }

  async ask(question) {
    if (await this.answer.ask(question, { user: null, ...this.getSettings() })) {
      this.announce(`Plain model: ${this.answer.text.textContent}`);
    }
  }
}
