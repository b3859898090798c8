// Reads Kubernetes objects as a JSON array, and checks those of the Gateway API and of the Prometheus operator, which are in no schema of
// Kubernetes' own. A field that the schema does not know is an error, as the API server would drop it without a word.
// Arguments: the folder with node_modules. Ends with 1 and one line per problem, or prints what it has checked.

import { readFileSync } from 'node:fs';
import { pathToFileURL } from 'node:url';

const packages = { 'gateway.networking.k8s.io': 'gateway-api', 'monitoring.coreos.com': 'prometheus-operator' };
let problems = 0;

// The validators read every field that they know by its name, so what has not been read is unknown.
function watched(value, path, unread) {
  if (value === null || typeof value !== 'object') return value;
  const inner = Array.isArray(value)
    ? value.map((item, index) => watched(item, `${path}[${index}]`, unread))
    : Object.fromEntries(Object.entries(value).map(([key, item]) => [key, watched(item, `${path}.${key}`, unread)]));
  if (Array.isArray(value)) return inner;
  for (const key of Object.keys(value)) unread.add(`${path}.${key}`);
  return new Proxy(inner, {
    get(target, key) {
      if (typeof key === 'string') unread.delete(`${path}.${key}`);
      return target[key];
    },
  });
}

for (const object of JSON.parse(readFileSync(0))) {
  const name = packages[object.apiVersion.split('/')[0]];
  if (!name) continue;
  const folder = `${process.argv[2]}/node_modules/@kubernetes-models/${name}/${object.apiVersion}`;
  const models = await import(pathToFileURL(`${folder}/index.js`).href);
  const title = `${object.kind}/${object.metadata.name}`;
  const unread = new Set();
  const found = [];
  try {
    const model = new models[object.kind](object);
    // The constructor copies, which reads everything.
    for (const key of Object.keys(object)) model[key] = watched(object[key], `${title}.${key}`, unread);
    model.validate();
    found.push(...[...unread].map((path) => `${path} is no known field`));
  } catch (error) {
    found.push(`${title}: ${error.message}`);
  }
  problems += found.length;
  console.log(found.length ? found.join('\n') : `${title} is valid`);
}
process.exit(problems ? 1 : 0);
