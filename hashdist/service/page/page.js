// The page of the search service. Whatever comes from outside becomes text or an attribute, never markup; every address
// is relative, so that the service may live below a prefix; and only pictures that the visitor hands over are sent.
//
// The address names the query (#key=..., #code=...), so it can be kept and gone back to. A picture has no address:
// while the page is open the history's state says which one it was, and afterwards its code stands for it.

const REFRESH_MS = 15_000;
const HELD_PICTURES = 20;
const RESULTS = 24;
const TOKEN = "hashdist-token"; // its name in the session's storage
const FIELDS = ["key", "code", "k", "where", "version"];
const SVG = "http://www.w3.org/2000/svg";

const at = (id) => document.getElementById(id);
const number = (value) => value.toLocaleString("en");

let service = null; // what /version said last
let answer = null; // the results on the page
let running = null; // AbortController of the search under way
const handed = new Map(); // pictures of this page's life, by the name that the history's state has for them


// --- the service ---------------------------------------------------------------------------------------------------

/** What the service, or the way to it, had to say instead of an answer. */
class Failure extends Error {
  constructor(message, { requestId = "", retryAfter = 0, status = 0 } = {}) {
    super(message);
    Object.assign(this, { requestId, retryAfter, status });
  }

  static async of(response) {
    const body = await response.json().catch(() => null);
    return new Failure(body?.error?.message ?? `The service answered with status ${response.status}.`, {
      status: response.status,
      requestId: body?.error?.request_id ?? response.headers.get("X-Request-ID") ?? "",
      retryAfter: Number(response.headers.get("Retry-After")) || 0,
    });
  }
}

/** The service's answer to a request; asks for a token where one is needed, unless that would be `quiet`. */
async function request(path, { quiet = false, ...options } = {}) {
  for (;;) {
    const token = sessionStorage.getItem(TOKEN);
    const headers = token ? { Authorization: `Bearer ${token}` } : {};
    const response = await fetch(path, { ...options, headers }).catch((error) => {
      if (error.name === "AbortError") throw error;
      throw new Failure("The service could not be reached. Look whether it is running, then try again.");
    });
    if (response.ok) return response;
    if (response.status !== 401 || quiet || !(await newToken(token))) throw await Failure.of(response);
  }
}

const search = async (query, signal) => {
  const fields = FIELDS.filter((name) => query[name]).map((name) => [name, query[name]]);
  if (!query.picture) return (await request(`search?${new URLSearchParams(fields)}`, { signal })).json();
  const limit = service?.limits?.max_body_mb;
  if (limit && query.picture.size > limit * 1e6) {
    const megabytes = number(Math.ceil(query.picture.size / 1e6));
    const message = `A picture may have ${number(limit)} MB here, and this one has ${megabytes} MB: make it smaller.`;
    throw new Failure(message, { status: 413 });
  }
  const form = new FormData();
  for (const [name, value] of fields) form.append(name, value);
  form.append("image", query.picture, query.picture.name || "pasted");
  return (await request("search", { method: "POST", body: form, signal })).json();
};


// --- the token -----------------------------------------------------------------------------------------------------

let asking = null; // the promise of the dialog that is open

/** Whether there is another token than the one that was refused; asks for it. */
function newToken(refused) {
  if (sessionStorage.getItem(TOKEN) !== refused) return Promise.resolve(true);
  asking ??= new Promise((resolve) => {
    const dialog = at("token");
    at("token-text").textContent = refused
      ? "The token was not accepted. Give another one."
      : "It is kept in this tab only, until the tab is closed.";
    at("token-value").value = "";
    const onClose = () => {
      dialog.removeEventListener("close", onClose);
      asking = null;
      resolve(dialog.returnValue === "given");
    };
    dialog.returnValue = "";
    dialog.addEventListener("close", onClose);
    dialog.showModal();
  });
  return asking;
}

