#!/usr/bin/env bash
# On a bare machine: environment, installation, two questions about one picture with 576, 64 and 16 of its tokens, the
# pictures of what was kept, and a table of two benchmarks at three budgets. Everything it writes is in
# playground/quickstart.
set -euo pipefail
cd "$(dirname "$0")/.."
echo "--- 1 of 4: the environment (the first time: some minutes, mostly PyTorch's download)"
source scripts/environment.sh
export HF_HUB_OFFLINE=1
out=playground/quickstart
scene=playground/toy/data/eval/pope/val2014/COCO_val2014_000000910001.jpg
mkdir -p "$out"
echo "--- 2 of 4: two questions about one picture, with all, 64 and 16 of its 576 visual tokens"
for keep in full 64 16; do
    echo "keep-tokens $keep"
    python -m llava.serve.cli --image-file "$scene" --keep-tokens "$keep" \
        --query "What color is the star?" "Is there a yellow cup in the image?" --show-tokens "$out/kept-$keep.png"
done
echo "--- 3 of 4: two benchmarks at three budgets, first 60 questions each (a minute or two)"
export CKPT_DIR=playground/toy CKPT=llava-toy-v1.5 DATA_DIR=playground/toy/data/eval
for benchmark in gqa textvqa; do
    for keep in full 64 16; do
        echo "$benchmark, keep-tokens $keep"
        bash "scripts/v1_5/eval/$benchmark.sh" "$keep" --limit 60 --output-root "$out" > "$out/$benchmark-$keep.txt"
    done
done
echo "--- 4 of 4: the table"
python -m llava.eval.report "$out"/*/answers/*/"$CKPT"/*.run
cat <<END
--- done. Next:
look at             $out/kept-16.png (the tokens that answered)
chat                script-llava chat --image-file $scene --keep-tokens 16
another method      script-llava chat --image-file $scene --keep-tokens 16 --pruner divprune
your own checkpoint script-llava chat --model-path FOLDER --image-file PICTURE --keep-tokens 64
(in this shell first: source $VENV/bin/activate)
END
