/* SPDX-License-Identifier: MIT */
/* A page with the map of a region: one file, nothing loaded, readable in light and dark. */
#include "cli.h"

#define COLUMNS 64
#define CELL 12 /* of which GAP is left free */
#define GAP 2

static const char *const colours[NR_CELLS] = {"transparent", "var(--free)", "var(--some)",
	"var(--lent)", "var(--taken)", "var(--part)", "var(--busy)"};

static const char head[] =
	"<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n"
	"<meta name=\"viewport\" content=\"width=device-width\">\n"
	"<style>\n"
	":root{color-scheme:light "
	"dark;--free:#d9dde3;--some:#a9cbe8;--lent:#3b82c4;--taken:#d9622b;"
	"--part:#eaa27d;--busy:#8f5bb5}\n"
	"@media(prefers-color-scheme:dark){:root{--free:#3a3f47;--some:#2f5677;--lent:#4a9be0;"
	"--taken:#ef7d45;--part:#9c5836;--busy:#b184d6}}\n"
	"body{font:16px/1.5 system-ui,sans-serif;max-width:820px;margin:2em auto;padding:0 1em}\n"
	"svg{width:100%;height:auto}i{display:inline-block;width:.9em;height:.9em;margin:0 .3em 0 "
	"1em}"
	"\ntd{padding:.1em 1em .1em 0}\n"
	"</style>\n";

static void escape(FILE *out, const char *text)
{
	for (; *text; text++) {
		switch (*text) {
		case '<':
			fputs("&lt;", out);
			break;
		case '>':
			fputs("&gt;", out);
			break;
		case '&':
			fputs("&amp;", out);
			break;
		case '"':
			fputs("&quot;", out);
			break;
		default:
			fputc(*text, out);
		}
	}
}

/* Equal neighbours in a row are one rectangle. */
static void draw(FILE *out, const char *title, const struct picture *picture)
{
	size_t rows = (picture->nr + COLUMNS - 1) / COLUMNS;

	fprintf(out, "<h2>%s</h2>\n<svg viewBox=\"0 0 %d %zu\" role=\"img\" aria-label=\"%s\">\n",
		title, COLUMNS * CELL, rows * CELL, title);
	for (size_t i = 0, n; i < picture->nr; i += n) {
		unsigned char cell = picture->cells[i];

		for (n = 1;
			i + n < picture->nr && (i + n) % COLUMNS && picture->cells[i + n] == cell;)
			n++;
		fprintf(out,
			"<rect x=\"%zu\" y=\"%zu\" width=\"%zu\" height=\"%d\" "
			"style=\"fill:%s\"><title>%s: %zu MiB at %zu MiB</title></rect>\n",
			i % COLUMNS * CELL, i / COLUMNS * CELL, n * CELL - GAP, CELL - GAP,
			colours[cell], picture_names[cell], n * 2, i * 2);
	}
	fputs("</svg>\n", out);
}

static void row(FILE *out, const char *label, uint64_t bytes)
{
	char text[CLI_SIZE_TEXT];

	fprintf(out, "<tr><td>%s</td><td>%s</td></tr>\n", label, cli_size_text(bytes, text));
}

int html_write(
	FILE *out, const json_t *answer, const struct picture *area, const struct picture *spill)
{
	fputs(head, out);
	fputs("<title>Contig: ", out);
	escape(out, cli_string(answer, "name"));
	fputs("</title></head><body>\n<h1>Region ", out);
	escape(out, cli_string(answer, "name"));
	fputs("</h1>\n<table>\n", out);
	row(out, "Region", cli_u64(answer, "area.frames") * CTG_PAGE_SIZE);
	row(out, "Lent", cli_u64(answer, "area.lent") * CTG_PAGE_SIZE);
	row(out, "Taken", cli_u64(answer, "area.allocated") * CTG_PAGE_SIZE);
	row(out, "Free", cli_u64(answer, "area.free") * CTG_PAGE_SIZE);
	row(out, "Longest free run", cli_u64(answer, "area.longest_free") * CTG_PAGE_SIZE);
	row(out, "Displaced", cli_u64(answer, "spill_used_bytes"));
	fputs("</table>\n<p>A square is 2 MiB.", out);
	for (unsigned i = CELL_FREE; i < NR_CELLS; i++)
		fprintf(out, "<i style=\"background:%s\"></i>%s", colours[i], picture_names[i]);
	fputs("</p>\n", out);
	draw(out, "The region", area);
	if (spill->nr)
		draw(out, "Displaced memory", spill);
	fputs("</body></html>\n", out);
	return fflush(out) != 0 || ferror(out);
}
