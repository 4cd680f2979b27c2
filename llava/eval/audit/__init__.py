"""Does a pruner read the question, find what is asked, and keep its promises, on *your* checkpoint?

python -m llava.eval.audit --model-path PATH [--hf] --pruner NAME ...
"""
