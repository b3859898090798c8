// Looks at the status page in a real browser, step by step. tests/it/page.rs starts it and changes the world when it is asked to.
//
//   node drive.mjs TOOLS BROWSER PAGE PEER
//
// TOOLS has playwright-core and axe-core, BROWSER is the program, PAGE the address, PEER the name of the other node.
// A line "please STEP" on standard output asks for a change; a line on standard input says that it is done.
// Ends with 0 if all is right. Else the first fault is on standard error.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { createInterface } from "node:readline";

const [tools, browserPath, address, peer] = process.argv.slice(2);
const require = createRequire(tools + "/");
const { chromium } = require("playwright-core");
const axe = readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");
// Turns a hang into a failure. Other tests may have the machine.
const DEADLINE = 60_000;
const SINCE = /since \d\d:\d\d:\d\d/;

const lines = createInterface({ input: process.stdin })[Symbol.asyncIterator]();
async function please(step) {
  console.log("please " + step);
  const { done } = await lines.next();
  assert(!done, "nobody is there to " + step);
}
function step(name) {
  console.error(`step: ${name} (after ${performance.now().toFixed()} ms)`);
}

const browser = await chromium.launch({
  executablePath: browserPath,
  args: ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"],
});

// Everything that a browser complains of, but failed connections while castier is away.
const complaints = [];
let away = false;
function watch(page) {
  page.setDefaultTimeout(DEADLINE);
  page.on("pageerror", error => complaints.push(`an exception: ${error.stack}`));
  page.on("dialog", dialog => complaints.push(`a dialog: ${dialog.message()}`));
  page.on("console", message => {
    const failed = message.text().startsWith("Failed to load resource: net::ERR_");
    if (["error", "warning"].includes(message.type()) && !(away && failed)) complaints.push(`on the console: ${message.text()}`);
  });
  return page.addInitScript(() => {
    addEventListener("securitypolicyviolation", event => console.error(`policy: ${event.violatedDirective} ${event.blockedURI} ${event.sample}`));
  });
}
const context = await browser.newContext({ viewport: { width: 1280, height: 900 }, colorScheme: "light" });
const page = await context.newPage();
await watch(page);

const until = (what, probe, ...arguments_) => page.waitForFunction(probe, ...arguments_).catch(async error => {
  const verdict = await page.locator("#verdict").textContent().catch(() => "none");
  throw new Error(`not seen: ${what}; the verdict is ${JSON.stringify(verdict)}; complaints: ${complaints.join("; ")}`, { cause: error });
});
const verdict = (what, pattern) => until(what, ([source]) => new RegExp(source).test(document.getElementById("verdict").textContent), [pattern.source]);
const figure = name => page.evaluate(name => {
  const row = [...document.querySelectorAll("#counters tbody tr")].find(row => row.cells[0].textContent === name);
  return Number(row.cells[1].textContent.replaceAll(",", ""));
}, name);

/** axe-core finds nothing, and the texts of the plots, whose background it cannot tell, have contrast. */
// The page draws its plots anew in the frame after the one in which their place has another size.
async function resize(width, height) {
  await page.setViewportSize({ width, height });
  await until("the new width", ([width]) => innerWidth === width, [width]);
  await page.evaluate(() => new Promise(drawn => requestAnimationFrame(() => requestAnimationFrame(drawn))));
}

async function accessible(what) {
  await page.evaluate(axe);
  const faults = await page.evaluate(async () => {
    const { violations } = await globalThis.axe.run();
    return violations.flatMap(({ id, impact, nodes }) => nodes.map(node => `${impact} ${id}: ${node.html.slice(0, 200)}: ${node.failureSummary}`));
  });
  assert.deepEqual(faults, [], what);
  const contrasts = await page.evaluate(() => {
    const light = colour => {
      const [r, g, b] = colour.match(/[\d.]+/g).map(Number).map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
      return .2126 * r + .7152 * g + .0722 * b;
    };
    return [...document.querySelectorAll(".plot text")].map(text => {
      const pair = [getComputedStyle(text).fill, getComputedStyle(text.closest(".card")).backgroundColor].map(light).sort((a, b) => b - a);
      return (pair[0] + .05) / (pair[1] + .05);
    });
  });
  assert(contrasts.length > 0 && contrasts.every(contrast => contrast >= 4.5), `${what}: contrasts of plots: ${contrasts}`);
}
async function inBothSchemes(what) {
  for (const colorScheme of ["light", "dark"]) {
    await page.emulateMedia({ colorScheme });
    await accessible(`${what}, ${colorScheme}`);
  }
  await page.emulateMedia({ colorScheme: "light" });
}

