// Read the items of a file: a JSON list, JSON Lines, or CSV with a line of names.

/** Return the records of a file; an Error if it has another format. */
export function parseRecords(text, name) {
  const content = text.replace(/^\uFEFF/, "").trim();
  const records = /\.csv$/i.test(name) ? parseCsv(content) : parseJson(content);
  if (!records.length) throw new Error("The file holds no items.");
  const odd = records.findIndex((each) => typeof each !== "object" || each === null || Array.isArray(each));
  if (odd >= 0) throw new Error(`Record ${odd + 1} of the file is not an object with the fields of an item.`);
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

/** Parse CSV with commas or semicolons; fields in double quotes may hold them, line breaks and doubled quotes. */
function parseCsv(content) {
  const [head] = content.split(/\r\n?|\n/, 1);
  const separator = head.includes(";") && !head.includes(",") ? ";" : ",";
  const field = new RegExp(`("[^"]*(?:""[^"]*)*"|[^"${separator}\\r\\n]*)(${separator}|\\r\\n?|\\n|$)`, "y");
  const rows = [[]];
  while (field.lastIndex < content.length) {
    const start = field.lastIndex;
    const match = field.exec(content);
    if (!match) throw new Error(`Line ${lineAt(content, start)} of the CSV file has an unexpected or unclosed quote.`);
    const [, value, end] = match;
    rows.at(-1).push(value.startsWith('"') ? value.slice(1, -1).replaceAll('""', '"') : value);
    if (end && end !== separator) rows.push([]);
  }
  if (content.endsWith(separator)) rows.at(-1).push("");
  const [names, ...lines] = rows.filter((row) => row.length > 1 || row[0]).map((row) => row.map((value) => value.trim()));
  if (!names) return [];
  if (new Set(names).size < names.length) throw new Error("The CSV file names a column twice.");
  return lines.map((line, index) => record(names, line, index + 2));
}

function record(names, line, number) {
  if (line.length !== names.length) {
    throw new Error(`Row ${number} of the CSV file has ${line.length} fields; the first row has ${names.length}.`);
  }
  return Object.fromEntries(names.map((name, index) => [name, line[index]]).filter(([, value]) => value !== ""));
}

function lineAt(content, index) {
  return content.slice(0, index).split(/\r\n?|\n/).length;
}

/** Return the text of a file in UTF-8, or else in Windows-1252. */
export function textOf(bytes) {
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(bytes);
  } catch {
    return new TextDecoder("windows-1252").decode(bytes);
  }
}
