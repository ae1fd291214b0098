"""How a report's page looks: on a wide screen, on a phone, in the dark, on paper."""

STYLE = """
:root{--ground:#fff;--card:#f6f7f9;--line:#d5d9df;--ink:#1b1f24;
--dim:#59626d;--new:#2563b8;--prompt:#d9822b;
--rest:#9aa3ad;--waited:#8e4ec6;--bad:#c2281d}
@media (prefers-color-scheme:dark){:root{
--ground:#14171b;--card:#1d2126;--line:#363d46;--ink:#e6e9ed;
--dim:#9aa4b0;--new:#6aa5f2;--prompt:#f0a35a;
--rest:#6b7480;--waited:#c193ee;--bad:#ff8a7d}}
*{box-sizing:border-box}
body{margin:0;padding:1rem;background:var(--ground);color:var(--ink);font:16px/1.5 system-ui,sans-serif;
overflow-wrap:anywhere}
header,main,footer{max-width:76rem;margin:0 auto}
h1{font-size:1.5rem;margin:.5rem 0}
h2{font-size:1.05rem;margin:0 0 .6rem}
p{margin:.3rem 0}
small,footer,.legend,.up,.along{color:var(--dim);font-size:.85rem}
main{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,30rem),1fr));gap:1rem;margin:1rem auto;align-items:start}
section{background:var(--card);border:1px solid var(--line);border-radius:.5rem;padding:1rem;min-width:0;contain:paint}
section:last-child{grid-column:1/-1}
table{border-collapse:collapse;width:100%}
th,td{padding:.2rem .6rem .2rem 0;text-align:left;vertical-align:top;font-weight:400}
th small{display:block}
tr+tr>*{border-top:1px solid var(--line)}
.names th,.bars th{color:var(--dim);white-space:nowrap;width:1%;max-width:12rem;overflow:hidden;text-overflow:ellipsis}
.terms th[scope=col]{text-align:right;white-space:nowrap;color:var(--dim)}
.number{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
.off,.bad{color:var(--bad)}
.wide{width:60%}
.bar{display:inline-block;height:.9em;background:var(--new);vertical-align:middle}
.bar.prompt{background:var(--prompt)}.bar.rest{background:var(--rest)}.bar.waited{background:var(--waited)}.bar.bad{background:var(--bad)}
.legend span{margin-right:1rem;white-space:nowrap}
.legend i{width:.9em;margin-right:.3em}
.rank{margin:.5rem 0}
.stack{display:flex;height:1.1rem;background:var(--line)}
.stack .bar{height:100%}
.thin{height:.35rem;margin-top:2px}
.chart{display:grid;grid-template-columns:auto 1fr;column-gap:.5rem}
.chart svg{width:100%;height:11rem;display:block}
.up{display:flex;flex-direction:column;justify-content:space-between;text-align:right;line-height:1;height:11rem}
.along{grid-column:2;display:flex;justify-content:space-between;margin-top:.2rem}
.grid{stroke:var(--line);vector-effect:non-scaling-stroke}
.border{stroke:var(--dim);stroke-dasharray:4;vector-effect:non-scaling-stroke}
path{fill:none;stroke-width:1.6px;stroke:var(--new);vector-effect:non-scaling-stroke}
path.prompt{stroke:var(--prompt)}
rect{fill:var(--new)}
details{border-top:1px solid var(--line);padding:.3rem 0}
summary{cursor:pointer}
pre{font:.9rem/1.45 ui-monospace,monospace;white-space:pre-wrap;margin:.4rem 0;max-height:24rem;
overflow:auto;unicode-bidi:isolate}
pre.prompt{color:var(--dim);border-left:3px solid var(--line);padding-left:.6rem}
dl{margin:.3rem 0}
dt{color:var(--dim)}
dd{margin:0 0 .5rem}
@media (max-width:40rem){body{padding:.5rem;font-size:15px}section{padding:.7rem}.wide{width:30%}.chart svg,.up{height:8rem}}
@media print{body{font-size:11px}pre{max-height:none}}
"""
