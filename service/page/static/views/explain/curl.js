// A request as a line for a POSIX shell. Whatever a file or an option is called, it stays one word of the line.

// A word of the line: in single quotes unless it needs none.
const quoted = (text) => (/^[A-Za-z0-9_./:=@%+-]+$/.test(text) ? text : `'${text.replaceAll("'", `'\\''`)}'`);

// curl reads a file's name up to ';' or ','; in double quotes it reads all of it, with '"' and '\' escaped. './' keeps
// '-' from meaning standard input.
function fileWord(name) {
  if (/^[A-Za-z0-9_][A-Za-z0-9_.-]*$/.test(name)) return `image=@${name}`;
  return `image=@"./${name.replaceAll("\\", "\\\\").replaceAll('"', '\\"')}"`;
}

// `keys`: the service wants one, which the shell's $TOKEN holds.
export function curlLine({ address, file, fields, accept, out, keys }) {
  const parts = ["curl -sS --fail-with-body", `-F ${quoted(fileWord(file))}`];
  for (const [name, value] of Object.entries(fields)) {
    // `-F` would read a leading '@' or '<', and a ';', as its own.
    const plain = /^[A-Za-z0-9_.*+ -]*$/.test(String(value));
    parts.push(`${plain ? "-F" : "--form-string"} ${quoted(`${name}=${value}`)}`);
  }
  parts.push(`-H ${quoted(`Accept: ${accept}`)}`);
  if (keys) parts.push('-H "Authorization: Bearer $TOKEN"');
  parts.push(`-o ${quoted(out)}`, quoted(address));
  return parts.join(" \\\n  ");
}
