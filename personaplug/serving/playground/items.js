// Items of a history as texts, and the fields of a form for a new item.

import { el, field } from "./dom.js";
import { dataUrl } from "./pictures.js";

const PICTURES = "image/png,image/jpeg,image/gif,image/webp,image/bmp";
const FACTS = ["id", "date", "arrived", "kind", "weight", "effect"];

/** Describe an item in one line. */
export function describeItem(item) {
  const fields = Object.entries(item).filter(([name, value]) => !FACTS.includes(name) && value !== null && value !== "");
  if (!fields.length) return `Item ${item.id} (the store keeps no texts)`;
  return fields.map(([name, value]) => `${name}: ${value.type ?? value}`).join(" · "); // a picture has a type, no value
}

/** Return a form for an item of a task. `onSubmit` gets a function that reads the item, the form's button, and a reset. */
export function itemForm(task, { id, onSubmit }) {
  const names = (task.item_fields ?? []).filter((name) => name !== task.answer_field);
  const controls = [...names.map((name) => [name, control(`${id}-${name}`, [])])];
  const texts = controls.map(([, input]) => input);
  if (task.answer_field) controls.push([task.answer_field, control(`${id}-${task.answer_field}`, task.labels)]);
  const picture = el("input", { id: `${id}-picture`, type: "file", accept: PICTURES });
  const button = el("button", { type: "submit", textContent: "Add the item" });
  const form = el(
    "form",
    {},
    ...(task.image_field ? field(`New item: ${task.image_field} (a picture)`, picture) : []),
    ...controls.flatMap(([name, input]) => field(`New item: ${name}`, input)),
    el("div", { className: "row" }, button),
  );
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const given = controls.map(([name, input]) => [name, input.value.trim()]).filter(([, value]) => value);
    const [file] = picture.files;
    const read = async () => Object.fromEntries(file ? [...given, [task.image_field, await dataUrl(file)]] : given);
    onSubmit(read, button, () => form.reset());
  });
  // An item with a picture needs no texts besides its answer.
  const require = (areRequired) => texts.forEach((input) => (input.required = areRequired));
  picture.addEventListener("change", () => require(!picture.files.length));
  form.addEventListener("reset", () => require(true));
  return form;
}

function control(id, labels) {
  if (!labels.length) return el("textarea", { id, rows: 2, required: true });
  const options = ["", ...labels].map((label) => el("option", { value: label, textContent: label }));
  return el("select", { id, required: true }, ...options);
}
