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

  /**
   * The output of one text.
   *
   * @param ids of its tokens.
   * @param adapter what `adapter` gave.
   */
  async run(ids, adapter) {
    const size = [1, ids.length], whole = values => new this.ort.Tensor("int64", BigInt64Array.from(values, BigInt), size);
    const given = { input_ids: ids, attention_mask: ids.map(() => 1), token_type_ids: ids.map(() => 0) };
    const inputs = { [TENSOR]: new this.ort.Tensor("float32", adapter.vector, [adapter.vector.length]) };
    for (const name of this.session.inputNames) {
      if (name === TENSOR) continue;
      if (!(name in given)) throw new Error(`the graph has the input ${name}, which this page does not know`);
      inputs[name] = whole(given[name]);
    }
    return (await this.session.run(inputs)).output;
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
