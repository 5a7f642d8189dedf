"""The page of a report: a Jinja2 template with its style, in one text, so that the page needs no other file."""

STYLE = """
:root { color-scheme: light dark;
  --ink: #1f2430; --muted: #68707f; --paper: #fdfdfc; --band: #f1f3f6; --rule: #d9dde3; --link: #0959a3;
  --series-1: #0969b3; --series-2: #b5480b; --series-3: #16784a; --series-4: #7a3fa8;
  --series-5: #8a6a00; --series-6: #b0255f; --series-7: #00727d; --series-8: #5b5f66; }
@media (prefers-color-scheme: dark) { :root {
  --ink: #e8eaee; --muted: #a2a9b6; --paper: #15181d; --band: #20242b; --rule: #3a404a; --link: #7fbdf5;
  --series-1: #62b0f0; --series-2: #f39a63; --series-3: #5fcb94; --series-4: #c79bea;
  --series-5: #dcb94a; --series-6: #f082ac; --series-7: #4fc6d0; --series-8: #b4b9c2; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.25rem 1rem 4rem; max-width: 68rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; padding-top: .75rem; border-top: 1px solid var(--rule); }
p { margin: .5rem 0; max-width: 44rem; }
a { color: var(--link); }
.lead, figcaption, .note { color: var(--muted); }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1rem; padding: 0; margin: .75rem 0 0; list-style: none; }
nav a { display: inline-block; padding: .35rem 0; }
dl.numbers { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .6rem; margin: 1rem 0; }
dl.numbers div { background: var(--band); border-radius: .5rem; padding: .6rem .75rem; min-width: 0; }
dt { color: var(--muted); font-size: .85rem; }
dd { margin: 0; font-size: 1.15rem; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem 2rem; }
figure { margin: .75rem 0; min-width: 0; }
figure svg { display: block; width: 100%; height: auto; max-width: 31rem; }
figcaption { font-size: .9rem; max-width: 31rem; }
.scroll { overflow-x: auto; margin: .5rem 0; }
.scroll:focus-visible, summary:focus-visible, a:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--muted); padding-bottom: .25rem; }
th, td { padding: .3rem .75rem .3rem 0; text-align: right; vertical-align: top; border-bottom: 1px solid var(--rule); }
th { font-weight: 600; vertical-align: bottom; }
.text { text-align: left; }
.name { text-align: left; white-space: nowrap; font: .85em ui-monospace, "DejaVu Sans Mono", monospace; }
.sentence { text-align: left; min-width: 16rem; }
@media (max-width: 40rem) { /* a row is a block: its name, and each number after its title */
  table, caption, tbody, tr { display: block; }
  thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  tr { padding: .4rem 0; border-bottom: 1px solid var(--rule); }
  td { display: inline-block; padding: 0 .9rem 0 0; border: 0; text-align: left; overflow-wrap: anywhere; }
  td.name, td.sentence { display: block; min-width: 0; white-space: normal; }
  td::before { content: attr(data-label) " "; color: var(--muted); font: .85em system-ui, sans-serif; }
  td.name::before { content: none; } }
details { margin: .5rem 0; }
summary { cursor: pointer; padding: .4rem 0; color: var(--link); }
"""

PAGE = """
{%- macro figure(picture) -%}
<figure>{{ picture.svg | safe }}<figcaption>{{ picture.title }}.</figcaption></figure>
{%- endmacro -%}
{%- macro table(table) -%}
{% if table.folds %}<details><summary>{{ table.title }} ({{ table.rows | length }} rows)</summary>{% endif %}
<div class="scroll" tabindex="0" role="region" aria-label="{{ table.title }}"><table>
<caption>{{ table.title }}</caption>
<thead><tr>{% for title, style in table.columns %}
<th scope="col"{% if style %} class="{{ style }}"{% endif %}>{{ title }}</th>{% endfor %}
</tr></thead>
<tbody>{% for row in table.rows %}<tr>{% for cell in row %}{% set style = table.columns[loop.index0][1] %}
<td data-label="{{ table.columns[loop.index0][0] }}"{% if style %} class="{{ style }}"{% endif %}>{{ cell }}</td>
{%- endfor %}</tr>
{% endfor %}</tbody></table></div>
{% if table.folds %}</details>{% endif %}
{%- endmacro -%}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
{% if refresh %}<meta http-equiv="refresh" content="{{ refresh }}">
{% endif %}<title>{{ title }}</title>
<style>{{ style | safe }}</style>
</head>
<body>
<header>
<h1>{{ title }}</h1>
<p class="lead">{{ lead }}</p>
<nav aria-label="Sections"><ul>
{% for section in sections %}<li><a href="#{{ section.key }}">{{ section.title }}</a></li>
{% endfor %}</ul></nav>
</header>
<main>
<dl class="numbers">
{% for name, value in numbers %}<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>
{% endfor %}</dl>
{% for section in sections %}
<section aria-labelledby="{{ section.key }}">
<h2 id="{{ section.key }}">{{ section.title }}</h2>
{% for paragraph in section.paragraphs %}<p>{{ paragraph }}</p>
{% endfor %}
{% if section.pictures %}<div class="figures">
{% for picture in section.pictures %}{{ figure(picture) }}
{% endfor %}</div>
{% endif %}
{% for content in section.tables %}{{ table(content) }}
{% endfor %}
</section>
{% endfor %}
</main>
</body>
</html>
"""
