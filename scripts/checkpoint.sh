# Sourced by the benchmark scripts: sets `checkpoint` to $CKPT_DIR/$CKPT, by default checkpoints/$default, and says what
# to set where the default is not there and the arguments name no other. With CKPT_DIR it may be a name on the hub.
checkpoint=${CKPT_DIR:-checkpoints}/${CKPT:-$default}
if [ -z "${CKPT_DIR:-}" ] && [ ! -e "$checkpoint" ] && [[ " $* " != *" --model-path"[\ =]* ]]; then
    echo "$checkpoint is not there: set CKPT_DIR to the folder of your checkpoints and CKPT to one in it; the toy that comes" \
        "with the repository: CKPT_DIR=playground/toy CKPT=llava-toy-v1.5 DATA_DIR=playground/toy/data/eval" >&2
fi
