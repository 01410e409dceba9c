"""The report of runs: one HTML page with their curves, pictures, clips and arguments, made from the files of their folders.

`python -m fastvideo.report RUN`: read.py reads a folder, charts.py draws, media.py embeds, page.py puts it together.
"""
