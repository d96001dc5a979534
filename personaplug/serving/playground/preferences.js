// A user's stated preferences, one sentence per line.

import { call, userPath } from "./api.js";
import { busy, el, field, problemLine } from "./dom.js";

const MOST = 100;

export class Preferences {
  constructor({ id, getUser, onChange, areUsed }) {
    this.getUser = getUser;
    this.onChange = onChange;
    this.saved = "";
    this.text = el("textarea", { id: `${id}-preferences`, rows: 3 });
    this.hint = el("p", { className: "hint", role: "status" });
    this.problem = problemLine();
    this.button = el("button", { type: "submit", textContent: "Save the preferences" });
    const form = el(
      "form",
      {},
      ...field("One sentence per line, such as “Short answers, please.”", this.text),
      areUsed ? "" : el("p", { className: "hint", textContent: "This plug was trained without preferences, so it stores them without using them." }),
      el("div", { className: "row" }, this.button),
      this.hint,
      this.problem,
    );
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      busy(this.button, this.problem, () => this._save());
    });
    this.elements = [el("details", {}, el("summary", { textContent: "Stated preferences" }), form)];
  }

  clear() {
    this.saved = this.text.value = this.hint.textContent = this.problem.textContent = "";
    this.text.disabled = false;
  }

  /** Read the preferences again, unless the text has changes that are not saved. */
  async refresh() {
    const user = this.getUser();
    if (!user || this.text.value !== this.saved) return;
    try {
      const { preferences } = await call("GET", userPath(user, "preferences"));
      if (user !== this.getUser() || this.text.value !== this.saved) return;
      this.saved = this.text.value = preferences.map((item) => item.preference ?? "").filter(Boolean).join("\n");
      this.text.disabled = preferences.some((item) => !item.preference);
      if (this.text.disabled) this.hint.textContent = `${preferences.length} preferences. The store keeps no texts, so they cannot be edited here.`;
    } catch (error) {
      if (error.status !== 404) this.problem.textContent = error.message;
    }
  }

  async _save() {
    const user = this.getUser();
    if (!user) throw new Error("Choose a user first.");
    if (this.text.disabled) return;
    const text = this.text.value;
    const preferences = text.split("\n").map((line) => line.trim()).filter(Boolean);
    if (preferences.length > MOST) throw new Error(`A user has at most ${MOST} preferences; these are ${preferences.length}.`);
    await call("PUT", userPath(user, "preferences"), { preferences });
    if (user === this.getUser()) {
      this.saved = text;
      this.hint.textContent = "Saved.";
    }
    await this.onChange(user);
  }
}
