// Builds the page into dist/: one bundle whose files are named by their content, so that browsers may keep them for
// ever, and an index.html that names them. `scripts/page` runs this.
import { readFile, rm, writeFile } from "node:fs/promises";
import { build } from "esbuild";

process.chdir(import.meta.dirname);
await rm("dist", { recursive: true, force: true });
const { metafile } = await build({
  absWorkingDir: import.meta.dirname,
  entryPoints: ["src/page.ts", "src/page.css", "src/icon.svg"],
  outdir: "dist/page",
  entryNames: "[name]-[hash]",
  chunkNames: "[name]-[hash]",
  assetNames: "[name]-[hash]",
  loader: { ".svg": "copy" },
  bundle: true,
  splitting: true,
  format: "esm",
  target: "es2022",
  conditions: ["source"], // the client from its sources: nothing to build before this
  minify: true,
  sourcemap: "linked",
  metafile: true,
  logLevel: "warning",
});
let html = await readFile("index.html", "utf8");
const url = (path) => path.slice("dist/".length);
for (const [path, { entryPoint, imports }] of Object.entries(metafile.outputs)) {
  if (!entryPoint || !html.includes(`"page/${entryPoint}"`)) continue;
  html = html.replaceAll(`"page/${entryPoint}"`, `"${url(path)}"`);
  for (const { path, kind } of imports) {
    if (kind !== "import-statement") continue; // what is always needed need not wait until the script has been read
    html = html.replace("  </head>", `    <link rel="modulepreload" href="${url(path)}">\n  </head>`);
  }
}
await writeFile("dist/index.html", html);
