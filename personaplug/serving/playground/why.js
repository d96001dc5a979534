// Why: the weights of a user's items, and how much likelier each item makes the answer.

import { call, userPath } from "./api.js";
import { bar, busy, el, signedBar } from "./dom.js";

const MOST = 10;

/** A button that explains the last answer. */
export class Why {
  constructor({ describe, question }) {
    this.describe = describe;
    this.place = el("div");
    this.problem = el("p", { className: "problem", role: "alert" });
    this.button = el("button", { type: "button", textContent: "Why this answer?" });
    this.button.addEventListener("click", () => busy(this.button, this.problem, () => this._explain(question())));
    this.elements = [this.problem, this.place];
    this.clear();
  }

  clear() {
    this.place.replaceChildren();
    this.problem.textContent = "";
    this.button.hidden = true;
  }

  /** Offer an explanation if a persona of the user's own items wrote the answer. */
  offer(isPersonal) {
    this.button.hidden = !isPersonal;
  }

  async _explain({ user, prompt, answer }) {
    const found = await call("POST", userPath(user, "explain"), { prompt, answer, most: MOST });
    const { with_persona: own, with_population: common } = found.log_likelihood;
    const largest = Math.max(...found.items.map((item) => Math.abs(item.effect)), 1e-12);
    const heaviest = Math.max(...found.items.map((item) => item.weight), 1e-12);
    this.place.replaceChildren(
      el("p", { className: "hint", textContent: comparison(own - common, found.items_used) }),
      el("h3", { textContent: `The ${found.items.length} items with the largest effect` }),
      el("ol", { className: "effects" }, ...found.items.map((item) => this._row(item, { largest, heaviest }))),
      el("p", {
        className: "hint",
        textContent:
          "Weight: the item's share of the persona. Effect: how much the item adds to the log-likelihood of this answer. Items with a negative effect speak against the answer.",
      }),
    );
  }

  _row(item, { largest, heaviest }) {
    const sign = item.effect < 0 ? "−" : "+";
    return el(
      "li",
      {},
      el("p", { textContent: this.describe(item) }),
      el("p", { className: "hint", textContent: `weight ${item.weight.toFixed(2)}` }),
      bar(item.weight / heaviest),
      el("p", { className: "hint", textContent: `effect ${sign}${Math.abs(item.effect).toFixed(2)}` }),
      signedBar(item.effect / largest),
    );
  }
}

function comparison(gain, items) {
  const factor = Math.exp(Math.abs(gain));
  const times = factor < 10 ? factor.toFixed(1) : factor < 1e6 ? Math.round(factor).toLocaleString("en") : "over a million";
  const direction = gain >= 0 ? "likelier" : "less likely";
  return `With the ${items} items of this user, the answer is ${times} times ${direction} than with the persona common to all users.`;
}
