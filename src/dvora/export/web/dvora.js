/** A base model with adapters that are handed to it as vectors, in a browser or in Node; see layout.json. */

const FORMAT = "dvora-packed", VERSION = 1, TENSOR = "adapter";

async function fetched(address) {
  // Asked for again each time, so that no old adapter comes from the browser's cache.
  const answer = await fetch(address, { cache: "no-cache" });
  if (!answer.ok) throw new Error(`${address}: ${answer.status} ${answer.statusText}`);
  return answer;
}

export class Model {
  /**
   * @param ort the module of onnxruntime-web.
   * @param folder the address of the exported folder, with a slash at its end.
   * @param graph the file in it.
   */
  static async load(ort, folder = "./", graph = "one.onnx") {
    if (typeof WebAssembly !== "object") throw new Error("this browser has no WebAssembly, which the model runs in");
    const layout = await (await fetched(`${folder}layout.json`)).json();
    if (layout.format !== FORMAT || layout.version !== VERSION)
      throw new Error(`layout.json is of ${layout.format} ${layout.version}, expected ${FORMAT} ${VERSION}; export the model again`);
    const weights = { path: "weights.bin", data: `${folder}weights.bin` };
    const session = await ort.InferenceSession.create(`${folder}${graph}`, { executionProviders: ["wasm"], externalData: [weights] });
    return new Model(ort, folder, layout, session);
  }

  constructor(ort, folder, layout, session) {
    Object.assign(this, { ort, folder, layout, session });
    this.adapters = new Map();
  }

  /** An adapter by its name, fetched once; "null" is the base itself. */
  adapter(name) {
    if (!this.adapters.has(name)) {
      const read = fetched(`${this.folder}adapters/${encodeURIComponent(name)}.safetensors`)
        .then(answer => answer.arrayBuffer()).then(bytes => unpacked(bytes, this.layout, name));
      // One that could not be read may be tried again.
      read.catch(() => this.adapters.delete(name));
      this.adapters.set(name, read);
    }
    return this.adapters.get(name);
  }

  /** An adapter as an input of the graph. */
  tensor({ vector }) {
    return new this.ort.Tensor("float32", vector, [vector.length]);
  }

  /**
   * The output of one text.
   *
   * @param ids of its tokens.
   * @param adapter what `adapter` gave.
   */
  async run(ids, adapter) {
    const size = [1, ids.length], whole = values => new this.ort.Tensor("int64", BigInt64Array.from(values, BigInt), size);
    const given = { input_ids: ids, attention_mask: ids.map(() => 1), token_type_ids: ids.map(() => 0) };
    const inputs = { [TENSOR]: this.tensor(adapter) };
    for (const name of this.session.inputNames) {
      if (name === TENSOR) continue;
      if (!(name in given)) throw new Error(`the graph has the input ${name}, which this page does not know`);
      inputs[name] = whole(given[name]);
    }
    return (await this.session.run(inputs)).output;
  }
}

/** Pipelines of transformers.js over one session; each has its adapter, so that several may be at work at once. */
export class Pipelines {
  /**
   * @param ort the module of onnxruntime-web, the same one that transformers.js imports.
   * @param transformers the module of transformers.js.
   * @param folder and graph as of Model.load.
   */
  static async load(ort, transformers, folder = "./", graph = "one.onnx") {
    if (!knows(transformers, new ort.Tensor("float32", [0], [1])))
      throw new Error("transformers.js runs with another copy of onnxruntime; let both import one, by an import map");
    // Read here, since transformers.js would keep the files in the browser's cache, also when the model is exported again.
    const json = async name => (await fetched(`${folder}${name}.json`)).json();
    const config = await json("config"), [architecture] = config.architectures;
    if (!(architecture in transformers)) throw new Error(`transformers.js has no ${architecture}, which the model is`);
    const [words, settings, model] = await Promise.all([json("tokenizer"), json("tokenizer_config"), Model.load(ort, folder, graph)]);
    const Tokenizer = transformers[settings.tokenizer_class] ?? transformers.PreTrainedTokenizer;
    // transformers.js would take spaces before commas out of what is generated, which PyTorch's transformers does not.
    const tokenizer = new Tokenizer(words, { ...settings, clean_up_tokenization_spaces: false });
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
  async pipeline(Pipeline, name) {
    const { PretrainedConfig, [this.config.architectures[0]]: Adapted } = this.transformers;
    const adapter = await this.model.adapter(name);
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
        const { output, ...cache } = await session.run({ ...inputs, [TENSOR]: model.tensor(adapter) });
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

/** A packed adapter (safetensors): its vector and the names of its classes; refused if it is of another graph. */
export function unpacked(bytes, layout, name) {
  let header, start;
  try {
    start = 8 + Number(new DataView(bytes).getBigUint64(0, true));
    header = JSON.parse(new TextDecoder().decode(new Uint8Array(bytes, 8, start - 8)));
  } catch (error) {
    throw new Error(`adapter ${name} is damaged: ${error.message}`);
  }
  const about = header.__metadata__ ?? {}, [first, last] = header[TENSOR]?.data_offsets ?? [0, 0];
  if (about.format !== FORMAT || about.layout !== layout.digest)
    throw new Error(`adapter ${name} is of layout ${about.layout}, and this graph of ${layout.digest}: another base or other settings; pack it with this export's base`);
  if (last - first !== 4 * layout.size || start + last !== bytes.byteLength)
    throw new Error(`adapter ${name} has ${bytes.byteLength} bytes, expected ${start + 4 * layout.size}; it is truncated`);
  return { name, vector: new Float32Array(bytes.slice(start + first, start + last)), labels: JSON.parse(about.labels ?? "[]"), bytes: bytes.byteLength };
}

/** Probabilities from logits. */
export function softmax(logits) {
  const most = Math.max(...logits), powers = Array.from(logits, value => Math.exp(value - most));
  const sum = powers.reduce((a, b) => a + b);
  return powers.map(power => power / sum);
}
