# Reads the command line of the release's last command; sourced by iterative_ensemble.sh and infer_all.sh.
# Sets config, output_dir, output_file, the members' score files and which of them were given, and
# the arrays uit (flags of uit.infer), fusion (of ensemble.run) and data (of every scoring command too).

config=configs/uit/infer.yaml task=cmp output_dir=output output_file=reproduce.txt
beit3_score=sims_score/score_beit3_reproduce.pt
blip2_score=sims_score/score_blip2_reproduce.pt
clip_score=sims_score/score_clip_reproduce.pt
uit=() fusion=() data=()
answers=false annotation=false given=""
while [ $# -gt 0 ]; do
    flag=${1%%=*}
    if [ "$flag" != "$1" ]; then
        value=${1#*=}
        shift
    elif [ $# -gt 1 ]; then
        value=$2
        shift 2
    else
        echo "error: $1: expected a value after it" >&2
        exit 2
    fi
    case $flag in
        --config) config=$value ;;
        --task) task=$value ;;
        --output_dir) output_dir=$value ;;
        --output_file) output_file=$value ;;
        --beit3_score) beit3_score=$value given+=" lhp" ;;
        --blip2_score) blip2_score=$value given+=" blip2" ;;
        --clip_score) clip_score=$value given+=" clip" ;;
        --beit3_weight | --blip2_weight | --clip_weight | --member | --save_score | --top_k)
            fusion+=("$flag" "$value") ;;
        --annotation | --answers | --query_order | --image_folder)
            data+=("$flag" "$value")
            if [ "$flag" = --answers ] && [ "$value" != none ]; then answers=true; fi
            if [ "$flag" = --annotation ]; then annotation=true; fi ;;
        --checkpoint | --model | --input_size | --window | --text_encoder | --max_words | \
            --max_text_length | --k_test | --cache_dtype | --cache_dir | --batch_size | \
            --num_workers | --device | --dtype)
            uit+=("$flag" "$value") ;;
        *)
            echo "error: $flag: unknown flag; this script takes those of uit.infer and ensemble.run" >&2
            exit 2 ;;
    esac
done
if [ "$task" != cmp ]; then
    echo "error: --task: expected cmp, found $task" >&2
    exit 2
fi
if $answers && ! $annotation; then # the scoring commands have it as their default, the fusion has none
    data+=(--annotation data/PAB/name-masked_test-set/query.json)
fi
