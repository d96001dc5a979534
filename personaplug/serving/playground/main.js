// Start: read the task and the users, build the columns, and connect the parts.

import { call, setKey, userPath } from "./api.js";
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
    const [models, described] = await Promise.all([call("GET", "v1/models"), call("GET", "v1/task")]);
    byId("key").hidden = true;
    await build(models.data[0].id, described.tasks ?? [described]);
  } catch (error) {
    byId("ask").hidden = true;
    byId("key").hidden = error.status !== 401;
    if (error.status !== 401 || byId("key-text").value) {
      byId("notice").hidden = false;
      byId("notice").textContent = error.message;
    }
  }
}

async function build(model, tasks) {
  byId("ask").hidden = false;
  byId("model").textContent = `Model: ${model}. Task: ${tasks.map((task) => task.name).join(", ")}.`;
  let prompt = new Prompt(byId("prompt"), tasks[0]);
  const task = byId("task");
  task.replaceChildren(...tasks.map((each, index) => el("option", { value: index, textContent: each.name })));
  byId("task-choice").hidden = tasks.length === 1;
  task.onchange = () => {
    prompt = new Prompt(byId("prompt"), tasks[task.value]);
    return drawExamples();
  };

  const strength = byId("strength");
  const getPrompt = () => prompt;
  const getSettings = () => ({ model, strength: Number(strength.value) });
  const shared = { tasks, getPrompt, getSettings, onUsersChange: refreshUsers, onUserChosen: drawMap };
  const first = new UserColumn({ ...shared, id: "first", title: "First user" });
  const second = new UserColumn({ ...shared, id: "second", title: "Second user" });
  const plain = new PlainColumn({ getPrompt, getSettings });
  const users = el("datalist", { id: "users" });
  byId("columns").replaceChildren(first.element, second.element, plain.element, users);

  let next = first;
  const map = new PersonaMap({
    section: byId("map"),
    hint: byId("map-hint"),
    place: byId("map-picture"),
    onChoose: async (user) => {
      const column = next;
      next = next === first ? second : first;
      await column.choose(user);
      column.input.scrollIntoView({ block: "center" });
    },
  });

  function drawMap() {
    return map.refresh({ first: first.user, second: second.user });
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


  /** Offer questions of other users as examples, because the chosen users' histories hold the answers to their own. */
  async function drawExamples() {
    const others = map.others([first.user, second.user], EXAMPLES);
    const read = async (user) => (await call("GET", `${userPath(user, "history")}?latest=${RECENT}`)).items;
    const histories = await Promise.all(others.map(read));
    const latest = [...histories, first.history.items, second.history.items].map(latestQuestion);
    const questions = [...new Set(latest.filter(Boolean))].slice(0, EXAMPLES);
    byId("examples").replaceChildren(...questions.map(exampleButton));
    if (!prompt.text.value && questions.length) prompt.query = questions[0];
  }

  function latestQuestion(items) {
    return items.map((item) => questionOf(item, prompt.task)).findLast(Boolean);
  }

  function exampleButton(question) {
    const button = el("button", { type: "button", textContent: question.length > 70 ? `${question.slice(0, 70)}…` : question });
    button.addEventListener("click", () => {
      prompt.query = question;
      askAll();
    });
    return button;
  }

  async function askAll() {
    await Promise.all([first.ask(), second.ask(), plain.ask()]);
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
    for (const column of [first, second]) if (column.answer.answer) column.ask({ showBefore: true });
  };

  await refreshUsers();
  const [a, b] = map.farthest();
  await Promise.all([first.choose(a), second.choose(b)]);
  await drawExamples();
}
