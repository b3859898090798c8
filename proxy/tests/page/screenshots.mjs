// Takes the screenshots of the status page that the docs show. scripts/screenshots starts it, with a cluster.
//
//   node screenshots.mjs TOOLS BROWSER OUT MINUTES ORIGIN PID ADMIN PUBLIC...
//
// TOOLS has playwright-core, BROWSER is the program. For MINUTES clients with addresses of their own ask the nodes at PUBLIC for blobs that are
// stored at ORIGIN. Then the page at ADMIN is shot, once more after the process PID, another node, was killed, and on a phone.
import assert from "node:assert/strict";
import { createHash, randomBytes } from "node:crypto";
import { Agent, request } from "node:http";
import { createRequire } from "node:module";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";

const [tools, browserPath, out, minutes, origin, pid, admin, ...nodes] = process.argv.slice(2);
const { chromium } = createRequire(tools + "/")("playwright-core");

/** Resolves to the status; 0: no answer. */
const send = (url, options, body) => new Promise(resolve => {
  const sent = request(url, options, answer => answer.resume().on("end", () => resolve(answer.statusCode)).on("error", () => resolve(0)));
  sent.on("error", () => resolve(0)).end(body);
});

// ---- the blobs ----

const digests = [];
async function store(agent) {
  // Most are small, a few are large, as in a build cache.
  const body = randomBytes(Math.round(4096 * 2 ** (9 * Math.random() ** 2)));
  const digest = createHash("sha256").update(body).digest("hex");
  const status = await send(`${origin}/cas/${digest}`, { method: "PUT", agent, headers: { "Content-Length": body.length } }, body);
  assert(status === 201, `the origin answers ${status} to an upload`);
  digests.push(digest);
}
const stores = new Agent({ keepAlive: true, maxSockets: 8 });
for (let stored = 0; stored < 2000; stored += 20) await Promise.all(Array.from({ length: 20 }, () => store(stores)));

// ---- the clients ----

let over = false;
async function client(address, pause) {
  const agent = new Agent({ keepAlive: true, localAddress: address });
  for (let turn = 0; !over; turn++) {
    // Zipf's law, roughly; the newest blobs are the hottest.
    const rank = Math.floor(digests.length ** Math.random()) - 1;
    const digest = turn % 200 === 199 ? randomBytes(32).toString("hex") : digests[digests.length - 1 - rank];
    await send(`${nodes[turn % nodes.length]}/cas/${digest}`, { agent });
    await sleep(pause * (.5 + Math.random()) * (1 + .5 * Math.sin(Date.now() / 90_000)));
  }
  agent.destroy();
}
async function uploads() {
  while (!over) {
    await store(stores);
    await sleep(1500);
  }
}
const busy = [uploads(), ...[40, 60, 90, 130, 200, 300, 500, 800].map((pause, at) => client(`127.0.1.${20 + at}`, pause))];
await sleep(minutes * 60_000);

// ---- the shots ----

const browser = await chromium.launch({ executablePath: browserPath, args: ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"] });
async function shot(name, options, fullPage, seen) {
  const page = await (await browser.newContext(options)).newPage();
  await page.goto(admin);
  await page.waitForFunction(([pattern]) => new RegExp(pattern).test(document.getElementById("verdict").textContent), [seen]);
  // Two more answers: the live rate needs them.
  for (let answers = 0; answers < 2; answers++) await page.waitForResponse("**/stats");
  await page.screenshot({ path: join(out, name), fullPage });
  await page.close();
}
await shot("status-page.png", { viewport: { width: 1200, height: 734 } }, false, "^ok");
await shot("status-page-full.png", { viewport: { width: 1200, height: 734 } }, true, "^ok");
await shot("status-page-phone.png", { viewport: { width: 360, height: 740 }, deviceScaleFactor: 2 }, false, "^ok");
process.kill(Number(pid), "SIGKILL");
await shot("status-page-dark.png", { viewport: { width: 1200, height: 660 }, colorScheme: "dark" }, false, "is down since");
over = true;
await Promise.all(busy);
await browser.close();
stores.destroy();
