/** What dvora.js gives. `ort` is the module of onnxruntime-web or onnxruntime-node. */

export interface Options {
  /** Stops what is being fetched; the promise is rejected with its reason. */
  signal?: AbortSignal;
}

export interface LoadOptions extends Options {
  /** "one-int8" was exported with --int8; default "one". */
  graph?: "one" | "one-int8";
  /** Of onnxruntime, such as ["webgpu"]; default what the module takes by itself. */
  providers?: readonly string[];
  /** Called with the bytes of graph and weights that are there, and of how many. */
  progress?: (bytes: number, of: number) => void;
}

export interface Tensor {
  readonly data: any;
  readonly dims: readonly number[];
}

export interface Listed {
  name: string;
  /** Of the classes; empty if they have no names. */
  labels: string[];
  /** Of layout, name, labels and values. */
  digest: string;
  /** In adapters/. */
  file: string;
  bytes: number;
}

export interface Adapter {
  name: string;
  labels: string[];
  digest: string;
  vector: Float32Array;
  bytes: number;
}

export interface NamedFile {
  file: string;
  bytes: number;
  sha256: string;
}

export interface Input {
  name: string;
  dtype: string;
  /** A dimension of any size has a name. */
  dimensions: (number | string)[];
}

/** layout.json */
export interface Layout {
  format: string;
  version: number;
  dtype: "float32";
  /** Values of an adapter. */
  size: number;
  settings: Record<string, unknown>;
  base: string;
  entries: { name: string; offset: number; shape: number[] }[];
  digest: string;
  /** The model's class in transformers. */
  model: string;
  graphs: Record<string, NamedFile & { adapter_inputs: Input[]; weights?: NamedFile }>;
  inputs: Input[];
  outputs: { name: string; dtype: string; is: string }[];
  /** Empty for images. */
  tokenizer: {
    longest?: number | null;
    truncation?: { direction: "left" | "right" };
    padding?: { direction: "left" | "right"; pad_id: number; pad_token: string };
  };
}

/** An exported folder. */
export class Folder {
  /** @param place an address, relative to the page or worker; in Node a path or an address. */
  constructor(place?: string | URL);
  readonly address: URL;
  bytes(name: string, options?: Options & { cache?: RequestCache; progress?: (bytes: number) => void }): Promise<Uint8Array>;
  /** An error names the file and what it lacks of `has`; with `list` it is a list, and each item has that. */
  json(name: string, options?: Options & { has?: readonly string[]; list?: boolean }): Promise<any>;
  /** A file that layout.json names, checked by its sha256. */
  checked(file: NamedFile, options?: Options & { progress?: (bytes: number) => void }): Promise<Uint8Array>;
}

/** A base model in one session of onnxruntime; an adapter is an input of each call. */
export class Model {
  static load(ort: any, folder?: string | URL, options?: LoadOptions): Promise<Model>;
  readonly folder: Folder;
  readonly layout: Layout;
  /** adapters/index.json; "null" is the base itself. */
  readonly adapters: Listed[];
  /** Of onnxruntime; `session.release()` frees the model's memory. */
  readonly session: any;
  /** Fetched and checked when it is first asked for. */
  adapter(name: string, options?: Options): Promise<Adapter>;
  /** The output for the tokens of one text. */
  run(ids: readonly number[], adapter: Pick<Adapter, "vector">): Promise<Tensor>;
  /** All outputs for the inputs that layout.json lists; calls wait for each other. */
  call(inputs: Record<string, any>, adapter: Pick<Adapter, "vector">): Promise<Record<string, any>>;
}

/** Pipelines of transformers.js over one session. */
export class Pipelines {
  static load(ort: any, transformers: any, folder?: string | URL, options?: LoadOptions): Promise<Pipelines>;
  readonly model: Model;
  readonly tokenizer: any;
  pipeline<Made>(Pipeline: new (parts: any) => Made, name: string, options?: Options): Promise<Made>;
}

/**
 * The tokens of a text, cut to what the model reads.
 *
 * @param tokenizer of @huggingface/tokenizers or transformers.js.
 * @returns ids, and how many tokens the text has before it is cut.
 */
export function encode(tokenizer: any, text: string, layout: Layout): { ids: number[]; tokens: number };

/** The content of a packed adapter's file, checked: format, layout, name, labels, size, digest, finite values. */
export function unpacked(content: ArrayBuffer | Uint8Array, layout: Layout, name: string): Promise<Adapter>;

/** Probabilities from logits. */
export function softmax(logits: ArrayLike<number>): number[];
