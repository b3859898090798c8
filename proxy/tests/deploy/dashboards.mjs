// Checks dashboards against the types that Grafana publishes, and their LogQL with the grammar of Grafana's own editor.
//
//   node dashboards.mjs TOOLS FILE...     TOOLS/VERSION/node_modules has @grafana/schema of that version; the newest also typescript and lezer-logql
//
// Prints a line for each fault and each file that is sound, and ends with 1 if there is a fault.
import { readFileSync, readdirSync, writeFileSync, mkdtempSync, rmSync } from "node:fs";
import { createRequire } from "node:module";
import { basename, join, resolve } from "node:path";
import { pathToFileURL } from "node:url";

const [tools, ...files] = process.argv.slice(2);
const versions = readdirSync(tools).sort((a, b) => a - b);
const newest = resolve(tools, versions.at(-1));
const require = createRequire(join(newest, "package.json"));
const ts = require("typescript");
const { parser } = await import(pathToFileURL(require.resolve("@grafana/lezer-logql")));

// The kinds of panels that are known here. The types of a kind's options and custom fields stand in a file of its own.
const KINDS = ["stat", "timeseries", "table", "logs"];
/** What the declarations of a dashboard begin with. */
function prelude(version) {
  const schema = "node_modules/@grafana/schema/dist";
  const all = readdirSync(resolve(tools, version, schema), { recursive: true });
  const imports = KINDS.map((kind) => {
    // Where it stands differs by version. By its path, as the package does not name all of them in its exports.
    const file = all.find((path) => path.includes(`composable/${kind}/panelcfg/`) && path.endsWith("types.gen.d.ts"));
    if (!file) throw new Error(`@grafana/schema ${version} has no types for ${kind}`);
    return `import type * as ${kind} from "../${schema}/${file.replace(/\.d\.ts$/, "")}";`;
  });
  return `${imports.join("\n")}
import type { Dashboard, Panel, RowPanel } from "@grafana/schema";
// JSON has the values of an enum, and not the enum.
type Plain<T> = T extends string ? \`\${T}\` : T extends boolean | null | undefined ? T
  : T extends number ? (number extends T ? number : \`\${T}\` extends \`\${infer N extends number}\` ? N : never)
  : T extends (infer I)[] ? Plain<I>[] : T extends object ? { [K in keyof T]: Plain<T[K]> } : T;
`;
}

/** The faults that TypeScript finds in the dashboards with the types of one version, as [index of the dashboard, text]. One run for all, as most of its time goes into reading the types. */
function typed(version, dashboards) {
  const start = prelude(version);
  const scratch = mkdtempSync(join(resolve(tools, version), "check-"));
  const faults = [];
  const named = dashboards.map((dashboard, index) => {
    const lines = [start];
    const names = [];
    const declare = (what, type, value) => {
      lines.push(`export const v${names.length}: Plain<${type}> = ${JSON.stringify(value)};`);
      names.push(what);
    };
    const { panels, ...rest } = dashboard;
    declare("the dashboard", "Dashboard", rest);
    for (const panel of panels) {
      const what = `panel "${panel.title}"`;
      if (panel.type === "row") {
        declare(what, "RowPanel", panel);
        continue;
      }
      declare(what, "Panel", panel);
      if (!KINDS.includes(panel.type)) {
        faults.push([index, `${what}: teach this check the type ${panel.type}`]);
        continue;
      }
      declare(`${what}, options`, `${panel.type}.Options`, panel.options);
      const custom = panel.fieldConfig.defaults.custom;
      if (custom) declare(`${what}, custom fields`, `${panel.type}.FieldConfig`, custom);
    }
    const file = join(scratch, `dashboard-${index}.ts`);
    writeFileSync(file, lines.join("\n"));
    return { file, names };
  });
  const options = { strict: true, noEmit: true, skipLibCheck: true, types: [], target: ts.ScriptTarget.ES2022, module: ts.ModuleKind.ESNext, moduleResolution: ts.ModuleResolutionKind.Bundler };
  const program = ts.createProgram(named.map(({ file }) => file), options);
  for (const diagnostic of ts.getPreEmitDiagnostics(program)) {
    const text = ts.flattenDiagnosticMessageText(diagnostic.messageText, " ");
    const index = Math.max(0, named.findIndex(({ file }) => resolve(diagnostic.file?.fileName ?? "") === file));
    const source = diagnostic.file?.text ?? "";
    const line = source.slice(0, diagnostic.start).split("\n").length - start.split("\n").length - 1;
    const at = source.slice(diagnostic.start, diagnostic.start + 60).split("\n")[0];
    faults.push([index, `${named[index].names[line] ?? diagnostic.file?.fileName}: ${text} (at ${at})`]);
  }
  rmSync(scratch, { recursive: true });
  return faults.map(([index, text]) => [index, `@grafana/schema ${version}: ${text}`]);
}

/** LogQL that the grammar does not take. Variables are replaced as Grafana would. */
function parsed(dashboard) {
  const faults = [];
  const values = { namespace: ".*", node: ".*", format: "json", trace: "4bf92f3577b34da6", __auto: "1m", __range: "1h" };
  for (const panel of dashboard.panels) {
    for (const target of panel.targets ?? []) {
      if (target.datasource.type !== "loki") continue;
      const query = target.expr.replace(/\$(\w+)/g, (whole, name) => values[name] ?? whole);
      let errors = query.includes("$") ? 1 : 0;
      parser.parse(query).iterate({ enter: (node) => void (errors += node.type.isError ? 1 : 0) });
      if (errors) faults.push(`panel "${panel.title}": no LogQL: ${query}`);
    }
  }
  return faults;
}

const dashboards = files.map((file) => JSON.parse(readFileSync(file, "utf8")));
const faults = versions.flatMap((version) => typed(version, dashboards));
dashboards.forEach((dashboard, index) => faults.push(...parsed(dashboard).map((text) => [index, text])));
files.forEach((file, index) => {
  const own = faults.filter(([of]) => of === index);
  for (const [, text] of own) console.log(`${basename(file)}: ${text}`);
  if (!own.length) console.log(`${basename(file)} is sound`);
});
process.exit(faults.length ? 1 : 0);