at("token-cancel").addEventListener("click", () => at("token").close());
at("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(TOKEN, at("token-value").value);
  at("forget").hidden = false;
  at("token").close("given");
});
at("forget").addEventListener("click", () => {
  sessionStorage.removeItem(TOKEN);
  location.reload();
});
at("forget").hidden = !sessionStorage.getItem(TOKEN);


// --- the index -----------------------------------------------------------------------------------------------------

/** Reads /version and shows it. */
async function refresh({ quiet = true } = {}) {
  try {
    service = await (await request("version", { cache: "no-store", quiet })).json();
    at("facts").dataset.state = service.refused || service.store.away_s > 0 ? "degraded" : "ready";
  } catch (error) {
    at("facts").dataset.state = "away";
    at("facts").title = error.message;
    if (!quiet) throw error;
    return;
  }
  const { index } = service;
  at("facts").title = index.operation ? `Version ${index.version} was made by ${index.operation}` : "";
  at("version").textContent = number(index.version);
  at("rows").textContent = number(index.rows);
  at("bits").textContent = number(index.bits);
  at("age").textContent = ago(index.age_s);
  at("age").dateTime = index.created_at;
  at("age").title = new Date(index.created_at).toLocaleString();
  for (const option of at("k").options) option.disabled = Number(option.value) > service.limits.max_k;
  const encodes = service.encoder;
  at("file").disabled = !encodes;
  at("choose").hidden = !encodes;
  at("drop").classList.toggle("off", !encodes);
  if (!encodes) at("invite").lastElementChild.textContent = "This service has no encoder: search by a key or a code";
  news();
}

function ago(seconds) {
  const units = [["year", 31_557_600], ["month", 2_629_800], ["day", 86_400], ["hour", 3600], ["minute", 60]];
  const [unit, length] = units.find(([, length]) => seconds >= length) ?? ["", 1];
  const words = new Intl.RelativeTimeFormat("en", { style: "short" });
  return unit ? words.format(-Math.floor(seconds / length), unit) : "just now";
}

/** What one should know about the index, and about the version the results are of. */
function news() {
  const said = [];
  if (service?.refused) {
    const { version, reason } = service.refused;
    const now = service.index.version;
    said.push(notice(`Version ${version} was refused, and version ${now} goes on answering: ${reason}`));
  }
  if (service?.store.away_s > 0) {
    // not a duration: that would be read out anew each time
    const since = new Date(Date.now() - 1000 * service.store.away_s);
    const time = since.toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit" });
    said.push(notice(`The store has not answered since ${time}; answers come from the copy that is here.`));
  }
  if (answer && service && answer.version !== service.index.version) {
    const text = `These results are of version ${answer.version}; the index is at version ${service.index.version}.`;
    said.push(notice(text, "Search again", () => replace({ version: "" })));
  }
  const texts = said.map((item) => item.firstChild.textContent).join("\n");
  if (texts !== at("news").dataset.texts) at("news").replaceChildren(...said);
  at("news").dataset.texts = texts;
}

function notice(text, label, act) {
  const item = element("div", { className: "notice" }, element("p", { textContent: text }));
  if (label) item.append(element("button", { type: "button", className: "plain", textContent: label, onclick: act }));
  return item;
}


// --- the query -----------------------------------------------------------------------------------------------------

/** The query that the address and the history name. */
function asked() {
  const fields = new URLSearchParams(location.hash.slice(1));
  const given = FIELDS.filter((name) => fields.get(name)).map((name) => [name, fields.get(name)]);
  const results = Math.min(RESULTS, service?.limits.max_k ?? RESULTS);
  const query = { k: String(results), ...Object.fromEntries(given) };
  const picture = handed.get(history.state?.picture);
  return picture ? { ...query, key: "", code: "", picture } : query;
}

function address(query) {
  const fields = new URLSearchParams(FIELDS.filter((name) => query[name]).map((name) => [name, query[name]]));
  return "#" + fields.toString().replaceAll("%2F", "/");
}

