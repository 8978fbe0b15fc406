"""The style sheet of the report's page: for a desk and a phone, light and dark."""

from __future__ import annotations

__all__ = ["STYLE"]

STYLE = """
:root { color-scheme: light dark; --paper: #fbfaf8; --card: #fff; --ink: #1d2126; --soft: #5f6872; --rule: #dfe2e6;
  --hot: #c8501e; --warm: #d99a00; --cold: #1f6fb2; --computed: #a3a9b0; --good: #2d7d46; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #15181c; --card: #1d2126; --ink: #e9ebee; --soft: #a2abb5; --rule: #343a42;
    --hot: #ff8552; --warm: #f2bd42; --cold: #62b0ee; --computed: #737b85; --good: #6fcf8d; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 20px 16px 48px; }
h1 { font-size: 1.6rem; margin: 0 0 4px; } h2 { font-size: 1.1rem; margin: 0 0 4px; }
p { margin: 0 0 10px; max-width: 72ch; } .soft, figcaption { color: var(--soft); font-size: .9rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 18px 0; }
.tile, section { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 14px 16px; }
.tile b { display: block; font-size: 1.45rem; font-variant-numeric: tabular-nums; line-height: 1.25; }
.grid2 { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 16px; }
section { margin: 0; min-width: 0; } section + .grid2, .stack > section { margin-top: 16px; }
svg { display: block; width: 100%; height: auto; } figure { margin: 0; }
svg text { font-family: system-ui, sans-serif !important; fill: var(--soft); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: right; padding: 5px 8px; border-bottom: 1px solid var(--rule); font-variant-numeric: tabular-nums;
  white-space: nowrap; }
th { color: var(--soft); font-weight: 600; } th:first-child, td:first-child { text-align: left; }
.advice { border-left: 4px solid var(--good); padding-left: 12px; margin: 10px 0; } code { font-size: .92em; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 14px; margin: 8px 0 0; font-size: .9rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 720px) { .grid2 { grid-template-columns: minmax(0, 1fr); } main { padding: 14px 12px 32px; }
  .tile, section { padding: 12px; } td:first-child { white-space: normal; min-width: 7em; }
  .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); } }
"""
