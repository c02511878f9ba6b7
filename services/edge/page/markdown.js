// The part of Markdown that models write, as DOM nodes, while it is still being written. Text only ever becomes
// text nodes, and a link only http or https: nothing the model says can become markup or script. A full
// implementation is a library's work; what is not known here is shown as it was written.

const DEPTH_MAX = 6; // lists in lists, bold in links: deeper is shown as text
const SPAN_CHARS_MAX = 1_000; // emphasis, code span or link text longer than this is shown as text
const INLINE_CHARS_MAX = 20_000; // a paragraph longer than this is shown without inline formatting

// Blocks

const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*))?$/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}> ?(.*)$/;
const ITEM = /^( {0,12})([-*+]|\d{1,9}[.)])(?:[ \t]+(.*))?$/;
const DELIMITERS = /^[ \t]*\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;

/** The blocks of `text` in order, each with `type` and the offset `start` of its first line. */
export function blocks(text, depth = 0) {
  const lines = text.split("\n");
  const found = [];
  let offset = 0;
  for (let at = 0; at < lines.length; ) {
    const [block, next] = blank(lines[at]) ? [null, at + 1] : blockAt(lines, at, depth);
    if (block) found.push({ ...block, start: offset });
    while (at < next) offset += lines[at++].length + 1;
  }
  return found;
}

function blockAt(lines, at, depth) {
  const line = lines[at];
  let match;
  if ((match = FENCE.exec(line))) return codeAt(lines, at, match);
  if ((match = HEADING.exec(line))) {
    const content = (match[2] ?? "").trimEnd().replace(/(^|[ \t])#+$/, "");
    return [{ type: "heading", level: match[1].length, content }, at + 1];
  }
  if (RULE.test(line)) return [{ type: "rule" }, at + 1];
  if (depth < DEPTH_MAX) {
    if (QUOTE.test(line)) return quoteAt(lines, at, depth);
    if (ITEM.test(line)) return listAt(lines, at, depth);
  }
  if (tableStarts(lines, at)) return tableAt(lines, at);
  let next = at + 1;
  while (next < lines.length && !interrupts(lines, next)) next += 1;
  const content = lines.slice(at, next).map((part) => part.trimStart()).join("\n");
  return [{ type: "paragraph", content }, next];
}

function interrupts(lines, at) {
  const line = lines[at];
  if (blank(line) || FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line)) return true;
  const item = ITEM.exec(line);
  if (item?.[3] && (/^[-*+]$/.test(item[2]) || /^1[.)]$/.test(item[2]))) return true;
  return tableStarts(lines, at);
}

function codeAt(lines, at, [, fence, info]) {
  const closing = new RegExp(`^ {0,3}${fence[0]}{${fence.length},}[ \\t]*$`);
  let next = at + 1;
  while (next < lines.length && !closing.test(lines[next])) next += 1;
  const language = info.trim().split(/\s/)[0];
  const code = { type: "code", language, content: lines.slice(at + 1, next).join("\n") };
  return [code, Math.min(next + 1, lines.length)];
}

function quoteAt(lines, at, depth) {
  const inner = [];
  let next = at;
  for (let match; next < lines.length && (match = QUOTE.exec(lines[next])); next += 1) inner.push(match[1]);
  return [{ type: "quote", blocks: blocks(inner.join("\n"), depth + 1) }, next];
}