const chosen = () => ({ k: at("k").value, where: at("where").value.trim() });

function go(query, state = null) {
  history.pushState(state, "", address({ ...query, ...chosen() }));
  route();
}

/** The same query again, with other choices. */
function replace(choices) {
  const fields = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  history.replaceState(history.state, "", address({ ...fields, ...chosen(), ...choices }));
  route();
}

/** Searches by a picture that was dropped, pasted or chosen. */
function hand(file) {
  const name = `${performance.timeOrigin}/${handed.size}/${performance.now()}`;
  handed.set(name, file);
  if (handed.size > HELD_PICTURES) handed.delete(handed.keys().next().value);
  go({}, { picture: name });
}

/** Shows what the address asks for. The search that was under way is given up. */
async function route() {
  running?.abort();
  const query = asked();
  showQuery(query);
  if (!query.key && !query.code && !query.picture) return showNothing();
  const mine = (running = new AbortController());
  busy(true);
  try {
    const found = await search(query, mine.signal);
    if (mine !== running) return;
    if (query.picture) history.replaceState(history.state, "", address({ ...query, code: found.code }));
    showAnswer(found, query);
  } catch (error) {
    if (mine !== running || error.name === "AbortError") return;
    showFailure(error);
  } finally {
    if (mine === running) busy(false);
  }
}

function busy(is) {
  document.body.classList.toggle("busy", is);
  at("answer").setAttribute("aria-busy", String(is));
}

function showQuery(query) {
  if (![...at("k").options].some((option) => option.value === query.k)) at("k").append(new Option(query.k));
  at("k").value = query.k;
  at("where").value = query.where ?? "";
  at("kind").value = query.code ? "code" : "key";
  at("text").value = query.key || query.code || "";
  hint();

  const image = at("picture");
  const pictured = Boolean(query.picture || (query.key && service?.pictures));
  at("frame").hidden = !pictured;
  at("invite").hidden = pictured;
  at("asked").hidden = !pictured;
  at("asked").textContent = query.picture ? query.picture.name || "Pasted picture" : (query.key ?? "");
  image.className = "";
  image.removeAttribute("src");
  image.alt = query.picture ? "The picture that you search with" : (query.key ?? "");
  if (query.picture) show(image, query.picture);
}

function hint() {
  const digits = service ? service.index.bits / 4 : 16;
  at("text").placeholder = at("kind").value === "key" ? "folder/image.jpg" : `${digits} hexadecimal digits`;
}


// --- the answer ----------------------------------------------------------------------------------------------------

function showNothing() {
  answer = null;
  busy(false);
  at("failure").replaceChildren();
  at("hits").replaceChildren();
  at("difference").textContent = "";
  at("summary").textContent = at("timings").textContent = "";
  at("code").hidden = true;
  at("empty").hidden = false;
  document.title = "hashdist";
  news();
}

function showFailure(error) {
  showNothing();
  at("empty").hidden = true;
  if (!at("picture").src) at("picture").classList.add("missing");
  complain(error);
}

/** Says what went wrong; where another try may help, offers it. */
function complain(error) {
  const { status = 0, retryAfter } = error;
  const again = !status || status === 429 || status >= 500 ? "Try again" : "";
  const text = error instanceof Failure ? error.message : `The page failed: ${error.message}`;
  const item = notice(text, again && (retryAfter ? `${again} in ${retryAfter} s` : again), route);
  if (error.requestId) item.firstChild.after(element("small", { textContent: `request ${error.requestId}` }));
  item.classList.add("bad");
  at("failure").replaceChildren(item);
}

