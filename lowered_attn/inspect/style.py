"""The look of the page: one style sheet, light and dark, from a phone's width up."""

CSS = """
:root { color-scheme: light dark; --text: #1f2328; --soft: #57606a; --back: #ffffff; --panel: #f6f8fa; --line: #d0d7de;
  --accent: #0550ae; --good: #116329; --bad: #a40e26; --added: #dafbe1; --removed: #ffebe9; --fused: #fff3bf;
  --match: #ddf4ff; --match-line: #0969da }
@media (prefers-color-scheme: dark) { :root { --text: #e6edf3; --soft: #9da7b3; --back: #0d1117; --panel: #161b22;
  --line: #30363d; --accent: #79c0ff; --good: #7ee787; --bad: #ffa198; --added: #12351f; --removed: #4a1a1d;
  --fused: #4b3a00; --match: #0c2d50; --match-line: #58a6ff } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 76rem; padding: 1.25rem; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.5rem; margin: 0 0 .25rem } h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem } h3 { font-size: 1rem }
p { margin: .4rem 0 } code, pre { font: 13px/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace }
a { color: var(--accent) } :focus-visible { outline: 3px solid var(--match-line); outline-offset: 2px }
.skip { position: absolute; left: -999rem } .skip:focus { position: static }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1rem; padding: 0; list-style: none }
.soft { color: var(--soft) } .verdict { font-size: 1.1rem; font-weight: 600 }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; background: var(--panel);
  margin: .5rem 0 }
pre { margin: 0; padding: .6rem 0; width: max-content; min-width: 100% }
pre span { display: block; padding: 0 .8rem; min-height: 1.45em; white-space: pre; border-left: 4px solid transparent }
.added { background: var(--added) } .removed { background: var(--removed) } .gap { color: var(--soft) }
.fused { background: var(--fused) } .matched { border-left-color: var(--match-line); font-weight: 600 }
.matched:not(.added):not(.removed) { background: var(--match) }
table { border-collapse: collapse; width: 100% } caption { text-align: left; color: var(--soft); padding: .5rem .7rem }
th, td { text-align: left; vertical-align: top; padding: .4rem .7rem; border-top: 1px solid var(--line) }
th { overflow-wrap: normal } td code { white-space: nowrap }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap } td { min-width: 5.5rem }
.stage { font-weight: 600; white-space: nowrap } td:last-child { min-width: 12rem }
.stage.refused { color: var(--bad) } .stage.lowered, .stage.recognised, .stage.fused { color: var(--good) }
details { margin: .6rem 0 } summary { cursor: pointer; padding: .3rem 0 } figure { margin: .8rem 0 }
figure svg { max-width: 100%; height: auto } .roof text { font: 12px system-ui, sans-serif; fill: var(--text) }
.roof .axis { stroke: var(--soft); stroke-width: 1 } .roof .limit { stroke: var(--accent); stroke-width: 2; fill: none }
.roof .point { fill: var(--bad) }
@media (max-width: 40rem) { body { padding: .8rem } figure .scroll svg { max-width: none } }
"""
