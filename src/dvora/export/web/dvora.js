/** A base model with adapters that are handed to it as vectors: in a page, a worker or Node. Types: dvora.d.ts. */

const FORMAT = "dvora-packed", VERSION = 2, TENSOR = "adapter";
const LAYOUT = ["format", "version", "digest", "size", "graphs", "inputs", "tokenizer"], LISTED = ["name", "file", "digest"];
// Not imported by name, which bundlers for browsers refuse.
const node = globalThis.process?.getBuiltinModule;

/** An exported folder, whose errors name the file and what to do. */
export class Folder {
  constructor(place = "./") {
    const ended = `${place}`.replace(/\/?$/, "/");
    if (/^(https?|file):/.test(ended)) this.address = new URL(ended);
    else this.address = node ? node("node:url").pathToFileURL(ended) : new URL(ended, globalThis.document?.baseURI ?? location.href);
  }

  async bytes(name, { signal, cache = "no-cache", progress = () => {} } = {}) {
    const address = new URL(name.split("/").map(encodeURIComponent).join("/"), this.address);
    try {
      if (node && address.protocol === "file:") {
        const content = await node("node:fs/promises").readFile(address, { signal });
        progress(content.length);
        return content;
      }
      const answer = await fetch(address, { cache, signal });
      if (!answer.ok) throw Object.assign(new Error(`the server answers ${answer.status} ${answer.statusText}`), { status: answer.status });
      const count = new TransformStream({ transform: (part, stream) => { progress(part.length); stream.enqueue(part); } });
      return new Uint8Array(await new Response(answer.body.pipeThrough(count)).arrayBuffer());
    } catch (error) {
      signal?.throwIfAborted();
      const missing = error.status === 404 || error.code === "ENOENT";
      const why = missing ? `is not in ${this.address}; put the whole exported folder there`
        : error instanceof TypeError ? "could not be fetched; see that the network and the server are up, then try again"
        : `could not be read: ${error.message}`;
      throw new Error(`${name} ${why}`, { cause: error });
    }
  }

  /** @param has what the content, or with list each item of it, has to have. */
  async json(name, { has = [], list = false, ...options } = {}) {
    const text = new TextDecoder().decode(await this.bytes(name, options));
    let content;
    try {
      content = JSON.parse(text);
    } catch {
      throw new Error(`${name} is no JSON, it starts with ${JSON.stringify(text.slice(0, 20))}; put the exported file there (some servers answer with a page where a file is missing)`);
    }
    const items = !list ? [content] : Array.isArray(content) && content.length ? content : [null];
    const missing = has.find(key => items.some(item => item?.[key] == null));
    if (missing) throw new Error(`${name} has no ${missing}; put the exported file there again`);
    return content;
  }

  /** A file that layout.json names. */
  async checked({ file, bytes, sha256 }, options) {
    // Its name has its digest, so a cache has the right one.
    const content = await this.bytes(file, { cache: "default", ...options });
    if (await digest(content) !== sha256)
      throw new Error(`${file} is damaged: ${content.length} bytes, not the ${bytes} that layout.json names; put the exported file there again, and empty the browser's cache`);
    return content;
  }
}

async function digest(bytes) {
  const hash = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(hash, byte => byte.toString(16).padStart(2, "0")).join("");
}

export class Model {
  /**
   * @param ort the module of onnxruntime-web or onnxruntime-node.
   * @param folder its address; in Node a path, too.
   * @param options graph: "one", or "one-int8"; providers: of onnxruntime; signal: to stop; progress: (bytes, of bytes).
   */
  static async load(ort, folder = "./", { graph = "one", providers, signal, progress = () => {} } = {}) {
    if (typeof WebAssembly !== "object") throw new Error("this browser has no WebAssembly, which the model runs in");
    if (!globalThis.crypto?.subtle) throw new Error("files cannot be checked, since browsers have crypto.subtle in secure pages only: serve this one by https, or from localhost");
    const from = new Folder(folder), layout = await from.json("layout.json", { signal, has: LAYOUT });
    if (layout.format !== FORMAT || layout.version !== VERSION)
      throw new Error(`layout.json is of ${layout.format} ${layout.version}, expected ${FORMAT} ${VERSION}; export the model again`);
    const graphs = Object.keys(layout.graphs).filter(name => layout.graphs[name].adapter_inputs?.[0]?.name === TENSOR);
    if (!graphs.includes(graph)) throw new Error(`there is no graph ${graph} here, but ${graphs.join(" and ")}; for int8 export with --int8`);
    const adapters = await from.json("adapters/index.json", { signal, has: LISTED, list: true });
    const { weights, ...program } = layout.graphs[graph], total = program.bytes + (weights?.bytes ?? 0);
    let done = 0;
    const options = { signal, progress: bytes => progress(done += bytes, total) };
    const code = await from.checked(program, options);
    const externalData = weights && [{ path: weights.file, data: await from.checked(weights, options) }];
    const session = await ort.InferenceSession.create(code, { ...(providers && { executionProviders: providers }), ...(externalData && { externalData }) });
    if (signal?.aborted) await session.release();
    signal?.throwIfAborted();
    return new Model(ort, from, layout, session, adapters);
  }

