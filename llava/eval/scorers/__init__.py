"""The scores of the ten image benchmarks, each a pure function from answers and annotations to a dictionary.

Every result has "score", the number that tables print (percent, or points for MME and MM-Vet), "metric", its name, and
"items", the contribution of every question by id where there is one; the rest are breakdowns. Definitions: EVAL.md.
"""
