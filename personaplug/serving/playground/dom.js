// Build elements. Texts are always set as text, never as HTML.

/** Create an element with properties, and append children (elements or texts). */
export function el(name, properties = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key in element) element[key] = value;
    else element.setAttribute(key, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

/** Create an SVG element with attributes and children. */
export function svg(name, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

/** Create a labelled field; return the label and the control. */
export function field(text, control) {
  return [el("label", { textContent: text, htmlFor: control.id }), control];
}

/** Create a bar from 0 to 1. A number beside it must give the value, because screen readers skip bars. */
export function bar(share) {
  const inner = el("span");
  inner.style.width = `${100 * share}%`;
  return el("div", { className: "bar", ariaHidden: "true" }, inner);
}

/** Create a bar to the right for a positive share, or to the left for a negative one (-1 to 1). */
export function signedBar(share) {
  const inner = el("span", { className: share < 0 ? "less" : "" });
  inner.style.width = `${50 * Math.abs(share)}%`;
  inner.style.marginLeft = `${share < 0 ? 50 + 50 * share : 50}%`;
  return el("div", { className: "bar effect", ariaHidden: "true" }, inner);
}

/** Create a line for the error of an action; screen readers read it at once. */
export function problemLine() {
  return el("p", { className: "problem", role: "alert" });
}

/** Run an action of a control once at a time; show its error in `place`, and keep the focus on the control. */
export async function busy(control, place, action) {
  if (control.disabled) return;
  const hadFocus = document.activeElement === control;
  control.disabled = true;
  place.textContent = "";
  try {
    await action();
  } catch (error) {
    place.textContent = error.message;
  } finally {
    control.disabled = false;
    if (hadFocus && document.activeElement === document.body) control.focus();
  }
}
