// The package as others get it: packed, installed into an empty folder, imported, type-checked, bundled and weighed.

import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { cpSync, mkdirSync, mkdtempSync, readFileSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";
import { gzipSync } from "node:zlib";

const CLIENT = join(import.meta.dirname, "../../shared/client");
const PAGE = join(import.meta.dirname, "../../services/edge/page");
const README = readFileSync(join(CLIENT, "README.md"), "utf8");
const OFF_MAX = 0.1; // of the size that the README says

/** The blocks of this language in the README, in order. */
const blocks = (language: string) =>
  [...README.matchAll(new RegExp(`^\`\`\`${language}\n(.*?)^\`\`\``, "gms"))].map(([, code]) => code ?? "");

test("it installs from its tarball, runs in plain Node, and type-checks", (context) => {
  const folder = mkdtempSync(join(tmpdir(), "tapeline-client-"));
  context.after(() => rmSync(folder, { recursive: true }));
  const run = (program: string, ...given: string[]) => execFileSync(program, given, { cwd: folder, encoding: "utf8" });

  const [packed] = JSON.parse(
    execFileSync("npm", ["pack", "--json", "--pack-destination", folder], { cwd: CLIENT, encoding: "utf8" }),
  );
  const names: string[] = packed.files.map(({ path }: { path: string }) => path);
  for (const name of ["README.md", "package.json", "dist/index.js", "dist/index.d.ts", "src/index.ts"]) {
    assert.ok(names.includes(name), `${name} is not in it`);
  }
  assert.ok(names.every((name) => /^(dist|src)\/[a-z]+\.(ts|js|d\.ts|js\.map)$|^[A-Za-z]+(\.md|\.json)?$/.test(name)), `${names}`);

  // What `npm install` does, without a registry: the one dependency is there already.
  const modules = join(folder, "node_modules");
  mkdirSync(join(modules, "@tapeline"), { recursive: true });
  run("tar", "xzf", packed.filename);
  cpSync(join(folder, "package"), join(modules, "@tapeline/client"), { recursive: true });
  rmSync(join(folder, "package"), { recursive: true });
  assert.deepEqual(Object.keys(JSON.parse(readFileSync(join(modules, "@tapeline/client/package.json"), "utf8")).dependencies), [
    "eventsource-parser",
  ]);
  for (const name of ["eventsource-parser", "@types", "undici-types"]) {
    symlinkSync(join(CLIENT, "node_modules", name), join(modules, name));
  }
  writeFileSync(join(folder, "package.json"), '{"type":"module"}');

  writeFileSync(join(folder, "plain.js"), "console.log(Object.keys(await import('@tapeline/client')).sort().join())");
  const exported = run(process.execPath, "plain.js").trim().split(",");
  for (const name of ["EMPTY", "Lost", "Refused", "Tapeline", "TRANSITIONS", "fold", "fromSnapshot", "reduce"]) {
    assert.ok(exported.includes(name), `${name} is not exported`);
  }

  // The README's own examples are the consumers: one knows the DOM and no Node, the other Node and no DOM.
  const [browser = "", node = "", ...others] = blocks("ts");
  assert.deepEqual(others, []);
  const tsc = join(CLIENT, "node_modules/.bin/tsc");
  const strict = ["--strict", "--noEmit", "--module", "nodenext", "--target", "es2022"];
  writeFileSync(join(folder, "browser.ts"), browser);
  run(tsc, ...strict, "--lib", "es2023,dom,dom.iterable", "--types", "", "browser.ts");
  writeFileSync(join(folder, "node.ts"), `${node}\nconst wrong: number = id;\n`);
  assert.throws(
    () => run(tsc, ...strict, "--lib", "es2023", "--types", "node", "node.ts"),
    ({ stdout }) => /^node\.ts\(\d+,7\): error TS2322: [^\n]*\n$/.test(stdout) || assert.fail(stdout),
    "nothing is wrong but what is",
  );
});

test("its README says how large it is", async () => {
  const esbuild = createRequire(join(PAGE, "package.json"))("esbuild");
  const { outputFiles } = await esbuild.build({
    stdin: { contents: 'export { Tapeline } from "@tapeline/client"', resolveDir: PAGE },
    bundle: true,
    minify: true,
    format: "esm",
    target: "es2022",
    conditions: ["source"],
    write: false,
  });
  const kB = gzipSync(outputFiles[0].contents).length / 1_000;
  const said = Number(/\*\*([\d.]+) kB\*\*/.exec(README)?.[1]);
  assert.ok(Math.abs(said / kB - 1) <= OFF_MAX, `it is ${kB.toFixed(1)} kB minified and gzipped; the README says ${said}`);
});
