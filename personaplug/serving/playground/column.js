// The column of one user: the answer, feedback, why, the history, and the erasure.

import { Answer } from "./answer.js";
import { call, userPath } from "./api.js";
import { busy, el, field } from "./dom.js";
import { Feedback } from "./feedback.js";
import { History } from "./history.js";
import { Why } from "./why.js";

export class UserColumn {
  constructor({ id, title, tasks, getPrompt, getSettings, onUsersChange, onUserChosen }) {
    this.id = id;
    this.getPrompt = getPrompt;
    this.getSettings = getSettings;
    this.onUsersChange = onUsersChange;
    this.onUserChosen = onUserChosen;
    this.user = "";
    this.answer = new Answer();
    const labels = tasks.length === 1 ? tasks[0].labels : [];
    const parts = { id, tasks, labels, getUser: () => this.user, onChange: () => this.changed() };
    this.history = new History(parts);
    this.feedback = new Feedback({
      ...parts,
      getAnswer: () => ({ text: this.answer.answer, requestId: this.answer.requestId }),
    });
    this.why = new Why({
      describe: (item) => this.history.describe(item),
      question: () => ({ user: this.user, prompt: this.asked, answer: this.answer.answer }),
    });
    this.input = el("input", { id: `${id}-user`, autocomplete: "off" });
    this.input.setAttribute("list", "users");
    this.input.addEventListener("change", () => this.choose(this.input.value));
    this.hint = el("p", { className: "hint", role: "status" });
    this.element = el(
      "section",
      { className: `column ${id}`, ariaLabel: title },
      el("h2", { textContent: title }),
      ...field("User: choose one, or type a new id", this.input),
      ...this.answer.elements,
      el("div", { className: "row" }, ...this.feedback.buttons, this.why.button),
      ...this.feedback.elements,
      ...this.why.elements,
      this.hint,
      ...this.history.elements,
      this._eraser(),
    );
  }

  /** Show another user. */
  async choose(user) {
    this.user = user.trim();
    this.input.value = this.user;
    this.hint.textContent = "";
    this._clear();
    await this.history.refresh();
    this.onUserChosen();
  }

  async ask({ showBefore = false } = {}) {
    this.why.clear();
    this.feedback.clear();
    const prompt = this.getPrompt();
    if (!prompt.value) return;
    if (!this.user) {
      this.hint.textContent = "Choose a user to get this answer.";
      return;
    }
    this.asked = prompt.value;
    await this.answer.ask(prompt, { user: this.user, showBefore, ...this.getSettings() });
    this.why.offer(this.answer.isPersonal && this.answer.answer !== "");
    this.feedback.offer(this.answer.answer, this.answer.requestId !== "" && this.answer.answer !== "");
  }

  /** After a change of the history: show it, and answer the last prompt again. */
  async changed() {
    await this.history.refresh();
    await this.onUsersChange();
    if (this.answer.answer) this.ask({ showBefore: true }); // shows its own errors
  }

  _clear() {
    this.answer.clear();
    this.feedback.clear();
    this.why.clear();
  }

  _eraser() {
    const problem = el("p", { className: "problem", role: "alert" });
    const receipt = el("div");
    const open = el("button", { type: "button", className: "danger", textContent: "Erase this user" });
    const confirm = el("button", { type: "button", className: "danger", textContent: "Erase everything" });
    const cancel = el("button", { type: "button", textContent: "Cancel" });
    const question = el("p");
    const dialog = el(
      "dialog",
      { ariaLabel: "Erase a user" },
      question,
      el("div", { className: "row" }, confirm, cancel),
    );
    open.addEventListener("click", () => {
      if (!this.user) return;
      question.textContent = `Erase the user ${this.user}: all items, preferences and the persona? This cannot be undone.`;
      dialog.showModal();
    });
    cancel.addEventListener("click", () => dialog.close());
    confirm.addEventListener("click", () =>
      busy(confirm, problem, async () => {
        dialog.close();
        const user = this.user;
        const found = await call("DELETE", userPath(user));
        this._clear();
        await this.history.refresh();
        await this.onUsersChange();
        receipt.replaceChildren(...receiptOf(found));
        this.ask();
      }),
    );
    return el("div", { className: "row" }, open, dialog, problem, receipt);
  }
}

function receiptOf(receipt) {
  const text = JSON.stringify(receipt, null, 2);
  const link = el("a", { textContent: "Save the receipt", download: "erasure-receipt.json" });
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  return [
    el("h3", { textContent: "Erased. This is the receipt:" }),
    el("pre", { tabIndex: 0, textContent: text }),
    link,
    el("p", { className: "hint", textContent: "personaplug verify-receipt checks it." }),
  ];
}

/** The column of the plain model. */
export class PlainColumn {
  constructor({ getPrompt, getSettings }) {
    this.getPrompt = getPrompt;
    this.getSettings = getSettings;
    this.answer = new Answer();
    this.element = el(
      "section",
      { className: "column", ariaLabel: "Plain model" },
      el("h2", { textContent: "Plain model" }),
      el("p", { className: "hint", textContent: "The frozen model without soft tokens, for comparison." }),
      ...this.answer.elements,
    );
  }

  async ask() {
    const prompt = this.getPrompt();
    if (prompt.value) await this.answer.ask(prompt, { user: null, ...this.getSettings() });
  }
}