function showAnswer(found, query) {
  answer = found;
  const { hits } = found;
  const focused = at("hits").contains(document.activeElement);
  at("empty").hidden = true;
  at("failure").replaceChildren();
  showCode(found);
  if (query.key && service?.pictures) load(at("picture"), query.key, 512);
  at("hits").replaceChildren(...hits.map((hit) => tile(hit, found, query)));
  const last = hits.at(-1)?.distance;
  at("summary").textContent = hits.length
    ? `${number(hits.length)} nearest, ${hits[0].distance} to ${last} ${last === 1 ? "bit" : "bits"} away`
    : "No image matches";
  const { total, encode } = found.timings_ms;
  const encoding = found.query.image ? `, of which ${milliseconds(encode)} encoding` : "";
  at("timings").textContent = milliseconds(total) + encoding;
  document.title = `${query.key || query.picture?.name || found.code} · hashdist`;
  if (focused) at("hits").querySelector("a")?.focus({ preventScroll: true });
  window.scrollTo(0, 0);
  if (!service || found.version > service.index.version) refresh();
  news();
}

const milliseconds = (value) => `${value < 10 ? value.toFixed(1) : number(Math.round(value))} ms`;

function share(distance, bits) {
  const percent = (100 * distance) / bits;
  return percent > 0 && percent < 1 ? "<1%" : `${Math.round(percent)}%`;
}

/** A result: a link to the search from it. */
function tile(hit, found, query) {
  const cut = hit.key.lastIndexOf("/") + 1;
  const differs = share(hit.distance, found.bits);
  const badge = element("span", { className: "badge", textContent: hit.distance });
  badge.style.setProperty("--share", hit.distance / found.bits);
  const face = element("span", { className: "face" });
  const link = element(
    "a",
    { href: address({ k: query.k, where: query.where, version: query.version, key: hit.key }), title: hit.key },
    face,
    element(
      "span",
      { className: "caption" },
      element("span", { className: "folder", textContent: hit.key.slice(0, cut) }),
      element("span", { className: "name", textContent: hit.key.slice(cut) }),
    ),
    element("span", { className: "away" }, badge, element("span", { textContent: differs })),
  );
  link.setAttribute("aria-label", `${hit.key}, ${hit.distance} of ${found.bits} bits differ, ${differs}`);
  link.dataset.key = hit.key;
  link.dataset.distance = hit.distance;
  link.addEventListener("pointerenter", () => compare(hit, found));
  link.addEventListener("focus", () => compare(hit, found));
  link.addEventListener("pointerleave", () => compare(null, found));
  link.addEventListener("blur", () => compare(null, found));
  if (hit.picture) {
    const image = element("img", { alt: "", draggable: false, loading: "lazy", decoding: "async" });
    face.append(image);
    load(image, hit.key, 256);
  } else {
    const pattern = document.createElementNS(SVG, "svg");
    pattern.setAttribute("aria-hidden", "true");
    face.append(pattern);
    whenSeen(pattern, async () => {
      const code = await codeOf(hit, found);
      if (code) draw(pattern, bitsOf(code), bitsOf(found.code), 8 * Math.ceil(Math.sqrt(found.bits) / 8));
    });
  }
  return element("li", {}, link);
}


// --- codes ---------------------------------------------------------------------------------------------------------

/** Bit j of a code is bit j % 8, little-endian, of byte j // 8. */
function bitsOf(hex) {
  const bytes = (hex.match(/../g) ?? []).map((digits) => parseInt(digits, 16));
  return bytes.flatMap((byte) => Array.from({ length: 8 }, (_, bit) => (byte >> bit) & 1));
}

function showCode(found) {
  const bits = bitsOf(found.code);
  const set = bits.filter(Boolean).length;
  const spoken = bits.join("").match(/.{1,8}/g).join(" ");
  at("code").hidden = false;
  at("set").textContent = `${set} of ${found.bits} bits set`;
  at("pattern").setAttribute("aria-label", `Code of ${found.bits} bits, first to last: ${spoken}`);
  at("hex").textContent = found.code;
  draw(at("pattern"), bits);
  compare(null, found);
}