  #read = new Map();
  #last = Promise.resolve();

  constructor(ort, folder, layout, session, adapters) {
    Object.assign(this, { ort, folder, layout, session, adapters });
  }

  /** An adapter by its name, fetched once; "null" is the base itself. */
  async adapter(name, { signal } = {}) {
    if (this.#read.has(name)) return this.#read.get(name);
    const listed = this.adapters.find(each => each.name === name);
    if (!listed) throw new Error(`there is no adapter ${name} in adapters/index.json, which has ${this.adapters.length}`);
    const adapter = await unpacked(await this.folder.bytes(`adapters/${listed.file}`, { signal }), this.layout, name);
    if (adapter.digest !== listed.digest)
      throw new Error(`adapter ${name} is another one than adapters/index.json says; load the page again, or put the whole export there again`);
    this.#read.set(name, adapter);
    return adapter;
  }

  /** The outputs for a graph's inputs with an adapter, one call after another: a session runs once at a time. */
  call(inputs, { vector }) {
    const run = () => this.session.run({ ...inputs, [TENSOR]: new this.ort.Tensor("float32", vector, [vector.length]) });
    const outputs = this.#last.then(run);
    this.#last = outputs.catch(() => {});
    return outputs;
  }

  /**
   * The output for one text.
   *
   * @param ids of its tokens, see `encode`.
   * @param adapter what `adapter` gave.
   */
  async run(ids, adapter) {
    const { longest } = this.layout.tokenizer;
    if (longest && ids.length > longest) throw new Error(`the text has ${ids.length} tokens, and the model reads ${longest}; cut it, see encode`);
    const given = { input_ids: ids, attention_mask: ids.map(() => 1), token_type_ids: ids.map(() => 0) }, inputs = {};
    for (const { name } of this.layout.inputs) {
      if (!(name in given)) throw new Error(`the graph has the input ${name}, which Model.run does not know; use Model.call`);
      inputs[name] = new this.ort.Tensor("int64", BigInt64Array.from(given[name], BigInt), [1, ids.length]);
    }
    return (await this.call(inputs, adapter)).output;
  }
}

/** Pipelines of transformers.js over one session; each has its adapter, so that several may be at work at once. */
export class Pipelines {
  /**
   * @param ort the module of onnxruntime-web, the same one that transformers.js imports.
   * @param transformers the module of transformers.js.
   * @param folder and options as of Model.load.
   */
  static async load(ort, transformers, folder = "./", options = {}) {
    if (!knows(transformers, new ort.Tensor("float32", [0], [1])))
      throw new Error("transformers.js runs with another copy of onnxruntime; let both import one, by an import map");
    // Read here, since transformers.js would keep the files in the browser's cache, also when the model is exported again.
    const from = new Folder(folder), json = (name, has) => from.json(`${name}.json`, { signal: options.signal, has });
    const config = await json("config", ["architectures"]), [architecture] = config.architectures;
    if (!(architecture in transformers)) throw new Error(`transformers.js has no ${architecture}, which the model is`);
    const words = await json("tokenizer", ["model"]), settings = await json("tokenizer_config", ["tokenizer_class"]), model = await Model.load(ort, folder, options);
    const Tokenizer = transformers[settings.tokenizer_class] ?? transformers.PreTrainedTokenizer;
    // transformers.js would take spaces before commas out of what is generated, which PyTorch's transformers does not.
    const tokenizer = new Tokenizer(words, { ...settings, clean_up_tokenization_spaces: false });
    // It would cut off the token that ends a text, too.
    const whole = tokenizer._encode_plus.bind(tokenizer);
    tokenizer._encode_plus = (text, asked = {}) => {
      const encoding = whole(text, asked);
      if (asked.text_pair || asked.add_special_tokens === false) return encoding;
      const { ids } = encode(tokenizer, text, model.layout);
      return { ...Object.fromEntries(Object.entries(encoding).map(([name, values]) => [name, values.slice(0, ids.length)])), input_ids: ids };
    };
    const generates = model.session.inputNames.some(input => input.startsWith("past_key_values"));
    const configs = generates ? { generation_config: await json("generation_config") } : {};
    const output = generates || architecture.includes("For") ? "logits" : "last_hidden_state";
    return new Pipelines(model, transformers, config, configs, tokenizer, output);
  }

  constructor(model, transformers, config, configs, tokenizer, output) {
    Object.assign(this, { model, transformers, config, configs, tokenizer, output });
  }

