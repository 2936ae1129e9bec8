# SPDX-License-Identifier: MIT
"""What the demo shows: maps and a table, on the terminal and as a page."""

import html

MIB = 1 << 20
BLOCK_FRAMES = 512
ROW = 64  # blocks of 2 MiB in a row: 128 MiB
CELLS = [("free", ".", "free"), ("some", "-", "lent, less than half"), ("lent", "+", "lent"),
         ("taken", "#", "taken"), ("part", "%", "taken in part"), ("busy", "!", "being taken")]
CHARS = {name: char for name, char, _text in CELLS}
CHARS["hole"] = " "
TEXTS = {name: text for name, _char, text in CELLS}
STYLE = """
:root{color-scheme:light dark;--free:#d9dde3;--some:#a9cbe8;--lent:#3b82c4;--taken:#d9622b;
--part:#eaa27d;--busy:#8f5bb5;--line:#ccd}
@media(prefers-color-scheme:dark){:root{--free:#3a3f47;--some:#2f5677;--lent:#4a9be0;
--taken:#ef7d45;--part:#9c5836;--busy:#b184d6;--line:#445}}
body{font:16px/1.5 system-ui,sans-serif;max-width:860px;margin:2em auto;padding:0 1em}
svg{width:100%;height:auto}i{display:inline-block;width:.9em;height:.9em;margin:0 .3em 0 1em}
table{border-collapse:collapse}td,th{padding:.2em .8em;text-align:right;
border-bottom:1px solid var(--line)}td:first-child,th:first-child{text-align:left}
"""


def cells(answer):
    """What each 2 MiB block of the area is, from the answer of `contig map --json`."""
    result, expected = [], None
    blocks = answer["blocks"]["area"]
    for pfn, free, taken, in_use, isolated in zip(blocks["pfn"], blocks["free"], blocks["taken"],
                                                  blocks["in_use"], blocks["isolated"]):
        if expected not in (None, pfn):
            result.append("hole")  # however long it is
        expected = pfn + BLOCK_FRAMES
        whole = free + taken + in_use
        if whole == 0:
            result.append("hole")
        elif taken:
            result.append("taken" if taken == whole else "part")
        elif isolated:
            result.append("busy")
        elif in_use == 0:
            result.append("free")
        else:
            result.append("some" if in_use * 2 < whole else "lent")
    return result


def text_map(title, answer):
    lines = [title]
    row = cells(answer)
    for at in range(0, len(row), ROW):
        lines.append(f"  {at * 2:4} MiB  " + "".join(CHARS[c] for c in row[at:at + ROW]))
    return "\n".join(lines)


def legend():
    return "  " + "   ".join(f"{char} {text}" for _name, char, text in CELLS)


def ms(ns):
    return f"{ns / 1e6:.1f}" if ns < 1e8 else f"{ns / 1e6:.0f}"


def block_text(facts):
    size = facts["bytes"] // facts["blocks"]
    unit = f"{size // MIB} MiB" if size >= MIB else f"{size // 1024} KiB"
    return f"{facts['blocks']} x {unit}"


HEADINGS = ["region", "taken", "moved", "time ms", "memcpy ms", "ratio", "stall ms"]


def table_rows(regions):
    """One row for each buffer that was taken."""
    rows = []
    for region in regions:
        for what in ("single", "bulk"):
            t = region.get(what)
            if not t:
                continue
            rows.append([region["name"], block_text(t), f"{t['frames_moved']}",
                         ms(t["ns"]), ms(t["memcpy_ns"]), f"{t['ratio']:.2f}",
                         ms(t["stall_ns"])])
    return rows


def text_table(rows):
    lines = [HEADINGS] + rows
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADINGS))]
    text = []
    for n, line in enumerate(lines):
        text.append("  " + "  ".join(word.ljust(w) if i < 2 else word.rjust(w)
                                     for i, (word, w) in enumerate(zip(line, widths))))
        if n == 0:
            text.append("  " + "  ".join("-" * w for w in widths))
    return "\n".join(text)


def memcpy_note(facts):
    return (f"memcpy: the same bytes, the best of {facts['memcpy_samples']} in this run (median "
            f"{ms(facts['memcpy_median_ns'])} ms), on {facts['cpus']} CPUs that the programs keep busy")


def svg_map(title, answer):
    cell, gap = 12, 2
    row = cells(answer)
    parts = [f"<h3>{html.escape(title)}</h3>",
             f'<svg viewBox="0 0 {ROW * cell} {(len(row) + ROW - 1) // ROW * cell}" role="img" '
             f'aria-label="{html.escape(title)}">']
    at = 0
    while at < len(row):
        n = 1
        while at + n < len(row) and (at + n) % ROW and row[at + n] == row[at]:
            n += 1
        if row[at] != "hole":
            parts.append(f'<rect x="{at % ROW * cell}" y="{at // ROW * cell}" '
                         f'width="{n * cell - gap}" height="{cell - gap}" '
                         f'style="fill:var(--{row[at]})"><title>{TEXTS[row[at]]}: {n * 2} MiB at '
                         f'{at * 2} MiB</title></rect>')
        at += n
    parts.append("</svg>")
    return "\n".join(parts)


def page(facts, maps, verdict):
    """A page by itself. maps: (title, answer) in order."""
    keys = "".join(f'<i style="background:var(--{name})"></i>{text}' for name, _c, text in CELLS)
    rows = table_rows(facts["regions"])
    head = "".join(f"<th>{h}</th>" for h in HEADINGS)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(w)}</td>" for w in row) + "</tr>"
                   for row in rows)
    notes = "".join(f"<li>{html.escape(line)}</li>" for line in verdict)
    pictures = "\n".join(svg_map(title, answer) for title, answer in maps)
    return (f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
            f'<meta name="viewport" content="width=device-width"><title>Contig demo</title>\n'
            f"<style>{STYLE}</style></head><body>\n<h1>300 MiB taken back from running programs"
            f"</h1>\n<ul>{notes}</ul>\n<table><tr>{head}</tr>{body}</table>\n"
            f"<p>{html.escape(memcpy_note(facts))}</p>\n"
            f"<p>A square is 2 MiB.{keys}</p>\n{pictures}\n</body></html>\n")
