"""Style sheet and script of the report's page."""

STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #566273; --line: #d9dee6; --ground: #ffffff; --card: #f6f8fb;
  --good: #1a7f4b; --bad: #a84c05; --mark: #fdf3e6; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7ecf3; --soft: #9aa7b8; --line: #303a47; --ground: #12171e;
  --card: #1a212b; --good: #5fd49a; --bad: #f0a35e; --mark: #2b2417; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .6rem; }
p { margin: .3rem 0; max-width: 46rem; overflow-wrap: anywhere; } .soft { color: var(--soft); }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .7rem; margin: 1.2rem 0; }
.fact { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .6rem .8rem; }
.fact b { display: block; font-size: 1.25rem; } .fact span { color: var(--soft); font-size: .85rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .92rem; }
.wide:focus-visible { outline: 2px solid var(--good); }
caption { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
th, td { text-align: left; padding: .35rem .9rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th:last-child, td:last-child { padding-right: 0; }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.name { overflow-wrap: anywhere; min-width: 9rem; } td.short { white-space: nowrap; }
tr.chosen td { font-weight: 600; background: var(--mark); } .within { color: var(--good); }
.outside, .failed, .no { color: var(--bad); }
code, pre { font: .85rem/1.45 ui-monospace, monospace; overflow-wrap: anywhere; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .8rem;
  white-space: pre-wrap; }
summary { cursor: pointer; padding: .4rem 0; } figure { margin: 0; min-width: 0; }
figcaption { font-size: .88rem; color: var(--soft); overflow-wrap: anywhere; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(19rem, 100%), 1fr)); gap: 1.4rem 1rem; }
@media print { :root { --ink: #000; --soft: #444; --line: #bbb; --ground: #fff; --card: #fff; --good: #1a7f4b;
  --bad: #a84c05; --mark: #eee; } main { padding: 0; max-width: none; } .wide { overflow: visible; }
  h2 { break-after: avoid; } figure, tr { break-inside: avoid; } }
"""

# Charts stay data until the page is laid out, so that each knows the room it has. On paper they are always light.
SCRIPT = """
(() => {
  const dark = matchMedia('(prefers-color-scheme: dark)');
  const plots = [];
  function coloured(layout, night) {
    const line = night ? '#303a47' : '#d9dee6';
    layout.font.color = night ? '#e7ecf3' : '#1c2430';
    for (const name of Object.keys(layout).filter(name => /^[xy]axis/.test(name)))
      Object.assign(layout[name], {gridcolor: line, zerolinecolor: line, linecolor: line});
    return layout;
  }
  function draw(night) {
    for (const [plot, figure] of plots)
      Plotly.react(plot, figure.data, coloured(structuredClone(figure.layout), night),
        {displayModeBar: false, responsive: true});
  }
  for (const plot of document.querySelectorAll('.plot'))
    plots.push([plot, JSON.parse(document.getElementById(plot.id + '-data').textContent)]);
  draw(dark.matches);
  dark.addEventListener('change', () => draw(dark.matches));
  addEventListener('beforeprint', () => draw(false));
  addEventListener('afterprint', () => draw(dark.matches));
})();
"""
