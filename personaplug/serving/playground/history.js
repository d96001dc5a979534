// A user's history: list, add, delete, import, and state preferences.

import { call, userPath } from "./api.js";
import { busy, el, field } from "./dom.js";
import { parseRecords } from "./files.js";

const LISTED = 100;
const ITEMS_PER_REQUEST = 200;

export class History {
  constructor({ id, tasks, getUser, onChange }) {
    this.id = id;
    this.tasks = tasks;
    this.getUser = getUser;
    this.onChange = onChange;
    this.items = [];
    this.list = el("ul", { className: "items" });
    this.summary = el("summary", { textContent: "History" });
    this.problem = el("p", { className: "problem", role: "alert" });
    this.preferences = el("textarea", { id: `${id}-preferences`, rows: 3 });
    this.preferencesHint = el("p", { className: "hint" });
    this.elements = [
      el("details", { className: "history" }, this.summary, this._addForm(), this._importField(), this.problem, this.list),
      el("details", { className: "preferences" }, el("summary", { textContent: "Stated preferences" }), this._preferencesForm()),
    ];
  }

  /** Read the history again, and return its items, oldest first. */
  async refresh() {
    const user = this.getUser();
    this.problem.textContent = "";
    let history = { count: 0, items: [] };
    if (user) {
      try {
        history = await call("GET", `${userPath(user, "history")}?latest=${LISTED}`);
      } catch (error) {
        if (error.status !== 404) this.problem.textContent = error.message;
      }
    }
    if (user !== this.getUser()) return this.items;
    this.items = history.items;
    this.summary.textContent = `History (${history.count} ${history.count === 1 ? "item" : "items"})`;
    this.list.replaceChildren(...this.items.toReversed().map((item) => this._row(item)));
    const stated = this.items.filter((item) => item.kind === "preference");
    this.preferences.value = stated.map((item) => item.preference ?? "").join("\n");
    return this.items;
  }

  /** Describe an item in one line. */
  describe(item) {
    const names = ["id", "date", "arrived", "kind", "weight", "effect"];
    const fields = Object.entries(item).filter(([name, value]) => !names.includes(name) && value !== null);
    if (!fields.length) return `Item ${item.id} (the store keeps no texts)`;
    return fields.map(([name, value]) => `${name}: ${value}`).join(" · ");
  }

  _row(item) {
    const button = el("button", { type: "button", textContent: "Delete", ariaLabel: `Delete the item ${this.describe(item)}` });
    button.addEventListener("click", () =>
      busy(button, this.problem, async () => {
        await call("DELETE", userPath(this.getUser(), "history", item.id));
        await this.onChange();
      }),
    );
    const day = item.date ? el("p", { className: "hint", textContent: item.date }) : null;
    return el("li", {}, el("div", {}, el("p", { textContent: this.describe(item) }), day), button);
  }

  _addForm() {
    const task = this.tasks[0];
    const controls = (task.item_fields ?? []).filter((name) => name !== task.answer_field).map((name) => this._control(name, []));
    controls.push(this._control(task.answer_field, task.labels));
    const button = el("button", { type: "submit", textContent: "Add the item" });
    const form = el("form", {}, ...controls.flatMap(({ elements }) => elements), el("div", { className: "row" }, button));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      const given = controls.map(({ name, control }) => [name, control.value.trim()]).filter(([, value]) => value);
      busy(button, this.problem, async () => {
        await this._add([Object.fromEntries(given)]);
        form.reset();
      });
    });
    return form;
  }

  _control(name, labels) {
    const id = `${this.id}-field-${name}`;
    const options = ["", ...labels].map((label) => el("option", { value: label, textContent: label }));
    const control = labels.length ? el("select", { id, required: true }, ...options) : el("textarea", { id, rows: 2, required: true });
    return { name, control, elements: field(`New item: ${name}`, control) };
  }

  _importField() {
    const input = el("input", { id: `${this.id}-file`, type: "file", accept: ".json,.jsonl,.csv" });
    input.addEventListener("change", () =>
      busy(input, this.problem, async () => {
        const [file] = input.files;
        const text = file ? await file.text() : "";
        input.value = ""; // so that the same file can be chosen again
        if (file) await this._add(parseRecords(text, file.name));
      }),
    );
    const hint = "JSON, JSON Lines or CSV with the fields of an item. Column “date” (YYYY-MM-DD) is optional.";
    return el("div", {}, ...field("Import a file of items", input), el("p", { className: "hint", textContent: hint }));
  }

  async _add(records) {
    if (!this.getUser()) throw new Error("Choose a user first.");
    if (!records.length) return;
    for (let start = 0; start < records.length; start += ITEMS_PER_REQUEST) {
      await call("POST", userPath(this.getUser(), "history"), { items: records.slice(start, start + ITEMS_PER_REQUEST) });
    }
    await this.onChange();
  }

  _preferencesForm() {
    const button = el("button", { type: "submit", textContent: "Save the preferences" });
    const problem = el("p", { className: "problem", role: "alert" });
    const form = el(
      "form",
      {},
      ...field("One sentence per line, such as “Short answers, please.”", this.preferences),
      el("div", { className: "row" }, button),
      this.preferencesHint,
      problem,
    );
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      busy(button, problem, async () => {
        if (!this.getUser()) throw new Error("Choose a user first.");
        const preferences = this.preferences.value.split("\n").map((line) => line.trim()).filter(Boolean);
        const reply = await call("PUT", userPath(this.getUser(), "preferences"), { preferences });
        this.preferencesHint.textContent = reply.used
          ? "Saved. The next answer uses them."
          : "Saved, but this plug was trained without stated preferences, so it ignores them.";
        await this.onChange();
      });
    });
    return form;
  }
}
