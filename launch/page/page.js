// The page of dit-jax serve: sends settings, asks for what changed, shows it.

const $ = (id) => document.getElementById(id);
const form = $("form");
const NUMBERS = ["width", "height", "steps", "num_images", "guidance_scale", "seed"];
const LARGEST_SEED = 2 ** 32 - 1;
const SMALL = 256; // pixels: smaller pictures are shown with their pixels sharp

let pipeline = null;
let version = 0;
const jobs = new Map(); // by number
let shown = null; // {job, index}: the picture in the frame
let followed = null; // number of the job of which the next picture is to be shown

// Elements

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function write(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

const seconds = (value) => {
  if (value < 0.05) return "less than 0.1 s";
  if (value < 9.95) return `${value.toFixed(1)} s`;
  if (value < 99.5) return `${Math.round(value)} s`;
  return `${Math.floor(value / 60)} min ${Math.round(value % 60)} s`;
};

function describe(settings, index = null) {
  const parts = [`${settings.width} × ${settings.height}`, `${settings.steps} step${settings.steps === 1 ? "" : "s"}`];
  if (settings.guidance_scale !== null) parts.push(`guidance ${settings.guidance_scale}`);
  for (const [name, weight] of Object.entries(settings.lora)) {
    if (weight) parts.push(`${name} ${weight}`);
  }
  parts.push(`seed ${settings.seed}`);
  if (settings.num_images > 1 && index !== null) {
    parts.push(`picture ${index + 1} of ${settings.num_images}`);
  }
  return parts.join(", ");
}

const quoted = (prompt) => prompt || "(no words)";

// The form

function randomSeed() {
  const drawn = crypto.getRandomValues(new Uint32Array(1));
  $("seed").value = drawn[0];
}

const adapters = () => [...$("adapters").querySelectorAll("input")];

function offerAdapters(weights) {
  const rows = Object.entries(weights).map(([name, weight]) => {
    const field = element("input", { type: "number", step: "any", value: weight });
    field.dataset.name = name;
    return element("label", {}, element("span", { textContent: name, title: name }), field);
  });
  $("adapters").replaceChildren(...rows);
  $("lora").hidden = rows.length === 0;
}

function settingsOfForm() {
  const settings = { prompt: $("prompt").value };
  for (const name of NUMBERS) {
    const field = $(name);
    if (field.disabled) continue;
    const text = field.value.trim();
    if (text === "" && name === "guidance_scale") continue; // the pipeline's own
    // What is no number goes as it is, for the server to say what it expects.
    settings[name] = text === "" ? "" : Number(text);
  }
  for (const field of adapters()) {
    settings.lora ??= {};
    settings.lora[field.dataset.name] = field.value.trim() === "" ? "" : Number(field.value);
  }
  return settings;
}

function useSettings(settings) {
  $("prompt").value = settings.prompt;
  for (const name of NUMBERS) {
    if (!$(name).disabled && settings[name] !== null) $(name).value = settings[name];
  }
  for (const field of adapters()) field.value = settings.lora[field.dataset.name] ?? 0;
  complain("");
}

function complain(message, setting = "") {
  for (const field of form.elements) field.removeAttribute("aria-invalid");
  write($("message"), message);
  const field = setting && $(setting);
  if (field) {
    field.setAttribute("aria-invalid", "true");
    field.focus();
  }
}

async function call(path, options = {}) {
  const response = await fetch(path, options);
  const content = await response.json().catch(() => ({ error: `status ${response.status}` }));
  if (!response.ok) throw Object.assign(new Error(content.error), { setting: content.setting });
  return content;
}

async function submit() {
  const body = JSON.stringify(settingsOfForm());
  const headers = { "Content-Type": "application/json" };
  let job;
  try {
    job = await call("/api/images", { method: "POST", headers, body });
  } catch (error) {
    const gone = error instanceof TypeError;
    complain(gone ? "The server does not answer. Is it still running?" : error.message, error.setting);
    return;
  }
  complain("");
  followed = job.id;
  bringIntoView();
  if ($("new-seed").checked) randomSeed();
  take(job);
  render();
  poll();
}

// The picture

function show(job, index) {
  shown = { job: job.id, index };
  const picture = $("picture");
  picture.src = job.images[index];
  picture.alt = job.settings.prompt || "A picture of the empty prompt";
  picture.className = Math.max(job.settings.width, job.settings.height) < SMALL ? "small" : "";
  picture.hidden = false;
  $("empty").hidden = true;
  $("download").hidden = false;
  $("download").href = job.images[index];
  $("download").download = `dit-jax-${job.id}-${index}.png`;
}

// On a phone it is under the form, and above the history.
const bringIntoView = () => $("frame").scrollIntoView({ block: "nearest" });

function renderShown() {
  const job = shown && jobs.get(shown.job);
  if (job) {
    write($("shown-prompt"), quoted(job.settings.prompt));
    const took = job.state === "done" ? `, ${seconds(job.elapsed)}` : "";
    write($("shown-settings"), describe(job.settings, shown.index) + took);
  }
  // Of the one that is being made as soon as there are any: it can still be asked for otherwise.
  const next = jobs.get(followed);
  const notes = (next && !next.images.length ? next : job)?.notes ?? [];
  const list = $("notes");
  const texts = [...list.children].map((item) => item.textContent);
  if (texts.join("\n") === notes.join("\n")) return;
  list.replaceChildren(...notes.map((note) => element("li", { textContent: note })));
}

// What the server says

function take(job) {
  const before = jobs.get(job.id);
  job.since = performance.now() / 1000 - (job.elapsed ?? 0); // of a running one
  jobs.set(job.id, job);
  const made = job.images.length;
  if (job.id === followed && made > (before?.images.length ?? 0)) show(job, made - 1);
  // Somebody else's, or one from before this page was opened.
  if (shown === null && followed === null && made > 0) show(job, made - 1);
}

let timer = null;
let asking = false;

async function poll() {
  clearTimeout(timer);
  if (asking) return;
  asking = true;
  let wait = 2000;
  try {
    if (pipeline === null) await begin();
    const state = await call(`/api/images?after=${version}`);
    if (state.session !== pipeline.session) {
      // The server was started anew: numbers begin again.
      jobs.clear();
      [version, shown, followed, pipeline] = [0, null, null, null];
      wait = 0;
    } else {
      version = state.version;
      for (const number of jobs.keys()) if (number < state.oldest) jobs.delete(number);
      for (const job of state.jobs) take(job);
      $("status").classList.remove("wrong");
      render();
      wait = running() ? 400 : 2000;
    }
  } catch (error) {
    $("status").classList.add("wrong");
    write($("status"), "The server does not answer. Is it still running?");
    $("bar").classList.remove("on");
  }
  asking = false;
  timer = setTimeout(poll, wait);
}

async function begin() {
  const found = await call("/api/pipeline");
  const { defaults, limits, guided, side_multiple: multiple } = found;
  document.title = `${found.title}: text to image`;
  write($("title"), found.title);
  write($("name"), found.name);
  for (const side of ["width", "height"]) Object.assign($(side), { step: multiple, min: multiple });
  for (const name of ["steps", "num_images"]) $(name).max = limits[name];
  $("seed").max = LARGEST_SEED;
  const most = limits.pixels.toLocaleString("en");
  write($("size-hint"), `Multiples of ${multiple}, at most ${most} pixels in all.`);
  $("guidance_scale").disabled = !guided;
  const how = "How closely the picture follows the prompt.";
  write($("guidance-hint"), guided ? how : "No guidance: this pipeline is not told its scale.");
  offerAdapters(defaults.lora);
  for (const [name, value] of Object.entries(defaults)) {
    if (name === "lora") continue;
    if ($(name).value === "" && value !== null) $(name).value = value;
  }
  pipeline = found;
}

// What is seen of it

const running = () => [...jobs.values()].find((job) => job.state === "running");

function render() {
  renderStatus();
  renderWaiting();
  renderHistory();
  renderShown();
}

function renderStatus() {
  const job = running();
  $("bar").classList.toggle("on", Boolean(job));
  $("stop").hidden = !(job && job.settings.num_images > job.images.length + 1);
  $("stop").onclick = () => cancel(job.id);
  $("frame").classList.toggle("waiting", Boolean(job));
  if (job) renderRunning(job);
  else renderLast(jobs.get(followed));
}

function renderLast(job) {
  $("status").classList.toggle("wrong", job?.state === "failed");
  let text = "Ready.";
  if (job?.state === "failed") text = job.error;
  if (job?.state === "done") text = `Made in ${seconds(job.elapsed)}.`;
  if (job?.state === "cancelled") text = "Cancelled.";
  write($("status"), text);
  write($("said"), text);
}

function renderRunning(job) {
  const elapsed = performance.now() / 1000 - job.since;
  const about = job.expected;
  if (about > 0.5) $("bar").value = Math.min(0.97, elapsed / about);
  else $("bar").removeAttribute("value");
  const stage = job.stage ? job.stage.charAt(0).toUpperCase() + job.stage.slice(1) : "Beginning";
  const compiling = job.stage.startsWith("compiling");
  let text = `${stage}: ${elapsed.toFixed(1)} s`;
  if (about > 0.5) text += ` of about ${seconds(about)}`;
  else if (compiling) text += " (how long it takes is known after the first time)";
  if (compiling) text += ". Later pictures of this size and steps start at once.";
  $("status").classList.remove("wrong");
  write($("status"), text);
  write($("said"), stage); // without the seconds, which would be read out all the time
}

function renderWaiting() {
  const waiting = [...jobs.values()].filter((job) => job.state === "waiting");
  const list = $("waiting");
  const key = waiting.map((job) => job.id).join();
  $("queue").hidden = waiting.length === 0;
  if (list.dataset.key === key) return;
  list.dataset.key = key;
  list.replaceChildren(
    ...waiting.map((job) => {
      const what = job.kind === "compile" ? "compiling for" : quoted(job.settings.prompt);
      const text = element("span", { textContent: `${what}, ${describe(job.settings)}` });
      const button = element("button", { type: "button", className: "quiet", textContent: "Cancel" });
      button.setAttribute("aria-label", `Cancel ${what}`);
      button.onclick = () => cancel(job.id);
      return element("li", { value: job.position }, element("div", {}, text, button));
    }),
  );
}

async function cancel(number) {
  try {
    take(await call(`/api/images/${number}`, { method: "DELETE" }));
  } catch (error) {
    complain(error.message);
  }
  render();
}

function renderHistory() {
  const list = $("history");
  const wanted = [];
  for (const job of [...jobs.values()].sort((one, other) => other.id - one.id)) {
    if (job.kind === "compile") continue;
    for (let index = job.images.length - 1; index >= 0; index -= 1) wanted.push([job, index]);
    if (job.state === "failed" && !job.images.length) wanted.push([job, null]);
  }
  const known = new Map([...list.children].map((item) => [item.dataset.key, item]));
  const items = wanted.map(([job, index]) => {
    const key = `${job.id}/${index}`;
    return known.get(key) ?? historyItem(job, index, key);
  });
  const same = items.length === list.children.length && items.every((item, i) => item === list.children[i]);
  if (!same) list.replaceChildren(...items);
  const pressed = shown && `${shown.job}/${shown.index}`;
  for (const item of items) {
    item.firstChild.setAttribute("aria-pressed", String(item.dataset.key === pressed));
  }
}

function historyItem(job, index, key) {
  const thumb = element("span", { className: "thumb" });
  if (index === null) {
    thumb.classList.add("wrong");
    thumb.textContent = "failed";
  } else {
    const picture = element("img", { src: job.images[index], alt: "", loading: "lazy" });
    if (Math.max(job.settings.width, job.settings.height) < SMALL) picture.className = "small";
    thumb.append(picture);
  }
  const text = element("span", { className: "text", textContent: quoted(job.settings.prompt) });
  const how = element("span", { className: "how", textContent: describe(job.settings, index) });
  const button = element("button", { type: "button" }, thumb, text, how);
  button.onclick = () => {
    useSettings(job.settings);
    if (index === null) complain(jobs.get(job.id)?.error ?? job.error);
    else show(jobs.get(job.id) ?? job, index);
    bringIntoView();
    render();
  };
  const item = element("li", {}, button);
  item.dataset.key = key;
  return item;
}

// Beginning

form.addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    submit();
  }
});
$("random").addEventListener("click", randomSeed);
$("turn").addEventListener("click", () => {
  [$("width").value, $("height").value] = [$("height").value, $("width").value];
});
randomSeed();
poll();
setInterval(() => running() && renderStatus(), 100);
