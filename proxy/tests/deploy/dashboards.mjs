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

// Options and custom fields of a panel stand in a file of the panel's own.
const CONFIG = { stat: "Stat", timeseries: "TimeSeries", table: "Table", logs: "Logs" };
const prelude = `
import type { Dashboard, Panel, RowPanel } from "@grafana/schema";
${Object.entries(CONFIG).map(([type, name]) => `import type * as ${type} from "@grafana/schema/dist/esm/raw/composable/${type}/panelcfg/x/${name}PanelCfg_types.gen";`).join("\n")}
// JSON has the values of an enum, and not the enum.
type Plain<T> = T extends string ? \`\${T}\` : T extends boolean | null | undefined ? T
  : T extends number ? (number extends T ? number : \`\${T}\` extends \`\${infer N extends number}\` ? N : never)
  : T extends (infer I)[] ? Plain<I>[] : T extends object ? { [K in keyof T]: Plain<T[K]> } : T;
`;

/** The faults that TypeScript finds in the dashboard with the types of one version. */
function typed(version, dashboard) {
  const lines = [prelude];
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
    if (!CONFIG[panel.type]) return [`${what}: teach this check the type ${panel.type}`];
    declare(`${what}, options`, `${panel.type}.Options`, panel.options);
    const custom = panel.fieldConfig.defaults.custom;
    if (custom) declare(`${what}, custom fields`, `${panel.type}.FieldConfig`, custom);
  }
  const folder = resolve(tools, version);
  const scratch = mkdtempSync(join(folder, "check-"));
  const file = join(scratch, "dashboard.ts");
  writeFileSync(file, lines.join("\n"));
  const options = { strict: true, noEmit: true, skipLibCheck: true, types: [], target: ts.ScriptTarget.ES2022, module: ts.ModuleKind.ESNext, moduleResolution: ts.ModuleResolutionKind.Bundler };
  const program = ts.createProgram([file], options);
  const found = ts.getPreEmitDiagnostics(program).map((diagnostic) => {
    const text = ts.flattenDiagnosticMessageText(diagnostic.messageText, " ");
    if (!diagnostic.file) return text;
    const line = diagnostic.file.text.slice(0, diagnostic.start).split("\n").length - prelude.split("\n").length - 1;
    const at = diagnostic.file.text.slice(diagnostic.start, diagnostic.start + 60).split("\n")[0];
    return `${names[line] ?? diagnostic.file.fileName}: ${text} (at ${at})`;
  });
  rmSync(scratch, { recursive: true });
  return found.map((text) => `@grafana/schema ${version}: ${text}`);
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

let wrong = false;
for (const file of files) {
  const dashboard = JSON.parse(readFileSync(file, "utf8"));
  const faults = [...versions.flatMap((version) => typed(version, dashboard)), ...parsed(dashboard)];
  for (const fault of faults) console.log(`${basename(file)}: ${fault}`);
  if (faults.length) wrong = true;
  else console.log(`${basename(file)} is sound`);
}
process.exit(wrong ? 1 : 0);