/** A square for each bit, row by row; with another code, the bits in which it differs stand out. */
function draw(svg, bits, other = bits, columns = bits.length <= 128 ? 16 : 32) {
  const rows = Math.ceil(bits.length / columns);
  svg.setAttribute("viewBox", `0 0 ${columns} ${rows}`);
  svg.replaceChildren(
    ...bits.map((bit, place) => {
      const cell = document.createElementNS(SVG, "rect");
      const [x, y] = [place % columns, Math.floor(place / columns)];
      const box = { x: x + 0.08, y: y + 0.08, width: 0.84, height: 0.84, rx: 0.16 };
      for (const [name, value] of Object.entries(box)) cell.setAttribute(name, value);
      cell.setAttribute("class", (bit ? "one" : "zero") + (bit === other[place] ? "" : " differs"));
      return cell;
    }),
  );
}

const codes = new Map(); // "version key" -> promise of the code, for the results on the page
let queue = Promise.resolve();

/** The code of a result: what the service said, or else asked for one at a time; null where it cannot be had. */
function codeOf(hit, found) {
  if (hit.code) return Promise.resolve(hit.code);
  const name = `${found.version} ${hit.key}`;
  if (!codes.has(name)) {
    const fields = new URLSearchParams({ key: hit.key, k: 1, version: found.version });
    const ask = async () => {
      if (answer !== found) throw new Failure("nobody waits for it any more");
      return (await (await request(`search?${fields}`, { quiet: true })).json()).code;
    };
    queue = queue.then(ask).catch(() => codes.delete(name) && null);
    codes.set(name, queue);
    if (codes.size > 1000) codes.delete(codes.keys().next().value);
  }
  return codes.get(name);
}

let compared = 0;

/** Marks the bits in which a result differs from the query; without one, none. */
async function compare(hit, found) {
  const mine = ++compared;
  await new Promise((resolve) => setTimeout(resolve, hit ? 120 : 0)); // a pointer that only passes asks nothing
  if (mine !== compared || answer !== found) return;
  const bits = bitsOf(found.code);
  const code = hit && (await codeOf(hit, found));
  if (mine !== compared || answer !== found) return;
  const other = code ? bitsOf(code) : bits;
  [...at("pattern").children].forEach((cell, place) => cell.classList.toggle("differs", bits[place] !== other[place]));
  at("difference").textContent = hit
    ? `${hit.distance} of ${found.bits} bits differ from ${hit.key}`
    : "Point at a result to see which bits differ.";
}


// --- pictures ------------------------------------------------------------------------------------------------------

const waiting = new WeakMap();
const observer = new IntersectionObserver(
  (entries) => {
    for (const { target } of entries.filter((entry) => entry.isIntersecting)) {
      observer.unobserve(target);
      waiting.get(target)();
    }
  },
  { rootMargin: "200px" },
);

function whenSeen(target, act) {
  waiting.set(target, act);
  observer.observe(target);
}

/** Shows an image of the collection. With a token it must be fetched, since an <img> sends none. */
function load(image, key, size) {
  const path = `pictures/${key.split("/").map(encodeURIComponent).join("/")}?size=${size}`;
  image.onload = () => shown(image);
  if (sessionStorage.getItem(TOKEN)) {
    whenSeen(image, () => fetched(image, path));
    return;
  }
  image.onerror = () => {
    image.onerror = () => image.classList.add("missing");
    setTimeout(() => (image.src = path), 1500); // once more: many at a time may be too many
  };
  image.src = path;
}

async function fetched(image, path, tries = 3) {
  try {
    show(image, await (await request(path, { quiet: true })).blob());
  } catch (error) {
    if (!image.isConnected) return;
    if (error.retryAfter && tries > 1) setTimeout(() => fetched(image, path, tries - 1), 1000 * error.retryAfter);
    else image.classList.add("missing");
  }
}

