// Start: read the task and the users, build the columns, and connect the parts.

import { call, setKey, userPath, withModel } from "./api.js";
import { PlainColumn, UserColumn } from "./column.js";
import { el } from "./dom.js";
import { PersonaMap } from "./map.js";
import { Prompt, questionOf } from "./prompt.js";

const byId = (id) => document.getElementById(id);
const EXAMPLES = 6;
const RECENT = 20; // items of another user, among which an example is searched

byId("key").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey(byId("key-text").value.trim());
  start();
});
start();

async function start() {
  byId("notice").hidden = true;
  try {
    const models = (await call("GET", "v1/models")).data.map(({ id }) => id);
    byId("key").hidden = true;
    const wanted = new URLSearchParams(location.search).get("model");
    const model = models.includes(wanted) ? wanted : models[0];
    const choice = byId("served-model");
    choice.replaceChildren(...models.map((id) => el("option", { value: id, textContent: id, selected: id === model })));
    choice.onchange = () => (location.search = new URLSearchParams({ model: choice.value }));
    byId("model-choice").hidden = models.length === 1;
    const described = await call("GET", withModel("v1/task", model));
    await build(model, described.tasks ?? [described]);
  } catch (error) {
    byId("ask").hidden = true;
    byId("key").hidden = error.status !== 401;
    if (error.status !== 401 || byId("key-text").value) {
      byId("notice").hidden = false;
      byId("notice").textContent = error.message;
    }
  }
}

/** Build the page for a model. Answers, reasons and the map are of this model's plug. */
async function build(model, tasks) {
  byId("ask").hidden = false;
  byId("model").textContent = `Model: ${model}. Task: ${tasks.map((task) => task.name).join(", ")}.`;
  let prompt = new Prompt(byId("prompt"), tasks[0]);
  let question = null; // the last one that was asked
  let examples = []; // questions that the page offers
  let next = 0; // the column that a click on the map fills
  const task = byId("task");
  task.replaceChildren(...tasks.map((each, index) => el("option", { value: index, textContent: each.name })));
  byId("task-choice").hidden = tasks.length === 1;
  task.onchange = () => {
    prompt = new Prompt(byId("prompt"), tasks[task.value]);
    return drawExamples();
  };

  const strength = byId("strength");
  const getSettings = () => ({ model, strength: Number(strength.value) });
  const shared = { tasks, model, getSettings, announce, getQuestion: () => question, onChosen: drawMap, onChanged: refresh };
  const columns = [
    new UserColumn({ ...shared, id: "first", title: "First user" }),
    new UserColumn({ ...shared, id: "second", title: "Second user" }),
  ];
  const plain = new PlainColumn(shared);
  const users = el("datalist", { id: "users" });
  byId("columns").replaceChildren(...columns.map(({ element }) => element), plain.element, users);
  const map = new PersonaMap({
    model,
    section: byId("map"),
    hint: byId("map-hint"),
    place: byId("map-picture"),
    onChoose: (user) => columns[next++ % columns.length].choose(user),
  });

  function drawMap() {
    return map.refresh({ first: columns[0].user, second: columns[1].user });
  }

  async function refreshUsers() {
    try {
      const listed = await call("GET", "v1/users");
      users.replaceChildren(...listed.users.map(({ user, items }) => el("option", { value: user, label: `${items} items` })));
    } catch (error) {
      if (error.status !== 403) throw error; // a key of one user may not list the others
    }
    await drawMap();
  }

  /** After a change of a user's data: show them in each column of this user. */
  async function refresh(user) {
    await Promise.all(columns.filter((column) => column.user === user).map((column) => column.changed()));
    await refreshUsers();
    await drawExamples(); // an erased user's questions must go
  }

  /** Offer questions of other users as examples, because the chosen users' histories hold the answers to their own. */
  async function drawExamples() {
    const others = map.others(columns.map(({ user }) => user), EXAMPLES);
    const read = async (user) => (await call("GET", `${userPath(user, "history")}?latest=${RECENT}`)).items;
    const histories = await Promise.all(others.map((user) => read(user).catch(() => []))); // examples are no necessity
    const latest = [...histories, ...columns.map(({ history }) => history.items)].map(latestQuestion);
    const questions = [...new Set(latest.filter(Boolean))].slice(0, EXAMPLES);
    const isGone = examples.includes(prompt.text.value) && !questions.includes(prompt.text.value);
    examples = questions;
    byId("examples").replaceChildren(...questions.map(exampleButton));
    if (!prompt.text.value || isGone) prompt.write(questions[0] ?? "");
  }

  function latestQuestion(items) {
    return items.map((item) => questionOf(item, prompt.task)).findLast(Boolean);
  }

  function exampleButton(text) {
    const button = el("button", { type: "button", textContent: text });
    button.addEventListener("click", () => {
      prompt.write(text);
      askAll();
    });
    return button;
  }

  function askAll() {
    question = prompt.question;
    byId("asked").textContent = question ? `Answers to: ${question.query}` : "Write a question first.";
    if (!question) return;
    for (const column of [...columns, plain]) column.ask(question);
    if (byId("columns").getBoundingClientRect().top > 0.6 * innerHeight) byId("asked").scrollIntoView();
  }

  byId("ask").onsubmit = (event) => {
    event.preventDefault();
    askAll();
  };
  byId("ask").onkeydown = (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("ask").requestSubmit();
  };
  strength.oninput = () => (byId("strength-value").textContent = strength.value);
  strength.onchange = () => {
    for (const column of columns) if (column.asked) column.ask(column.asked.question, { showBefore: true });
  };

  await refreshUsers();
  const pair = map.farthest();
  const choose = (column, index) => column.input.value || column.choose(pair[index]); // keeps an id that was typed meanwhile
  await Promise.all(columns.map(choose));
  await drawExamples();
}

function announce(text) {
  byId("announcer").textContent = text;
}
