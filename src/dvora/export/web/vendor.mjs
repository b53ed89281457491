// Copies what the page fetches out of node_modules into vendor/, which is uploaded in its place.
import { cp, mkdir, rm } from "node:fs/promises";
import { existsSync } from "node:fs";

const RUNTIMES = ["wasm.min.mjs", "webgpu.min.mjs"].map(name => `dist/ort.${name}`);
// What each of the two runs in; a browser fetches one.
const MODULES = ["", ".asyncify"].flatMap(kind => [`dist/ort-wasm-simd-threaded${kind}.mjs`, `dist/ort-wasm-simd-threaded${kind}.wasm`]);
const PACKAGES = {
  "onnxruntime-web": [...RUNTIMES, ...MODULES],
  "@huggingface/tokenizers": ["dist/tokenizers.min.mjs"],
  // For pipelines, if it was installed.
  "@huggingface/transformers": ["dist/transformers.web.min.js"],
};

await rm("vendor", { recursive: true, force: true });
for (const [name, files] of Object.entries(PACKAGES)) {
  if (!existsSync(`node_modules/${name}`)) continue;
  for (const file of [...files, "package.json", "LICENSE"]) {
    if (file === "LICENSE" && !existsSync(`node_modules/${name}/${file}`)) continue;
    await mkdir(`vendor/${name}/dist`, { recursive: true });
    await cp(`node_modules/${name}/${file}`, `vendor/${name}/${file}`);
    console.log(`vendor/${name}/${file}`);
  }
}
