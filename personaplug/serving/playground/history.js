// A user's history: list, add, delete and import items.

import { call, userPath, withModel } from "./api.js";
import { busy, el, field, problemLine } from "./dom.js";
import { parseRecords, textOf } from "./files.js";
import { describeItem, itemForm } from "./items.js";

const LISTED = 100;
const ITEMS_PER_REQUEST = 200;

export class History {
  /** `getUser` returns the column's user; `onChange` runs after a change of this user's history; `model` has the tasks. */
  constructor({ id, tasks, model, getUser, onChange }) {
    this.model = model;
    this.getUser = getUser;
    this.onChange = onChange;
    this.items = [];
    this.reads = 0;
    this.problem = problemLine();
    this.list = el("ul", { className: "items", tabIndex: 0, ariaLabel: "Items" });
    this.note = el("p", { className: "hint", role: "status" });
    this.summary = el("summary");
    const onSubmit = (item, button, reset) => busy(button, this.problem, () => this._add([item]).then(reset));
    const forms = tasks.flatMap((task, index) => [
      tasks.length > 1 ? el("h3", { textContent: `Task ${task.name}` }) : "",
      itemForm(task, { id: `${id}-field-${index}`, onSubmit }),
    ]);
    this.details = el("details", {}, this.summary, ...forms, this._importField(id), this.note, this.list);
    this.elements = [this.problem, this.details];
    this.clear();
  }

  clear() {
    this.items = [];
    this.hasFailed = false;
    this.problem.textContent = this.note.textContent = "";
    this.summary.textContent = "History";
    this.list.replaceChildren();
  }

  /** Read the history again. */
  async refresh() {
    const user = this.getUser();
    const turn = ++this.reads;
    let history = { count: 0, items: [] };
    let problem = null;
    try {
      if (user) history = await call("GET", `${userPath(user, "history")}?latest=${LISTED}`);
    } catch (error) {
      if (error.status !== 404) problem = error;
    }
    if (turn !== this.reads) return; // a later reading, perhaps of another user, shows its result
    this.hasFailed = problem !== null;
    if (problem) {
      this.items = [];
      this.list.replaceChildren();
      this.problem.textContent = `The history cannot be read. ${problem.message}`;
      return;
    }
    this.items = history.items;
    this.summary.textContent = `History (${history.count} ${history.count === 1 ? "item" : "items"})`;
    this.note.textContent = history.count > LISTED ? `The latest ${LISTED} items are listed.` : "";
    this.list.replaceChildren(...this.items.toReversed().map((item) => this._row(item, user)));
  }

  _row(item, user) {
    const button = el("button", { type: "button", textContent: "Delete", ariaLabel: `Delete the item ${describeItem(item)}` });
    button.addEventListener("click", () =>
      busy(button, this.problem, async () => {
        await call("DELETE", userPath(user, "history", item.id));
        await this.onChange(user);
        this.summary.focus();
      }),
    );
    const day = item.date ? el("p", { className: "hint", textContent: item.date }) : "";
    return el("li", {}, el("div", {}, el("p", { textContent: describeItem(item) }), day), button);
  }

  _importField(id) {
    const input = el("input", { id: `${id}-file`, type: "file", accept: ".json,.jsonl,.csv" });
    input.addEventListener("change", () =>
      busy(input, this.problem, async () => {
        const [file] = input.files;
        const bytes = file ? await file.arrayBuffer() : null;
        input.value = ""; // so that the same file can be chosen again
        if (bytes) await this._add(parseRecords(textOf(bytes), file.name));
      }),
    );
    const hint = "JSON, JSON Lines or CSV with the fields of an item. A field “date” (YYYY-MM-DD) is optional.";
    return el("div", {}, ...field("Import a file of items", input), el("p", { className: "hint", textContent: hint }));
  }

  /** Add records to the history of the user who is shown now, even if another user is chosen meanwhile. */
  async _add(records) {
    const user = this.getUser();
    if (!user) throw new Error("Choose a user first.");
    let added = 0;
    try {
      while (added < records.length) {
        await call("POST", withModel(userPath(user, "history"), this.model), { items: records.slice(added, added + ITEMS_PER_REQUEST) });
        added = Math.min(added + ITEMS_PER_REQUEST, records.length);
        if (user === this.getUser()) this.note.textContent = `${added} of ${records.length} items are added.`;
      }
    } catch (error) {
      const place = records.length > 1 ? `Items 1 to ${added} are added, those from ${added + 1} on are not. In these: ` : "";
      throw new Error(`${added ? place : ""}${error.message}`);
    } finally {
      if (added) await this.onChange(user);
    }
  }
}
