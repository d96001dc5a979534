// Erase a user, and show the receipt.

import { call, userPath } from "./api.js";
import { busy, el, problemLine } from "./dom.js";

export class Erasure {
  constructor({ getUser, onErased }) {
    this.getUser = getUser;
    this.onErased = onErased;
    this.problem = problemLine();
    this.receipt = el("div", { className: "receipt", role: "status" });
    this.question = el("p");
    this.button = el("button", { type: "button", className: "danger", textContent: "Erase this user" });
    const cancel = el("button", { type: "button", textContent: "Cancel", autofocus: true });
    const confirm = el("button", { type: "button", className: "danger", textContent: "Erase everything" });
    this.dialog = el("dialog", { ariaLabel: "Erase a user" }, this.question, el("div", { className: "row" }, cancel, confirm));
    this.button.addEventListener("click", () => this._open());
    cancel.addEventListener("click", () => this.dialog.close());
    confirm.addEventListener("click", () => busy(confirm, this.problem, () => this._erase()));
    this.elements = [el("div", { className: "row" }, this.button), this.dialog, this.problem, this.receipt];
    this.clear();
  }

  clear() {
    this.receipt.replaceChildren();
    this.problem.textContent = "";
    this.button.disabled = !this.getUser();
  }

  _open() {
    this.user = this.getUser();
    this.question.textContent = `Erase the user ${this.user}: all items, preferences and the persona? This cannot be undone.`;
    this.dialog.showModal();
  }

  async _erase() {
    const user = this.user;
    this.dialog.close();
    this.clear();
    const receipt = await call("DELETE", userPath(user));
    this._show(user, receipt); // first, because it cannot be fetched again
    await this.onErased(user);
  }

  _show(user, receipt) {
    const text = JSON.stringify(receipt, null, 2);
    const link = el("a", { textContent: "Save the receipt", download: "erasure-receipt.json" });
    link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    this.receipt.replaceChildren(
      el("h3", { textContent: `The user ${user} is erased. The receipt:` }),
      el("pre", { tabIndex: 0, textContent: text }),
      link,
      el("p", { className: "hint", textContent: "The receipt names the user by a hash only. personaplug verify-receipt checks it." }),
    );
  }
}