step("it is ok, and its headers confine it");
const { status, headers } = await page.goto(address).then(response => ({ status: response.status(), headers: response.headers() }));
assert.equal(status, 200);
for (const [name, value] of [["x-content-type-options", "nosniff"], ["cache-control", "no-store"], ["referrer-policy", "no-referrer"]]) assert.equal(headers[name], value);
const policy = headers["content-security-policy"];
assert(policy.includes("default-src 'none'") && policy.includes("frame-ancestors 'none'") && !policy.includes("unsafe"), policy);
await page.evaluate(() => { globalThis.marked = true; });
await verdict("ok", /^ok/);
assert.match(await page.title(), /^ok · .*castier$/);

step("numbers move without a reload");
const gets = await figure("Gets");
await until("more gets", ([before]) => {
  const row = [...document.querySelectorAll("#counters tbody tr")].find(row => row.cells[0].textContent === "Gets");
  return Number(row.cells[1].textContent.replaceAll(",", "")) > before;
}, [gets]);
await until("a rate", () => /^[1-9][\d,.]* requests\/s/.test(document.querySelector("#q-working .detail").textContent));
await until("all eight answers", () => {
  const all = [...document.querySelectorAll("#answers .answer")];
  return all.length === 8 && all.every(answer => answer.textContent !== "" && answer.textContent !== "–");
});
await until("the other node", ([peer]) => document.querySelector("#members").textContent.includes(peer), [peer]);
await until("a client and a digest", () => document.querySelector("#clients tbody tr") && /^[0-9a-f]{64}$/.test(document.querySelector("#digests tbody th")?.textContent));
await until("the memory tier", () => /of [\d.]+\sMiB/.test(document.querySelector("#tiers tbody")?.textContent));
await until("points of a plot", () => document.querySelectorAll("#charts circle").length >= 4);
assert.match(await page.locator("#charts svg").first().getAttribute("aria-label"), /^Requests per second, the last 15 minutes: requests now .*highest/);
await page.locator("#minutes summary").click();
await until("the table of minutes", () => document.querySelector("#minutes tbody tr")?.cells.length === 7);

step("colours, and what axe-core says");
const paper = () => page.evaluate(() => getComputedStyle(document.body).backgroundColor);
const light = await paper();
await page.emulateMedia({ colorScheme: "dark" });
assert.notEqual(await paper(), light, "dark is dark");
await inBothSchemes("ok");

step("a phone");
await resize(360, 740);
const overflow = await page.evaluate(() => ({
  page: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  // A digest is cut off, with an ellipsis.
  parts: [...document.querySelectorAll("main *:not(.digest > span)")].filter(part => part.getBoundingClientRect().right > innerWidth + 1).map(part => part.outerHTML.slice(0, 80)),
}));
assert.deepEqual(overflow, { page: 0, parts: [] });
await accessible("phone");
await resize(1280, 900);

step("the keyboard");
const reached = [];
for (let presses = 0; presses < 40; presses++) {
  await page.keyboard.press("Tab");
  const at = await page.evaluate(() => {
    const element = document.activeElement, style = getComputedStyle(element);
    return element === document.body ? null : { text: element.textContent.trim(), outline: style.outlineStyle, width: parseFloat(style.outlineWidth) };
  });
  // Past the last one it begins anew.
  if (!at) continue;
  assert(at.outline !== "none" && at.width >= 2, `the focus cannot be seen on ${JSON.stringify(at)}`);
  reached.push(at.text);
}
for (const text of ["Skip to the state", "Pause", "Is it working?", "Which client floods it?", "The same as a table, minute by minute", "metrics"]) assert(reached.includes(text), `${text} is not among ${reached}`);

step("pause and resume");
await page.locator("#pause").press("Enter");
assert.equal(await page.locator("#pause").textContent(), "Resume");
await page.locator("#pause").press("Enter");
const resumed = await figure("Gets");
await until("more gets", ([before]) => Number(document.querySelector("#counters tbody td").textContent.replaceAll(",", "")) > before, [resumed]);

step("what is selected stays");
const cell = () => page.locator("#counters tbody td").first().textContent();
await page.evaluate(() => getSelection().selectAllChildren(document.querySelector("#counters tbody td")));
const selected = await cell();
for (let answers = 0; answers < 2; answers++) await page.waitForResponse("**/stats");
await until("the time of the figures moves", ([before]) => document.querySelector("#about").textContent !== before, [await page.locator("#about").textContent()]);
assert.equal(await cell(), selected);
await page.evaluate(() => getSelection().removeAllRanges());
await until("it moves again", ([before]) => document.querySelector("#counters tbody td").textContent !== before, [selected]);

