// The import panel: choose or drop a file, name it, watch it go.

import { csrfToken } from "./base.js";
import { Refused, Upload } from "./upload.js";

const QUANTIZATION = /[-._](?:UD-)?(?:I?Q\d_[0-9KXSMLN_]+|TQ\d_\d|(?:MX|NV)FP4(?:_MOE)?|BF16|FP?16|FP?32)$/i;

const byId = (id) => document.getElementById(id);

/** Write bytes as people read them, in decimal units. */
export function size(bytes) {
  if (bytes < 1000) return `${bytes} B`;
  const power = Math.min(4, Math.floor(Math.log10(bytes) / 3));
  return `${Number((bytes / 1000 ** power).toPrecision(3))} ${["", "kB", "MB", "GB", "TB"][power]}`;
}

/** Write a time span: "45 s", "12 min", "2 h 5 min". */
export function span(seconds) {
  if (seconds < 60) return `${Math.ceil(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

function slug(text) {
  return text
    .normalize("NFKD")
    .replace(/[\u0300-\u036f]/g, "")
    .replace(/[^A-Za-z0-9._-]+/g, "-")
    .replace(/\.{2,}/g, ".")
    .slice(0, 96)
    .replace(/^[._-]+|[._-]+$/g, "");
}

/** Bytes per second over the last few seconds. */
class Rate {
  #marks = [];

  add(received) {
    const now = performance.now();
    this.#marks.push([now, received]);
    while (this.#marks.length > 2 && now - this.#marks[0][0] > 5000) this.#marks.shift();
  }

  get perSecond() {
    const [first, last] = [this.#marks[0], this.#marks.at(-1)];
    return first && last[0] - first[0] > 300 ? ((last[1] - first[1]) / (last[0] - first[0])) * 1000 : 0;
  }
}

/** Wire the panel up. `done` is called with the model after every import. */
export function startImportPanel(panel, done) {
  const form = byId("import-form");
  const { publisher, repo } = form.elements;
  let file = null;
  let upload = null;
  let running = false;

  function show(open) {
    panel.hidden = !open;
    byId("import-open").setAttribute("aria-expanded", String(open));
    if (open) byId(file ? "import-publisher" : "import-file").focus();
  }

  function step(name) {
    for (const part of panel.querySelectorAll("[data-step]")) part.hidden = !part.dataset.step.split(" ").includes(name);
    running = name === "upload";
    byId("import-progress").hidden = !running;
    byId("import-start").hidden = running;
  }

  function fail(text, field) {
    byId("import-error").hidden = !text;
    byId("import-error-text").textContent = text;
    publisher.toggleAttribute("aria-invalid", field === "publisher" || field === "user_repo");
    repo.toggleAttribute("aria-invalid", field === "name" || field === "user_repo");
  }

  function showKey() {
    byId("import-key").textContent = `${publisher.value.trim()}/${repo.value.trim().replace(/[-._]gguf$/i, "")}`.toLowerCase();
  }

  function choose(chosen) {
    if (!chosen || running) return;
    show(true);
    if (upload) upload.cancel();
    [file, upload] = [chosen, null];
    byId("import-name").textContent = file.name;
    byId("import-size").textContent = size(file.size);
    const isModel = /\.gguf$/i.test(file.name);
    publisher.value ||= "local";
    repo.value = slug(slug(file.name.replace(/\.gguf$/i, "")).replace(QUANTIZATION, ""));
    showKey();
    step("name");
    fail(isModel ? "" : "Only model files in the GGUF format (.gguf) can be imported.");
    byId("import-start").disabled = !isModel;
    byId("import-start").focus();
  }

  function reset() {
    [file, upload] = [null, null];
    byId("import-file").value = "";
    fail("");
    step("choose");
  }

  function follow() {
    const rate = new Rate();
    upload.addEventListener("progress", ({ detail: { received } }) => {
      rate.add(received);
      const percent = Math.floor((received / file.size) * 100);
      byId("import-bar").value = received / file.size;
      byId("import-state").textContent = `${percent} %, ${size(received)} of ${size(file.size)}`;
      const speed = rate.perSecond;
      byId("import-rate").textContent = speed ? `${size(speed)}/s, ${span((file.size - received) / speed)} left` : "";
      if (percent % 25 === 0) byId("import-said").textContent = `${percent} percent uploaded`;
    });
    upload.addEventListener("waiting", ({ detail: { seconds } }) => {
      byId("import-rate").textContent = `Connection lost. Trying again in ${seconds} s; what arrived is kept.`;
    });
  }

  async function start() {
    if (!publisher.value.trim() || !repo.value.trim()) return fail("Publisher and name are needed.", publisher.value.trim() ? "name" : "publisher");
    fail("");
    step("upload");
    try {
      if (!upload) {
        upload = new Upload(file, panel.dataset.uploads, Number(panel.dataset.chunkBytes));
        byId("import-bar").value = 0;
        byId("import-state").textContent = byId("import-rate").textContent = "";
        follow();
      }
      await upload.send();
      byId("import-state").textContent = "Checking and storing the file";
      byId("import-rate").textContent = "";
      const model = await upload.finish(`${publisher.value.trim()}/${repo.value.trim()}`);
      reset();
      show(false);
      byId("import-open").focus();
      done(model);
    } catch (error) {
      if (error.name === "AbortError") return;
      step("name");
      // After a broken file nothing is left on the server; after a name that is taken all of it is.
      if (error instanceof Refused && !["user_repo", "publisher", "name"].includes(error.param)) {
        upload.cancel();
        upload = null;
      }
      fail(error.message, error.param);
    }
  }

  async function cancel() {
    const ending = upload;
    reset();
    await ending?.cancel();
  }

  async function discard(button) {
    button.disabled = true;
    const response = await fetch(button.dataset.discard, { method: "DELETE", headers: { "X-CSRFToken": csrfToken() } }).catch(() => null);
    if (response?.ok || response?.status === 404) button.closest("[data-unfinished]").remove();
    else button.disabled = false;
  }

  byId("import-open").addEventListener("click", () => show(panel.hidden));
  byId("import-close").addEventListener("click", () => {
    show(false);
    byId("import-open").focus();
  });
  byId("import-file").addEventListener("change", (event) => choose(event.target.files[0]));
  byId("import-cancel").addEventListener("click", cancel);
  form.addEventListener("input", showKey);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (!running) start();
  });
  document.addEventListener("click", (event) => {
    if (event.target.closest("[data-open-import]")) show(true);
    const button = event.target.closest("[data-discard]");
    if (button) discard(button);
  });

  // Files may be dropped anywhere on the page.
  const carriesFile = (event) => event.dataTransfer?.types.includes("Files");
  document.addEventListener("dragover", (event) => {
    if (!carriesFile(event)) return;
    event.preventDefault();
    if (!running) show(true);
    panel.classList.add("dragging");
  });
  document.addEventListener("dragleave", (event) => event.relatedTarget || panel.classList.remove("dragging"));
  document.addEventListener("drop", (event) => {
    if (!carriesFile(event)) return;
    event.preventDefault();
    panel.classList.remove("dragging");
    choose(event.dataTransfer.files[0]);
  });
  window.addEventListener("beforeunload", (event) => running && event.preventDefault());
}
