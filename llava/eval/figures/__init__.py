"""The paper's figures and maps of scores, with their numbers: ``python -m llava.eval.figures NAME``.

patches.py     the mathematics: cosines by distance, entropy, masks, determinants
sources.py     tokens and scores of a picture as grids of the views that our own LLaVA sees
library_source.py   the same of a class of the Transformers library
scores.py      which scores a method has
drawing.py     matplotlib, and the CSV beside a picture
of_tokens.py   Figures 3, 6 and 9: what the tokens of pictures are like
of_questions.py   Figures 5, 7 and 8 and the maps: what a question makes of them
of_runs.py     Figure 2 and the sweeps: scores of benchmarks
command.py     the command line
"""