step("reduced motion");
await page.emulateMedia({ reducedMotion: "reduce" });
assert.equal(await page.evaluate(() => getComputedStyle(document.querySelector(".bar > span")).transitionProperty), "none");
await page.emulateMedia({ reducedMotion: null });

step("what strangers say stays text");
const bad = "<img src=x onerror=\"alert('run')\"><b>bold</b>";
const stats = await (await fetch(new URL("stats", address))).json();
stats.problems = [{ what: bad, text: bad, since: null, severity: bad }];
stats.node = stats.version = bad;
stats.top.clients = [{ client: bad, requests: 1, bytes: 1 }];
stats.top.digests = stats.top.refused = [{ digest: bad, requests: 1, bytes: 1 }];
stats.flights = [{ digest: bad, bytes: 1, size: 2, age_seconds: 1, readers: 1, from: bad }];
stats.routes = [{ route: bad, upstream: bad, up: false, since: bad, requests: 1, hits: 1, misses: 1, questions: 1, saved_bytes: 1, stale: 1, refused: 1 }];
stats.members = [{ name: bad, self: false, up: false, since: bad, share: .5, probe_ms: 1, errors: 1 }];
stats.disk_tier = { state: bad, since: bad, path: bad, filesystem_avail_bytes: 1, errors: 1 };
// The page may have gone on without this answer.
await page.route("**/stats", route => route.fulfill({ json: stats }).catch(() => {}));
await until("the text", ([bad]) => document.querySelector("#clients tbody th")?.textContent === bad && document.getElementById("verdict").textContent.includes(bad), [bad]);
assert.equal(await page.locator("main img, main b").count(), 0);
await page.unroute("**/stats");
await verdict("ok", /^ok/);

step("routes");
assert.equal(await page.locator("#routes-panel").isVisible(), false, "there is no route");
const none = await (await fetch(new URL("stats", address))).json();
assert.deepEqual(none.routes, []);
const routes = [
  { route: "oci docker.example", upstream: "https://registry-1.docker.io/", up: true, since: null, requests: 1200, hits: 900, revalidated: 40, stale: 0, misses: 100, refused: 7, questions: 140, saved_bytes: 5 * 2 ** 30 },
  { route: "/releases/{name*}/{version}/download", upstream: `https://${"a-long-name.".repeat(6)}example:8443/and/a/path`, up: false, since: "2026-01-02T03:04:05Z", requests: 3, hits: 2, revalidated: 0, stale: 2, misses: 0, refused: 0, questions: 5, saved_bytes: 0 },
  { route: "npm", upstream: "https://registry.example/", up: true, since: null, requests: 0, hits: 0, revalidated: 0, stale: 0, misses: 0, refused: 0, questions: 0, saved_bytes: 0 },
];
const down = { what: "upstream", text: `the upstream of route ${routes[1].route} is down`, since: routes[1].since, severity: "warning" };
await page.route("**/stats", route => route.fulfill({ json: { ...none, routes, problems: [down] } }).catch(() => {}));
await until("three routes", () => document.querySelectorAll("#routes tbody tr").length === 3);
const rows = await page.evaluate(() => [...document.querySelectorAll("#routes tbody tr")].map(row => [...row.cells].map(cell => cell.textContent.replaceAll("\u00a0", " "))));
assert.deepEqual(rows[0], ["oci docker.example", "https://registry-1.docker.io/", "up", "1,200", "90.0 % hits", "140", "5.00 GiB", "0", "7"]);
assert.match(rows[1][2], /^down since 2026-01-0[123] \d\d:\d\d$/);
assert.deepEqual([rows[1][4], rows[2][4], rows[2][6]], ["100 % hits", "no hits yet", "0 B"]);
assert.equal(await page.locator("#routes-note").textContent(), "since the start; 2 of 3\u00a0upstreams up");
await verdict("the upstream", /download is down since.*What castier keeps of it is served/);
assert.equal(await page.locator("#verdict").getAttribute("data-level"), "warning");
await inBothSchemes("routes");
for (const width of [1440, 1024, 970, 950, 641, 360]) {
  await resize(width, 800);
  const wide = await page.evaluate(() => ({
    page: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    parts: [...document.querySelectorAll("#routes-panel *")].filter(part => part.getBoundingClientRect().right > innerWidth + 1).map(part => part.outerHTML.slice(0, 80)),
  }));
  assert.deepEqual({ width, ...wide }, { width, page: 0, parts: [] });
}
await inBothSchemes("routes on a phone");
await resize(1280, 900);
await page.unroute("**/stats");
await until("no routes again", () => document.getElementById("routes-panel").hidden);
await verdict("ok", /^ok/);

