"""The page: runs as one HTML file that opens without a network.

vipbench report DIR [DIR ...] --out report.html

    entries.py  files of run directories  ->  entries
    summary.py  entries  ->  tables of cells;  charts.py  tables and logs of steps  ->  geometry of SVG
    samples.py  predictions  ->  samples of each run, with thumbnails;  cards.py  a run and images  ->  diagnosis cards
    evidence.py the symptom sets that runs read, with their scores
    build.py    all of it  ->  page.html.jinja2, run.html.jinja2, page.css and page.js  ->  the file
"""