function listAt(lines, at, depth) {
  const [, margin, firstMarker] = ITEM.exec(lines[at]);
  const ordered = /\d/.test(firstMarker);
  const items = [];
  let next = at;
  for (; next < lines.length; next += 1) {
    const line = lines[next];
    const match = ITEM.exec(line);
    const indent = line.length - line.trimStart().length;
    if (match && match[1].length < margin.length + 2) {
      if (RULE.test(line) || /\d/.test(match[2]) !== ordered || match[1].length < margin.length) break;
      items.push([match[3] ?? ""]);
    } else if (blank(line)) {
      const after = lines.slice(next + 1, next + 3).find((later) => !blank(later));
      if (after === undefined) continue;
      const nested = after.length - after.trimStart().length > margin.length + 1;
      if (!nested && !(ITEM.test(after) && /^\s*\d/.test(after) === ordered && !RULE.test(after))) break;
      items.at(-1).push("");
    } else if (indent > margin.length + 1) {
      const content = margin.length + firstMarker.length + 1;
      items.at(-1).push(line.slice(Math.min(indent, content)));
    } else if (blank(lines[next - 1]) || interrupts(lines, next)) break;
    else items.at(-1).push(line);
  }
  const list = {
    type: "list",
    ordered,
    first: ordered ? parseInt(firstMarker, 10) : 1,
    items: items.map((inner) => blocks(inner.join("\n"), depth + 1)),
  };
  return [list, next];
}

function tableStarts(lines, at) {
  const [head, delimiters] = [lines[at], lines[at + 1] ?? ""];
  return (
    head.includes("|") &&
    delimiters.includes("|") &&
    DELIMITERS.test(delimiters) &&
    cells(head).length === cells(delimiters).length
  );
}

function tableAt(lines, at) {
  let next = at + 2;
  while (next < lines.length && lines[next].includes("|")) next += 1;
  const sides = { ":-:": "center", "-:": "right" };
  const align = cells(lines[at + 1]).map((cell) => sides[cell.replace(/-+/, "-")] ?? "");
  return [{ type: "table", head: cells(lines[at]), align, rows: lines.slice(at + 2, next).map(cells) }, next];
}

function cells(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "");
  return inner.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function blank(line) {
  return line.trim() === "";
}

// Inline

const SPECIAL = /[\\`*_~[<]|!\[|https?:\/\/| {2,}\n/g;
const CODE = /(`+)(?!`)([\s\S]{1,1000}?)(?<!`)\1(?!`)/y;
const LINK = /!?\[([^[\]\n]{1,1000})\]\(<?([^\s()<>]{1,2000}(?:\([^\s()<>]{0,1000}\)[^\s()<>]{0,1000})?)>?(?:[ \t]+"[^"\n]{0,500}")?\)/y;
const ANGLED = /<(https?:\/\/[^\s<>]{1,2000})>/y;
const BARE = /https?:\/\/[^\s<>"`|]{0,2000}[^\s<>"`|.,;:!?'*_~)\]]/y;
const SPANS = [
  ["strong", "\\*\\*(?=[^\\s*])", "(?<=\\S)\\*\\*(?!\\*)"],
  ["strong", "\\*\\*(?=\\*[^\\s*])", "(?<=\\S)\\*\\*(?!\\*)"],
  ["strong", "(?<![\\p{L}\\p{N}_])__(?=[^\\s_])", "(?<=\\S)__(?![\\p{L}\\p{N}_])"],
  ["em", "\\*(?![\\s*])", "(?<![\\s*])\\*(?!\\*)"],
  ["em", "(?<![\\p{L}\\p{N}_])_(?![\\s_])", "(?<![\\s_])_(?![\\p{L}\\p{N}_])"],
  ["del", "~~(?=[^\\s~])", "(?<=\\S)~~"],
].map(([tag, open, close]) => ({
  tag,
  whole: new RegExp(`${open}([\\s\\S]{1,${SPAN_CHARS_MAX}}?)${close}`, "uy"),
  unfinished: new RegExp(`${open}([\\s\\S]{1,${SPAN_CHARS_MAX}})$`, "uy"),
}));
const UNFINISHED_CODE = /(`+)([^`]{1,1000})$/y;
const UNFINISHED_LINK = /!?\[([^[\]\n]{1,1000})\]?(?:\([^\s)]{0,2000})?$/y;
const UNFINISHED_MARK = /(?:^|(?<=\s))[*_~`!]{1,3}$|(?<=\S)[*_~`]{1,2}$/;