  /**
   * A pipeline with an adapter.
   *
   * @param Pipeline a class of transformers.js, such as TextClassificationPipeline.
   * @param name of the adapter; "null" is the base itself.
   */
  async pipeline(Pipeline, name, options) {
    const { PretrainedConfig, [this.config.architectures[0]]: Adapted } = this.transformers;
    const adapter = await this.model.adapter(name, options);
    const config = new PretrainedConfig({ ...this.config, id2label: adapter.labels.length ? adapter.labels : null });
    return new Pipeline({ model: new Adapted(config, { model: this.#session(adapter) }, this.configs), tokenizer: this.tokenizer });
  }

  /** What a model of transformers.js runs: the graph with an adapter, its outputs with the names that it looks for. */
  #session(adapter) {
    const { model } = this, { session } = model;
    return {
      inputNames: session.inputNames.filter(input => input !== TENSOR),
      // The sizes of the first, empty cache, in which this name stands for the number of rows.
      inputMetadata: session.inputMetadata.map(input => ({ ...input, shape: ["batch_size", ...input.shape.slice(1)] })),
      run: async inputs => {
        const { output, ...cache } = await model.call(inputs, adapter);
        // Of a language model there are those of the last token, without a dimension of tokens.
        const [rows, words] = output.dims, named = "generation_config" in this.configs ? output.reshape([rows, 1, words]) : output;
        return { [this.output]: named, ...cache };
      },
    };
  }
}

function knows(transformers, tensor) {
  try {
    return new transformers.Tensor(tensor).ort_tensor === tensor;
  } catch {
    return false;
  }
}

/** The tokens of a text, cut to what the model reads as tokenizer.json says: what stands around a text stays. */
export function encode(tokenizer, text, layout) {
  const idsOf = options => { const encoding = tokenizer.encode(text, options); return encoding.ids ?? encoding; };
  const ids = idsOf(), { longest, truncation } = layout.tokenizer;
  if (!longest || ids.length <= longest) return { ids, tokens: ids.length };
  const words = idsOf({ add_special_tokens: false }), room = longest - (ids.length - words.length);
  const kept = truncation.direction === "left" ? words.slice(words.length - room) : words.slice(0, room);
  let before = 0;
  while (before < ids.length - words.length && words.some((word, index) => word !== ids[before + index])) before++;
  return { ids: [...ids.slice(0, before), ...kept, ...ids.slice(before + words.length)], tokens: ids.length };
}

/** A packed adapter (safetensors), checked: its vector and the names of its classes. */
export async function unpacked(content, layout, name) {
  const bytes = new Uint8Array(content);
  let start, about, range, labels;
  try {
    start = 8 + Number(new DataView(bytes.buffer).getBigUint64(0, true));
    const header = JSON.parse(new TextDecoder().decode(new Uint8Array(bytes.buffer, 8, start - 8)));
    about = header.__metadata__ ?? {};
    range = header[TENSOR]?.data_offsets ?? [0, 0];
    labels = JSON.parse(about.labels);
    if (!Array.isArray(labels) || labels.some(label => typeof label !== "string")) throw new Error("its labels are no list of texts");
  } catch (error) {
    throw new Error(`adapter ${name} is damaged: ${error.message}; put the exported file there again`);
  }
  if (about.format !== FORMAT || about.version !== `${VERSION}`)
    throw new Error(`adapter ${name} is of ${about.format} ${about.version}, expected ${FORMAT} ${VERSION}; export it again`);
  if (about.layout !== layout.digest)
    throw new Error(`adapter ${name} is of layout ${about.layout}, and this graph of ${layout.digest}: another base or other settings; pack it with this export's base`);
  if (about.name !== name) throw new Error(`adapter ${name} is another one, ${about.name}; put each exported file there under its name`);
  const values = bytes.slice(start + range[0], start + range[1]);
  if (values.length !== 4 * layout.size || start + range[1] !== bytes.length)
    throw new Error(`adapter ${name} has ${bytes.length} bytes, expected ${start + 4 * layout.size}; it is truncated`);
  if ((await digest(await new Blob([`${layout.digest}\n${name}\n${about.labels}`, values]).arrayBuffer())).slice(0, 32) !== about.digest)
    throw new Error(`adapter ${name} is damaged: it has another digest than it says; put the exported file there again`);
  const vector = new Float32Array(values.buffer);
  if (!vector.every(Number.isFinite)) throw new Error(`adapter ${name} has values that are not finite; export it again`);
  return { name, vector, labels, digest: about.digest, bytes: bytes.length };
}

/** Probabilities from logits. */
export function softmax(logits) {
  // Not as arguments, which would be too many of a language model.
  const most = Array.from(logits).reduce((a, b) => Math.max(a, b)), powers = Array.from(logits, value => Math.exp(value - most));
  const sum = powers.reduce((a, b) => a + b);
  return powers.map(power => power / sum);
}
