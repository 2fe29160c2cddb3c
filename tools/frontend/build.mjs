// Bundle the front end into one script: `node build.mjs`, after `npm ci`.
import { fileURLToPath } from 'node:url';

import { build } from 'esbuild';

const here = (path) => fileURLToPath(new URL(path, import.meta.url));

// Grafana's packages name each other in several module formats. Two copies of one would have two registries, of which
// only one is filled: everything takes the CommonJS one.
const oneOfEach = {
  name: 'one-of-each',
  setup: ({ onResolve }) =>
    onResolve({ filter: /^@grafana\/(data|i18n|runtime|scenes|schema|ui|e2e-selectors)$/ }, ({ path }) => ({
      path: here(`node_modules/${path}/dist/${path === '@grafana/scenes' ? 'index.js' : 'cjs/index.cjs'}`),
    })),
};

await build({
  entryPoints: [here('src/main.jsx')],
  outfile: here('dist/main.js'),
  bundle: true,
  minify: true,
  format: 'iife',
  target: 'chrome110',
  jsx: 'automatic',
  plugins: [oneOfEach],
  define: { 'process.env.NODE_ENV': '"production"', global: 'window' },
  loader: { '.svg': 'dataurl', '.woff': 'dataurl', '.woff2': 'dataurl', '.ttf': 'dataurl' },
  logLevel: 'warning',
});
