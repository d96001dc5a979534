// Items of a history as texts, and the fields of a form for a new item.

import { el, field } from "./dom.js";

const FACTS = ["id", "date", "arrived", "kind", "weight", "effect"];

/** Describe an item in one line. */
export function describeItem(item) {
  const fields = Object.entries(item).filter(([name, value]) => !FACTS.includes(name) && value !== null);
  if (!fields.length) return `Item ${item.id} (the store keeps no texts)`;
  return fields.map(([name, value]) => `${name}: ${value}`).join(" · ");
}

/** Return a form for an item of a task. `onSubmit` gets the item and the form's button. */
export function itemForm(task, { id, onSubmit }) {
  const names = (task.item_fields ?? []).filter((name) => name !== task.answer_field);
  const controls = [...names.map((name) => [name, control(`${id}-${name}`, [])])];
  controls.push([task.answer_field, control(`${id}-${task.answer_field}`, task.labels)]);
  const button = el("button", { type: "submit", textContent: "Add the item" });
  const form = el(
    "form",
    {},
    ...controls.flatMap(([name, input]) => field(`New item: ${name}`, input)),
    el("div", { className: "row" }, button),
  );
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const given = controls.map(([name, input]) => [name, input.value.trim()]).filter(([, value]) => value);
    onSubmit(Object.fromEntries(given), button, () => form.reset());
  });
  return form;
}

function control(id, labels) {
  if (!labels.length) return el("textarea", { id, rows: 2, required: true });
  const options = ["", ...labels].map((label) => el("option", { value: label, textContent: label }));
  return el("select", { id, required: true }, ...options);
}
