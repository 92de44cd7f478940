// Connects to a Baton router: loads the .proto at run time, so nothing is generated.
import { fileURLToPath } from "node:url";
import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

const PROTO_FOLDER = fileURLToPath(new URL("../../proto", import.meta.url));

const definition = protoLoader.loadSync("baton/v1/inference.proto", {
  includeDirs: [PROTO_FOLDER],
  // The names of the .proto: request_id, not requestId.
  keepCase: true,
  // 64-bit numbers (seeds, epochs, blocks) do not fit a JavaScript number.
  longs: String,
  enums: String,
  // An answer has every field; `usage` and `timings` are null until the last message.
  defaults: true,
  oneofs: true,
});

export const { Inference } = grpc.loadPackageDefinition(definition).baton.v1;

/**
 * A client of the router at `target`, "host:port".
 *
 * @param {string} target
 * @param {{ rootCertificate?: Buffer, maxMessageBytes?: number }} [options] `rootCertificate` (PEM) asks for TLS.
 */
export function connect(target, { rootCertificate, maxMessageBytes = 64 << 20 } = {}) {
  const credentials = rootCertificate ? grpc.credentials.createSsl(rootCertificate) : grpc.credentials.createInsecure();
  return new Inference(target, credentials, {
    "grpc.max_receive_message_length": maxMessageBytes,
    "grpc.max_send_message_length": maxMessageBytes,
  });
}

/** Metadata of a call: the API key, where the router asks for one. */
export function metadata(apiKey = process.env.BATON_API_KEY) {
  const headers = new grpc.Metadata();
  if (apiKey) headers.set("authorization", `Bearer ${apiKey}`);
  return headers;
}

/** A unary call as a promise: `await call(client, "GetModelInfo", {})`. */
export function call(client, method, request, options = {}) {
  return new Promise((resolve, reject) => {
    client[method](request, metadata(), options, (error, answer) => (error ? reject(error) : resolve(answer)));
  });
}
