"""The paper's figures and maps of scores on a checkpoint, and their numbers as a CSV beside.

    python -m llava.eval.figures 3a --model-path P --pictures DIR --count 100 --output cosines.svg
    python -m llava.eval.figures maps --pictures DIR --questions "Is there a star?" "A sign?" --pruners script trim

docs/paper.md says what each shows, and what of it the paper leaves open.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from llava.eval.audit.library import LibrarySubject
from llava.eval.audit.ours import OurSubject
from llava.eval.figures import drawing, of_questions, of_runs, of_tokens
from llava.eval.figures.library_source import LibrarySource
from llava.eval.figures.patches import NEIGHBOURHOODS
from llava.eval.figures.sources import FEATURES, OurSource, Source
from llava.eval.measure.redundancy import PICTURES, SUFFIXES
from llava.eval.text import printable
from llava.model.builder import DEFAULT_CHECKPOINT, pick_device
from llava.pruning import parse_budget
from llava.serve import flags

OF_TOKENS: dict[str, Callable[..., of_tokens.Drawn]] = {
    "3a": of_tokens.cosine_by_distance,
    "3b": of_tokens.near_and_far,
    "3c": of_tokens.neighbour_map,
    "3d": of_tokens.entropy_map,
    "6": of_tokens.determinants,
    "9": of_tokens.masks,
}
OF_QUESTIONS: dict[str, Callable[..., of_tokens.Drawn]] = {
    "5": of_questions.four_maps,
    "7": of_questions.kept,
    "8": of_questions.score_maps,
    "maps": of_questions.score_maps,
}
OF_RUNS: dict[str, Callable[..., of_tokens.Drawn]] = {
    "2a": of_runs.bars,
    "2b": of_runs.radar,
    "sweep": of_runs.sweep,
}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval.figures", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    for name, draw in (OF_TOKENS | OF_QUESTIONS | OF_RUNS).items():
        summary = (draw.__doc__ or "").split("\n")[0]
        one = names.add_parser(name, help=summary, description=summary)
        one.add_argument("--output", type=Path, default=Path(f"figure-{name}.png"), help="picture (%(default)s)")
        if name in OF_RUNS:
            of_runs.add_command(name, one)
            continue
        _add_model(one)
        one.add_argument("--padding", action="store_true", help="tokens of padding take part as well")
        if name in OF_TOKENS:
            one.add_argument("--features", choices=FEATURES, default="projector", help="which (%(default)s)")
            _add_token_options(name, one)
        else:
            _add_question_options(name, one)
    return parser.parse_args(arguments)


def _add_model(parser: argparse.ArgumentParser) -> None:
    flags.add_checkpoint(parser)
    parser.add_argument("--hf", action="store_true", help="a model of the Transformers library's own classes")
    parser.add_argument("--clip-path", metavar="PATH", help="with --hf: the CLIP that the model's tower comes from")
    parser.add_argument("--siglip-path", metavar="PATH", help="folder of the full SigLIP that the tower comes from")
    parser.add_argument("--pictures", type=Path, metavar="DIR", default=PICTURES, help="default: the toy's POPE")
    parser.add_argument("--count", type=flags.at_least_one, metavar="N", help="the first N of them; default: all")
    flags.add_image_grid(parser)
    flags.add_device(parser)
    flags.add_dtype(parser)


def _add_token_options(name: str, parser: argparse.ArgumentParser) -> None:
    if name in ("3b", "6"):
        parser.add_argument("--seed", type=int, default=0, help="of what is drawn at random")
    if name == "3d":
        parser.add_argument("--neighbourhood", choices=sorted(NEIGHBOURHOODS), default="square")
        parser.add_argument("--bins", choices=("own", "global"), default="own", help="range of the bins: see Eq. 2")
    if name == "6":
        parser.add_argument("--set-size", type=int, default=of_tokens.SET_SIZE, metavar="K", help="tokens of a set")
    if name == "9":
        parser.add_argument("--tau", type=float, nargs="+", default=of_tokens.MASKS, help="a column each")


def _add_question_options(name: str, parser: argparse.ArgumentParser) -> None:
    several = {"nargs": 1} if name == "5" else {"nargs": "+"}
    parser.add_argument("--questions", required=True, metavar="TEXT", help="asked about every picture", **several)
    parser.add_argument("--keep-tokens", default="64", metavar="N", help="budget per view: a count or a share (64)")
    if name != "5":
        parser.add_argument("--pruners", nargs="+", default=["script"], metavar="NAME[:KEY=VALUE,...]")
    if name == "maps":
        parser.add_argument("--score", metavar="NAME", help="draw this one alone, such as relevance; default: all")


def load_source(options: argparse.Namespace) -> Source:
    """The model. Raises ValueError or OSError where it cannot be looked at."""
    device = pick_device(options.device)
    if options.hf:
        return LibrarySource(
            LibrarySubject(options.model_path, device, options.dtype, options.clip_path, options.siglip_path)
        )
    if options.clip_path:
        raise ValueError("--clip-path goes with --hf: a checkpoint of LLaVA's own format names its CLIP itself")
    grid = flags.parse_grid(options.image_grid) if options.image_grid else None
    loading = {"device": device, "dtype": options.dtype, "joint_space_path": options.siglip_path}
    return OurSource(OurSubject(options.model_path, grid=grid, **loading))


def draw(options: argparse.Namespace) -> of_tokens.Drawn:
    """Check all that can be checked, load the model, look at the pictures."""
    name = options.name
    if name in OF_RUNS:
        return OF_RUNS[name](options)
    if options.hf and options.model_path == DEFAULT_CHECKPOINT:
        raise ValueError("--hf needs --model-path: the toy is a checkpoint of LLaVA's own format")
    if options.hf and options.image_grid:
        raise ValueError("--image-grid is for checkpoints of LLaVA's own format; resize the pictures for --hf")
    methods = []
    if name in OF_QUESTIONS:
        options.keep_tokens = parse_budget(options.keep_tokens)
        if name == "8":
            options.score = "relevance"
        methods = of_questions.for_figure(name, options)
    pictures = of_tokens.open_pictures(options.pictures, options.count, SUFFIXES)
    source = load_source(options)
    if name in OF_TOKENS:
        return OF_TOKENS[name](source, pictures, options)
    source.check(methods)
    return OF_QUESTIONS[name](source, pictures, options, methods)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 if all went well, 2 with one line on standard error if it could not."""
    options = parse_arguments(arguments)
    warnings.simplefilter("once")  # a method says the same at every picture
    try:
        drawing.check_output(options.output)
        figure, header, rows = draw(options)
        drawing.save(figure, options.output, header, rows)
    except KeyboardInterrupt:
        print("stopped: nothing was written", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