function show(image, blob) {
  const url = URL.createObjectURL(blob);
  image.onload = () => {
    URL.revokeObjectURL(url);
    shown(image);
  };
  image.onerror = () => {
    URL.revokeObjectURL(url);
    image.classList.add("missing");
  };
  image.src = url;
}

/** A picture of a few pixels is shown as such, not blurred. */
function shown(image) {
  image.classList.toggle("tiny", Math.max(image.naturalWidth, image.naturalHeight) <= 64);
}


// --- what the visitor does -----------------------------------------------------------------------------------------

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = at("text").value.trim();
  const unchanged = text && text === (asked().key || asked().code);
  if (unchanged || (!text && (asked().picture || asked().key || asked().code))) replace({});
  else if (text) go({ [at("kind").value]: text });
});
at("kind").addEventListener("change", hint);
at("k").addEventListener("change", () => replace({}));

at("file").addEventListener("change", () => {
  if (at("file").files.length) hand(at("file").files[0]);
  at("file").value = ""; // the same file may be chosen again
});

/** A file that was dropped or pasted, or a result of this page; of anything else, says what can be done. */
function taken(transfer) {
  const link = transfer.getData("text/uri-list");
  if (link.startsWith(`${location.href.split("#")[0]}#`)) return void (location.hash = new URL(link).hash);
  const file = [...transfer.files].find(({ type }) => type.startsWith("image/")) ?? transfer.files[0];
  const refused = (message) => complain(new Failure(message, { status: 400 }));
  if (!service?.encoder) refused("This service has no encoder: search by a key or a code.");
  else if (file) hand(file);
  else refused("No file was dropped, and links are not followed: save the picture first, or copy and paste it.");
}

document.addEventListener("paste", (event) => {
  if (!event.clipboardData?.files.length) return;
  event.preventDefault();
  taken(event.clipboardData);
});
const intoText = ({ target, dataTransfer }) => target.matches?.("input") && !dataTransfer.types.includes("Files");
document.addEventListener("dragover", (event) => {
  if (intoText(event)) return;
  event.preventDefault();
  document.body.classList.add("dragging");
});
for (const type of ["dragleave", "dragend"])
  document.addEventListener(type, (event) => {
    if (!event.relatedTarget) document.body.classList.remove("dragging");
  });
document.addEventListener("drop", (event) => {
  if (intoText(event)) return;
  event.preventDefault();
  document.body.classList.remove("dragging");
  taken(event.dataTransfer);
});

document.addEventListener("keydown", (event) => {
  const typing = event.target.matches("input, select, textarea, dialog *");
  if (event.key !== "/" || typing || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  at("text").focus();
  at("text").select();
});

at("hits").addEventListener("keydown", (event) => {
  const links = [...at("hits").querySelectorAll("a")];
  const place = links.indexOf(document.activeElement);
  if (place < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
  const below = links.findIndex((link) => link.offsetTop > links[0].offsetTop);
  const columns = below < 0 ? links.length : below;
  const end = links.length - 1 - place;
  const moves = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns, Home: -place, End: end };
  if (!(event.key in moves)) return;
  event.preventDefault();
  links[place + moves[event.key]]?.focus();
});

at("skip").addEventListener("click", (event) => {
  event.preventDefault();
  (at("hits").querySelector("a") ?? at("hits")).focus();
});

history.scrollRestoration = "manual"; // results are never there yet when the browser scrolls
window.addEventListener("popstate", route);
setInterval(() => document.hidden || asking || refresh(), REFRESH_MS);
document.addEventListener("visibilitychange", () => document.hidden || asking || refresh());

for (const [name, code] of [["example", "c5a39e16"], ["example-near", "c5a38e56"], ["example-far", "4d1b8573"]])
  draw(at(name), bitsOf(code), bitsOf("c5a39e16"));

try {
  await refresh({ quiet: false });
  route();
} catch (error) {
  showFailure(error);
}
