// Pictures of items: thumbnails of those that the store keeps, and the files that people choose.

import { send, userPath } from "./api.js";
import { el } from "./dom.js";

/** Return whether the store keeps a picture of an item. */
export function hasPicture(item) {
  return Object.values(item).some((value) => value?.type === "picture" && value.kept);
}

/** Return the content of a file as a data URL. */
export function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error("The file of the picture cannot be read."));
    reader.readAsDataURL(file);
  });
}

/** The thumbnails of a list; each is loaded when it comes into view. */
export class Thumbnails {
  constructor() {
    this.paths = new Map(); // by image
    this.urls = [];
    this.observer = new IntersectionObserver((entries) => {
      for (const { isIntersecting, target } of entries) if (isIntersecting) this._load(target);
    });
  }

  /** Forget all thumbnails, and free their memory. */
  clear() {
    this.observer.disconnect();
    this.paths.clear();
    this.urls.splice(0).forEach((url) => URL.revokeObjectURL(url));
  }

  /** Return an image with the picture of a user's item. */
  create(user, item) {
    const image = el("img", { className: "thumbnail", alt: "Picture of this item" });
    this.paths.set(image, userPath(user, "history", item.id, "picture"));
    this.observer.observe(image);
    return image;
  }

  async _load(image) {
    this.observer.unobserve(image);
    try {
      // Not by the path in `src`, because a request for an image has no API key.
      const picture = await (await send("GET", this.paths.get(image))).blob();
      if (!this.paths.has(image)) return; // another list is shown now
      this.urls.push(URL.createObjectURL(picture));
      image.src = this.urls.at(-1);
    } catch (error) {
      image.replaceWith(el("p", { className: "hint", textContent: `The picture cannot be shown. ${error.message}` }));
    }
  }
}