/** Appends `text` to `parent` with its inline formatting; `live`: more of it may come, so what is open stays open. */
function inline(parent, text, live, depth = 0) {
  if (depth > DEPTH_MAX || text.length > INLINE_CHARS_MAX) {
    parent.append(text);
    return;
  }
  if (live) text = text.replace(UNFINISHED_MARK, "");
  let plain = "";
  let at = 0;
  const flush = () => {
    if (plain) parent.append(plain);
    plain = "";
  };
  const nest = (node, content, open) => {
    flush();
    inline(node, content, open, depth + 1);
    parent.append(node);
  };
  const match = (pattern) => {
    pattern.lastIndex = at;
    return pattern.exec(text);
  };
  for (;;) {
    SPECIAL.lastIndex = at;
    const special = SPECIAL.exec(text);
    if (!special) break;
    plain += text.slice(at, special.index);
    at = special.index;
    const end = spanAt(special[0]);
    if (end > at) at = end;
    else {
      plain += special[0];
      at += special[0].length;
    }
  }
  plain += text.slice(at);
  flush();

  // Draws what starts at `at` and says where it ends; `at` itself where nothing does.
  function spanAt(mark) {
    let found;
    if (mark === "\\") {
      const next = text[at + 1] ?? "";
      if (next === "\n") nest(document.createElement("br"), "", false);
      else if (/[!-/:-@[-`{-~]/.test(next)) plain += next;
      else return at;
      return at + 2;
    }
    if (mark.endsWith("\n")) {
      nest(document.createElement("br"), "", false);
      return at + mark.length;
    }
    if (mark === "`") {
      if (!(found = match(CODE) ?? (live && match(UNFINISHED_CODE)))) {
        const run = /`+/y;
        run.lastIndex = at;
        const ticks = run.exec(text)[0];
        plain += ticks; // a run of backticks with no partner is no opening for a part of itself
        return at + ticks.length;
      }
      const code = document.createElement("code");
      code.textContent = found[2].replace(/^ (.*\S.*) $/s, "$1");
      flush();
      parent.append(code);
      return at + found[0].length;
    }
    if (mark === "[" || mark === "![") {
      if ((found = match(LINK))) {
        const node = link(found[2]);
        if (!node) return at;
        nest(node, found[1], false);
      } else if (live && (found = match(UNFINISHED_LINK))) nest(document.createElement("span"), found[1], false);
      else return at;
      return at + found[0].length;
    }
    if (mark === "<" || mark.startsWith("http")) {
      const node = (found = match(mark === "<" ? ANGLED : BARE)) && link(found[1] ?? found[0]);
      if (!node) return at;
      node.textContent = found[1] ?? found[0];
      flush();
      parent.append(node);
      return at + found[0].length;
    }
    for (const { tag, whole, unfinished } of SPANS) {
      const closed = match(whole);
      if ((found = closed ?? (live && match(unfinished)))) {
        nest(document.createElement(tag), found[1], live && !closed);
        return at + found[0].length;
      }
    }
    return at;
  }
}

/** An anchor for `address`, or null where it is not an absolute http or https address. */
function link(address) {
  let url;
  try {
    url = new URL(address);
  } catch {
    return null;
  }
  if (url.protocol !== "https:" && url.protocol !== "http:") return null;
  const anchor = document.createElement("a");
  anchor.href = url.href;
  anchor.rel = "noopener noreferrer nofollow";
  anchor.target = "_blank";
  return anchor;
}

// Drawing

const DRAW = {
  paragraph: ({ content }, live) => inlined("p", content, live),
  heading: ({ level, content }, live) => inlined(`h${Math.min(level + 2, 6)}`, content, live),
  rule: () => document.createElement("hr"),
  quote: (block, live) => nested("blockquote", block.blocks, live),

  code({ language, content }) {
    const pre = document.createElement("pre");
    const code = document.createElement("code");
    if (language) pre.dataset.language = language;
    pre.tabIndex = 0; // it scrolls, so the keyboard must reach it
    code.append(content);
    pre.append(code);
    return pre;
  },

  list({ ordered, first, items }, live) {
    const list = document.createElement(ordered ? "ol" : "ul");
    if (ordered && first !== 1) list.start = first;
    items.forEach((item, at) => {
      const node = document.createElement("li");
      const open = live && at === items.length - 1;
      item.forEach((block, index) => {
        const last = open && index === item.length - 1;
        if (index === 0 && block.type === "paragraph") inline(node, block.content, last);
        else node.append(draw(block, last));
      });
      list.append(node);
    });
    return list;
  },

  table({ head, align, rows }) {
    const frame = document.createElement("div");
    frame.className = "table";
    frame.tabIndex = 0;
    const table = document.createElement("table");
    const row = (section, tag, content) => {
      const line = section.insertRow();
      head.forEach((_, at) => {
        const cell = inlined(tag, content[at] ?? "", false);
        if (align[at]) cell.classList.add(align[at]);
        line.append(cell);
      });
    };
    row(table.createTHead(), "th", head);
    const body = table.createTBody();
    rows.forEach((cells) => row(body, "td", cells));
    frame.append(table);
    return frame;
  },

  unfinishedTable({ rows }) {
    const note = document.createElement("p");
    note.className = "unfinished";
    note.textContent = rows ? `Table, ${rows} ${rows === 1 ? "row" : "rows"} so far…` : "Table…";
    return note;
  },
};

function draw(block, live) {
  const shown = live ? held(block) : block;
  return DRAW[shown.type](shown, live);
}

/** A table is not drawn before it is complete, nor the header line that will become one. */
function held(block) {
  if (block.type === "table") return { type: "unfinishedTable", rows: Math.max(block.rows.length - 1, 0) };
  if (block.type === "paragraph" && /^\|/.test(block.content)) return { type: "unfinishedTable", rows: 0 };
  return block;
}

function inlined(tag, content, live) {
  const node = document.createElement(tag);
  inline(node, content, live);
  return node;
}

function nested(tag, inner, live) {
  const node = document.createElement(tag);
  inner.forEach((block, at) => node.append(draw(block, live && at === inner.length - 1)));
  return node;
}

/** The nodes of a finished text. */
export function markdown(text) {
  return blocks(text).map((block) => draw(block, false));
}

/**
 * Keeps `container` showing a text that grows: returns `update(text, live)`. More text can change only the last
 * block, so only that is drawn again; any other text is drawn anew.
 */
export function progressive(container) {
  let head = ""; // the text whose blocks are drawn for good
  let drawn = 0; // how many nodes that made
  let shown = "";
  let wasLive = null;
  return function update(text, live) {
    if (text === shown && live === wasLive) return;
    [shown, wasLive] = [text, live];
    if (!text.startsWith(head)) {
      head = "";
      drawn = 0;
    }
    const fresh = blocks(text.slice(head.length));
    const tail = [...container.childNodes].slice(drawn);
    if (fresh.length === 1 && tail.length === 1 && continues(tail[0], fresh[0])) {
      tail[0].firstChild.firstChild.data = fresh[0].content;
      return;
    }
    tail.forEach((node) => node.remove());
    fresh.forEach((block, at) => container.append(draw(block, live && at === fresh.length - 1)));
    if (settled(text.slice(head.length), fresh)) {
      head = text.slice(0, head.length + fresh.at(-1).start);
      drawn = container.childNodes.length - 1;
    }
  };
}

/** Whether `node` shows the beginning of this code block: changed in place, it keeps its scroll and selection. */
function continues(node, block) {
  return block.type === "code" && node.tagName === "PRE" && (node.dataset.language ?? "") === block.language;
}

/** Whether the blocks before the last one will stay as they are, whatever comes. */
function settled(text, fresh) {
  if (fresh.length < 2) return false;
  const [before, last] = fresh.slice(-2);
  if (text.includes("\n", last.start)) return true;
  if (!/\n[ \t]*\n$/.test(text.slice(before.start, last.start))) return false; // may yet join the block before
  return before.type !== "list" || !/^\s*\d{0,9}[.)]?$/.test(text.slice(last.start)); // may yet be an item
}
