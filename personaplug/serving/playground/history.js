// A user's history: list, add, delete and import items.

import { call, userPath, withModel } from "./api.js";
import { busy, el, field, problemLine } from "./dom.js";
import { parseRecords, textOf } from "./files.js";
import { describeItem, itemForm } from "./items.js";
import { hasPicture, Thumbnails } from "./pictures.js";

const LISTED = 100;
const ITEMS_PER_REQUEST = 200;
const LENGTH_OF_REQUEST = 5e5; // characters of JSON; the server limits the bytes and the numbers of a body

export class History {
  /** `getUser` returns the column's user; `onChange` runs after a change of this user's history; `model` has the tasks. */
  constructor({ id, tasks, model, getUser, onChange }) {
    this.model = model;
    this.getUser = getUser;
    this.onChange = onChange;
    this.items = [];
    this.reads = 0;
    this.thumbnails = new Thumbnails();
    this.problem = problemLine();
    this.list = el("ul", { className: "items", tabIndex: 0, ariaLabel: "Items" });
    this.note = el("p", { className: "hint", role: "status" });
    this.summary = el("summary");
    const onSubmit = (read, button, reset) =>
      busy(button, this.problem, async () => {
        const user = this.getUser(); // before another one can be chosen
        await this._add([await read()], user);
        reset();
      });
    const forms = tasks.flatMap((task, index) => [
      tasks.length > 1 ? el("h3", { textContent: `Task ${task.name}` }) : "",
      itemForm(task, { id: `${id}-field-${index}`, onSubmit }),
    ]);
    const importField = this._importField(id, tasks.some((task) => task.image_field));
    this.details = el("details", {}, this.summary, ...forms, importField, this.note, this.list);
    this.elements = [this.problem, this.details];
    this.clear();
  }

  clear() {
    this.hasFailed = false;
    this.problem.textContent = this.note.textContent = "";
    this.summary.textContent = "History";
    this._list([], "");
  }

  _list(items, user) {
    this.items = items;
    this.thumbnails.clear();
    this.list.replaceChildren(...items.toReversed().map((item) => this._row(item, user)));
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
      this._list([], user);
      this.problem.textContent = `The history cannot be read. ${problem.message}`;
      return;
    }
    this.summary.textContent = `History (${history.count} ${history.count === 1 ? "item" : "items"})`;
    this.note.textContent = history.count > LISTED ? `The latest ${LISTED} items are listed.` : "";
    this._list(history.items, user);
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
    const picture = hasPicture(item) ? this.thumbnails.create(user, item) : "";
    return el("li", {}, picture, el("div", {}, el("p", { textContent: describeItem(item) }), day), button);
  }

  _importField(id, areTherePictures) {
    const input = el("input", { id: `${id}-file`, type: "file", accept: ".json,.jsonl,.csv" });
    input.addEventListener("change", () =>
      busy(input, this.problem, async () => {
        const user = this.getUser();
        const [file] = input.files;
        const bytes = file ? await file.arrayBuffer() : null;
        input.value = ""; // so that the same file can be chosen again
        if (bytes) await this._add(parseRecords(textOf(bytes), file.name), user);
      }),
    );
    const pictures = areTherePictures ? " A picture is a data URL." : "";
    const hint = `JSON, JSON Lines or CSV with the fields of an item. A field “date” (YYYY-MM-DD) is optional.${pictures}`;
    return el("div", {}, ...field("Import a file of items", input), el("p", { className: "hint", textContent: hint }));
  }

  /** Add records to the history of a user, even if another user is chosen meanwhile. */
  async _add(records, user) {
    if (!user) throw new Error("Choose a user first.");
    let added = 0;
    try {
      for (const items of batches(records)) {
        await call("POST", withModel(userPath(user, "history"), this.model), { items });
        added += items.length;
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

/** Split records into the bodies of requests, by number and by length; a long record is alone. */
function batches(records) {
  const bodies = [];
  let length = Infinity;
  for (const record of records) {
    const more = JSON.stringify(record).length;
    if (length + more > LENGTH_OF_REQUEST || bodies.at(-1).length === ITEMS_PER_REQUEST) {
      bodies.push([]);
      length = 0;
    }
    bodies.at(-1).push(record);
    length += more;
  }
  return bodies;
}
