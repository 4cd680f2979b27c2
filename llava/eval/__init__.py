"""Evaluation, in rooms: what asks, what is asked, lmms-eval, what makes tables, what measures.

    runner/       asks a checkpoint the questions of a benchmark, keeps the answers, has them scored
    benchmarks/   one file a benchmark
    lmms_eval/    our models for lmms-eval, and its launcher
    tables/       the report: rows of methods and budgets, the paper's tables, paired tests
    figures/      the paper's figures, and maps of scores
    measure/      time, work and memory

The modules here are the commands, ``python -m llava.eval.run`` and the others; each calls the `main` of its room.
"""
