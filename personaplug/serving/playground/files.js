// Read the items of a file: a JSON list, JSON Lines, or CSV with a line of names.

/** Return the records of a file; an Error if it has another format. */
export function parseRecords(text, name) {
  const content = text.replace(/^\uFEFF/, "").trim();
  const records = /\.csv$/i.test(name) ? parseCsv(content) : parseJson(content);
  if (!records.length) throw new Error("The file holds no items.");
  return records;
}

function parseJson(content) {
  try {
    if (content.startsWith("[")) return JSON.parse(content);
    return content.split("\n").filter((line) => line.trim()).map((line) => JSON.parse(line));
  } catch {
    throw new Error("The file is not JSON. Expected a JSON list, one JSON object per line, or a .csv file.");
  }
}

/** Parse CSV with commas; fields in double quotes may hold commas, line breaks and doubled quotes. */
function parseCsv(content) {
  const rows = [[]];
  const pattern = /("(?:[^"]|"")*"|[^",\r\n]*)(,|\r?\n|$)/y;
  while (pattern.lastIndex < content.length) {
    const match = pattern.exec(content);
    if (!match) throw new Error("The CSV file has a quote in an unexpected place.");
    const [, value, end] = match;
    rows.at(-1).push(value.startsWith('"') ? value.slice(1, -1).replaceAll('""', '"') : value);
    if (end && end !== ",") rows.push([]);
  }
  if (content.endsWith(",")) rows.at(-1).push("");
  const [names, ...lines] = rows.filter((row) => row.length > 1 || row[0]);
  return lines.map((line) => {
    if (line.length !== names.length) throw new Error(`The CSV file has a line with ${line.length} fields instead of ${names.length}.`);
    return Object.fromEntries(names.map((key, index) => [key.trim(), line[index]]).filter(([, value]) => value !== ""));
  });
}
