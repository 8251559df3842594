// Ways to an image: choose, drop, paste, photograph, take a sample.

import { isAbort, path } from "./api.js";
import { announce, h, replace } from "./dom.js";
import { fromFile, undecoded } from "./image.js";
import { problemBox } from "./components.js";

let taken = 0;

// The first of `files` becomes the image at hand; all of them the images of the grid.
export async function take(app, files) {
  const chosen = [...files];
  if (!chosen.length) return;
  const mine = ++taken;
  const images = [await fromFile(chosen[0]), ...chosen.slice(1).map((file) => undecoded(file))];
  if (mine !== taken) return; // a large picture, decoded after one that was taken later
  // The first picture is for the class that the address names; the next are for what is seen in them.
  const { image, target } = app.store.get();
  app.store.set({ images, image: images[0], target: image ? "predicted" : target });
  announce(images.length === 1 ? `${images[0].name} is loaded.` : `${images.length} images are loaded.`);
}

// Anything dropped on, or pasted into, the window is an image at hand, whatever the view.
export function listen(app) {
  let depth = 0;
  const over = (on) => document.body.classList.toggle("dropping", on);
  const hasFiles = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
  addEventListener("dragenter", (event) => hasFiles(event) && over(++depth > 0));
  addEventListener("dragleave", (event) => hasFiles(event) && over(--depth > 0));
  addEventListener("dragover", (event) => hasFiles(event) && event.preventDefault());
  addEventListener("drop", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    over((depth = 0) > 0);
    take(app, event.dataTransfer.files);
  });
  addEventListener("paste", (event) => {
    const files = [...(event.clipboardData?.files ?? [])];
    if (files.length) take(app, files);
  });
}

// A panel with every way to an image. Views put it where they have none yet, or beside what they show.
export function picker(app, { title = "Take an image" } = {}) {
  const input = h("input", { type: "file", accept: "image/*", multiple: true, class: "unseen", tabindex: -1, "aria-label": "Image files", on: { change: () => take(app, input.files) } });
  const open = () => {
    input.value = ""; // the same file again is a choice too
    input.click();
  };
  const samples = h("div", { class: "samples" });
  const node = h(
    "section",
    { class: "panel picker", "aria-label": title },
    h("h2", {}, title),
    h("p", { class: "muted" }, "Drop one or several here, or paste. They are sent to this service only, and kept by nobody."),
    h(
      "div",
      { class: "row" },
      h("button", { type: "button", class: "primary", on: { click: open } }, "Choose images"),
      navigator.mediaDevices && h("button", { type: "button", class: "ghost", on: { click: () => photograph(app) } }, "Photograph"),
      input,
    ),
    samples,
  );
  // Not before it is seen: where it is folded away nobody wants them yet.
  const watch = new IntersectionObserver((entries) => {
    if (!entries.some((entry) => entry.isIntersecting)) return;
    watch.disconnect();
    showSamples(app, samples);
  });
  watch.observe(node);
  return node;
}

export async function showSamples(app, node) {
  const { model, version, key, state } = app.store.get();
  if (!model || (state?.keys && !key)) return;
  try {
    const found = (await app.api.get(path(["models", model, "samples"], version))).samples;
    if (!found.length) return;
    const wrong = h("div", {});
    const open = (name) => async () => {
      replace(wrong);
      try {
        const at = path(["models", model, "samples", name], version);
        const blob = await app.api.get(at, { accept: "image/*", lane: "sample" });
        await take(app, [new File([blob], name, { type: blob.type })]);
      } catch (error) {
        if (!isAbort(error)) replace(wrong, problemBox(error));
      }
    };
    replace(
      node,
      h("p", { class: "muted" }, "Or a sample of this model's own:"),
      h("div", { class: "strip" }, found.map((name, i) => sampleButton(app, name, i, open(name)))),
      wrong,
    );
  } catch (error) {
    // Without samples everything else works; why there are none is the model's own error, shown elsewhere.
  }
}

function sampleButton(app, name, i, onClick) {
  const { model, version } = app.store.get();
  const image = h("img", { alt: "", loading: "lazy", width: 72, height: 72 });
  const button = h("button", { type: "button", class: "sample", "aria-label": `Sample ${i + 1}`, on: { click: onClick } }, image);
  // By the api and not by `src` alone: a key goes with the request.
  app.api.get(path(["models", model, "samples", name], version), { accept: "image/*" }).then((blob) => {
    image.src = URL.createObjectURL(blob);
    image.addEventListener("load", () => URL.revokeObjectURL(image.src), { once: true });
  }, () => button.remove());
  return button;
}

async function photograph(app) {
  const video = h("video", { autoplay: true, playsinline: true, muted: true });
  const why = h("div", {});
  const dialog = h(
    "dialog",
    { class: "camera", "aria-label": "Photograph" },
    video,
    why,
    h(
      "div",
      { class: "row" },
      h("button", { type: "button", class: "primary", on: { click: shoot } }, "Take the picture"),
      h("button", { type: "button", class: "ghost", on: { click: () => dialog.close() } }, "Cancel"),
    ),
  );
  let stream = null;
  dialog.addEventListener("close", () => {
    stream?.getTracks().forEach((track) => track.stop());
    dialog.remove();
  });
  document.body.append(dialog);
  dialog.showModal();
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
    video.srcObject = stream;
    if (!dialog.open) stream.getTracks().forEach((track) => track.stop()); // closed while the browser asked
  } catch (error) {
    replace(why, problemBox({ message: "There is no camera, or it may not be used.", code: "camera" }));
  }

  async function shoot() {
    if (!video.videoWidth) return;
    const canvas = new OffscreenCanvas(video.videoWidth, video.videoHeight);
    canvas.getContext("2d").drawImage(video, 0, 0);
    const blob = await canvas.convertToBlob({ type: "image/jpeg", quality: 0.95 });
    dialog.close();
    await take(app, [new File([blob], "photograph.jpg", { type: "image/jpeg" })]);
  }
}
