// Why: the weights of a user's items, and how much likelier each item makes the answer.

import { call, userPath, withModel } from "./api.js";
import { bar, busy, el, problemLine, signedBar } from "./dom.js";
import { describeItem } from "./items.js";

const MOST = 10;

/** A button that explains the last answer. */
export class Why {
  /** `getAsked` returns the user and the model, and the prompt, the answer and the persona scale to explain. */
  constructor(getAsked) {
    this.place = el("div");
    this.problem = problemLine();
    this.button = el("button", { type: "button", textContent: "Why this answer?" });
    this.button.addEventListener("click", () => busy(this.button, this.problem, () => this._explain(getAsked())));
    this.elements = [this.problem, this.place];
    this.clear();
  }

  clear() {
    this.asked = null;
    this.place.replaceChildren();
    this.problem.textContent = "";
    this.button.hidden = true;
  }

  /** Offer an explanation if the user's own items made the persona. */
  offer(isPersonal) {
    this.button.hidden = !isPersonal;
  }

  async _explain(asked) {
    this.asked = asked;
    const { user, model, ...question } = asked;
    const found = await call("POST", withModel(userPath(user, "explain"), model), { ...question, most: MOST });
    if (this.asked !== asked) return; // another answer stands here now
    const { with_persona: own, with_population: common } = found.log_likelihood;
    const largest = Math.max(...found.items.map((item) => Math.abs(item.effect)), 1e-12);
    const heaviest = Math.max(...found.items.map((item) => item.weight), 1e-12);
    this.place.replaceChildren(
      el("p", { textContent: comparison(own - common, found.items_used) }),
      el("h3", { textContent: "Items with the largest effect" }),
      el("ol", { className: "effects", tabIndex: 0 }, ...found.items.map((item) => row(item, { largest, heaviest }))),
      el("p", {
        className: "hint",
        textContent:
          "Weight: the item's share of the persona; all weights add up to at most 1. Effect: with the item, the answer is so many times as likely as without it. Below 1, the item speaks against the answer.",
      }),
    );
  }
}

function row(item, { largest, heaviest }) {
  return el(
    "li",
    {},
    el("p", { textContent: describeItem(item) }),
    el("p", { className: "hint", textContent: `weight ${item.weight.toFixed(2)}` }),
    bar(item.weight / heaviest),
    el("p", { className: "hint", textContent: `effect × ${times(item.effect)}` }),
    signedBar(item.effect / largest),
  );
}

function times(logarithm) {
  const factor = Math.exp(logarithm);
  return factor < 100 ? factor.toFixed(2) : factor < 1e6 ? Math.round(factor).toLocaleString("en") : "over a million";
}

function comparison(gain, items) {
  const direction = gain >= 0 ? "likelier" : "less likely";
  return `With this user's ${items} items, the answer is ${times(Math.abs(gain))} times ${direction} than with the persona common to all users.`;
}