step("large figures");
// As after a year: each counter has five more digits. Times and settings stay as they are.
const larger = (value, key) =>
  Array.isArray(value) ? value.map(item => larger(item, key))
  : value && typeof value === "object" ? Object.fromEntries(Object.entries(value).map(([name, item]) => [name, larger(item, name)]))
  : Number.isInteger(value) && value > 2 && !/since|time|at$|_s$|_ms$|age/.test(key) ? value * 99_991
  : value;
await page.route("**/stats", route => route.fulfill({ json: larger(none, "") }).catch(() => {}));
await until("them", ([least]) => Number(document.querySelector("#counters tbody td").textContent.replaceAll(",", "")) === least, [larger(none.Gets, "Gets")]);
for (const width of [1440, 1024, 961, 960, 705, 641, 640, 360]) {
  await resize(width, 800);
  const wide = await page.evaluate(() => ({
    page: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    tables: [...document.querySelectorAll(".card table")].filter(table => table.getBoundingClientRect().right > table.closest(".card").getBoundingClientRect().right + 1).map(table => table.id),
  }));
  assert.deepEqual({ width, ...wide }, { width, page: 0, tables: [] });
}
await resize(1280, 900);
await page.unroute("**/stats");
await verdict("ok", /^ok/);

step("an origin that is gone");
await please("stop-origin");
await verdict("the origin", new RegExp(`origin.*${SINCE.source}`));
await until("no", () => document.querySelector("#q-working .answer").textContent !== "yes");
await inBothSchemes("a problem");
await please("start-origin");
await verdict("ok", /^ok/);

step("a peer that is gone");
await please("kill-peer");
await verdict("the peer", new RegExp(`${peer.replaceAll(".", "\\.")} is down ${SINCE.source}`));
await until("its row", ([peer]) => [...document.querySelectorAll("#members tbody tr")].some(row => row.cells[0].textContent === peer && /^down since/.test(row.cells[1].textContent)), [peer]);
assert.equal(await page.locator("#q-sick .answer").textContent(), peer);

step("a castier that is gone, and is back");
away = true;
await please("stop-castier");
await verdict("gone", new RegExp(`castier does not answer ${SINCE.source}`));
const gone = await page.locator("#verdict").textContent();
await page.waitForEvent("requestfailed");
await page.waitForEvent("requestfailed");
assert.equal(await page.locator("#verdict").textContent(), gone, "since when does not change");
await inBothSchemes("gone");
await please("start-castier");
await verdict("back", new RegExp(`^${peer.replaceAll(".", "\\.")} is down`));
away = false;
const again = await figure("Gets");
await until("numbers move again", ([before]) => Number(document.querySelector("#counters tbody td").textContent.replaceAll(",", "")) > before, [again]);
assert.equal(await page.evaluate(() => globalThis.marked), true, "it did not reload");

step("an answer that does not come");
away = true;
await page.route("**/stats", () => {});
await verdict("a timeout", /does not answer.*No answer within 5/);
await page.unroute("**/stats");
await verdict("back", new RegExp(`^${peer.replaceAll(".", "\\.")} is down`));
away = false;
await page.close();

step("a hidden tab asks nothing");
const tab = await context.newPage();
await watch(tab);
await tab.clock.install();
let asked = 0;
tab.on("request", request => { if (request.url().endsWith("/stats")) asked++; });
await tab.goto(address);
await tab.waitForFunction(() => !document.getElementById("figures").hidden);
const hide = hidden => tab.evaluate(hidden => {
  Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
  document.dispatchEvent(new Event("visibilitychange"));
}, hidden);
await hide(true);
const before = asked;
await tab.clock.runFor(60_000);
assert.equal(asked, before, "asked while hidden");
const next = tab.waitForRequest("**/stats");
await hide(false);
await next;
const after = asked;
await tab.waitForResponse("**/stats");
await tab.clock.runFor(10_000);
assert(asked > after, "asked while shown");
await tab.close();

step("without JavaScript");
const plain = await (await browser.newContext({ javaScriptEnabled: false })).newPage();
await plain.goto(address);
const told = await plain.locator("main").innerText();
assert(told.includes("/stats") && told.includes("/metrics"), told);

await browser.close();
assert.deepEqual(complaints, []);
process.exit(0);
