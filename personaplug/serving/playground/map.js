// The map: each user's persona as a point, and the path of the chosen users' personas over time.

import { send, withModel } from "./api.js";
import { el, svg } from "./dom.js";

const WIDTH = 800;
const HEIGHT = 420;
const MARGIN = 40;
const MOST = 200;
const NEAREST = 3;

export class PersonaMap {
  /** `model` names the plug whose personas the map shows. */
  constructor({ model, section, hint, place, onChoose }) {
    this.model = model;
    this.section = section;
    this.hint = hint;
    this.place = place;
    this.onChoose = onChoose;
    this.users = [];
    this.running = null;
  }

  /** Read the map with the paths of the users `chosen`, an object from a column's id to a user. */
  async refresh(chosen) {
    this.running?.abort();
    this.running = new AbortController();
    const { signal } = this.running;
    const entries = Object.entries(chosen).filter(([, user]) => user);
    let found;
    try {
      const paths = entries.map(([, user]) => `&trail=${encodeURIComponent(user)}`);
      const path = withModel(`v1/personas?limit=${MOST}${paths.join("")}`, this.model);
      found = await (await send("GET", path, undefined, signal)).json();
    } catch (error) {
      if (signal.aborted) return;
      this.section.hidden = error.status === 403; // a key of one user may not see the others
      this.hint.textContent = `The map cannot be read. ${error.message}`;
      return;
    }
    if (signal.aborted) return;
    const { users, trails, explained, more } = found;
    this.users = users;
    this.section.hidden = users.length < 2;
    const share = Math.round(100 * (explained[0] + explained[1]));
    this.hint.textContent =
      `Each point is a user; near points have similar personas. The plane shows ${share} % of all differences.` +
      `${more ? " Only some of the users are shown." : ""} A dashed path leads from no items to today. Click a point to choose this user.`;
    this._draw(entries.map(([id, user]) => ({ id, user, trail: Object.hasOwn(trails, user) ? trails[user] : [] })));
  }

  /** Return the two users with the most different personas. */
  farthest() {
    const users = this.users.filter(({ items }) => items);
    let best = [-1, users[0]?.user ?? "", users[1]?.user ?? ""];
    users.forEach((a, index) => {
      for (const b of users.slice(index + 1)) {
        const distance = (a.x - b.x) ** 2 + (a.y - b.y) ** 2;
        if (distance > best[0]) best = [distance, a.user, b.user];
      }
    });
    return best.slice(1);
  }

  /** Return at most `count` users near the middle of the map who are not `chosen`. */
  others(chosen, count) {
    const distance = ({ x, y }) => x ** 2 + y ** 2;
    const others = this.users.filter(({ user, items }) => items && !chosen.includes(user));
    return others.sort((a, b) => distance(a) - distance(b)).slice(0, count).map(({ user }) => user);
  }

  _draw(chosen) {
    const place = scaled([...this.users, ...chosen.flatMap(({ trail }) => trail)]);
    const ids = new Set(chosen.map(({ user }) => user));
    const others = this.users.filter(({ user }) => !ids.has(user)).map((point) => this._point(point, place(point)));
    const label = `Personas of ${this.users.length} users as points of a plane`;
    const picture = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": label }, ...others);
    for (const { id, user, trail } of chosen.filter(({ trail }) => trail.length)) {
      const points = trail.map(place);
      const end = points.at(-1);
      picture.append(
        svg("polyline", { class: id, points: points.map((point) => point.join(",")).join(" ") }),
        ...points.map(([cx, cy]) => svg("circle", { class: `trail ${id}`, cx, cy, r: 2.5 })),
        this._point({ user, items: trail.at(-1).items }, end, id),
        nameOf(user, end, id),
      );
    }
    const lines = chosen.filter(({ trail }) => trail.length).map(({ user }) => this._nearest(user));
    this.place.replaceChildren(picture, ...lines.filter(Boolean));
  }

  /** Say in words who is near a user on the map. */
  _nearest(user) {
    const point = this.users.find((other) => other.user === user);
    if (!point) return null;
    const distance = ({ x, y }) => (x - point.x) ** 2 + (y - point.y) ** 2;
    const others = this.users.filter((other) => other.user !== user).sort((a, b) => distance(a) - distance(b));
    const names = others.slice(0, NEAREST).map((other) => other.user);
    return el("p", { className: "hint", textContent: `Nearest to ${user}: ${names.join(", ")}.` });
  }

  _point({ user, items }, [cx, cy], id = "") {
    const circle = svg("circle", { class: id, cx, cy, r: id ? 8 : 5 });
    circle.append(svg("title", {}, `${user}, ${items} ${items === 1 ? "item" : "items"}`));
    circle.addEventListener("click", () => this.onChoose(user));
    return circle;
  }
}

function nameOf(user, [x, y], id) {
  const isRight = x > WIDTH / 2;
  return svg("text", { class: id, x: x + (isRight ? -12 : 12), y: y + 4, "text-anchor": isRight ? "end" : "start" }, user);
}

/** Return a function from points to pixels, with the same scale in both directions. */
function scaled(points) {
  const [xs, ys] = [points.map(({ x }) => x), points.map(({ y }) => y)];
  const [left, right, low, high] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  const scale = Math.min((WIDTH - 2 * MARGIN) / Math.max(right - left, 1e-9), (HEIGHT - 2 * MARGIN) / Math.max(high - low, 1e-9));
  const [middleX, middleY] = [(left + right) / 2, (low + high) / 2];
  return ({ x, y }) => [WIDTH / 2 + scale * (x - middleX), HEIGHT / 2 - scale * (y - middleY)].map((value) => Number(value.toFixed(1)));
}
