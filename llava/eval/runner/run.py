"""Ask a LLaVA checkpoint the questions of a benchmark, with N visual tokens kept per view, and write the answers.

A killed run continues where it was when the same command is given again. EVAL.md tells what each benchmark needs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import shortuuid
import torch
from accelerate import PartialState
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from llava.eval.benchmarks import BENCHMARKS, OUTPUT_ROOT, Question, load_questions, locate, run_tag
from llava.eval.files import require
from llava.eval.runner import completion, identity, journal, scoring
from llava.eval.runner.answering import Answerer, BrokenQuestion, Prepared, Stopwatch, prepared_batches
from llava.eval.runner.launch import barrier, is_launched, join_processes, run_processes
from llava.eval.runner.loading import Checkpoint
from llava.eval.text import printable
from llava.model.builder import pick_device
from llava.serve import flags

OWN_SECTION = "Your own questions"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m llava.eval.run", description=__doc__)
    what = parser.add_argument_group("what is asked")
    what.add_argument("--benchmark", choices=sorted(BENCHMARKS), help="sets files, places and the answers' length")
    what.add_argument("--question-file", type=Path, help="JSON lines with question_id, image, text")
    what.add_argument("--image-folder", type=Path, help="folder of the pictures")
    what.add_argument("--answers-file", type=Path, help="where answers go; default: by benchmark, checkpoint and tag")
    what.add_argument("--data-root", type=Path, default=OUTPUT_ROOT, help="images and annotations (%(default)s)")
    what.add_argument("--output-root", type=Path, default=OUTPUT_ROOT, help="answers and scores (%(default)s)")
    what.add_argument("--limit", type=flags.at_least_one, metavar="K", help="only the first K questions")
    model = parser.add_argument_group("who is asked")
    flags.add_checkpoint(model)
    flags.add_base(model)
    flags.add_template(model)
    flags.add_method(model)
    flags.add_image_grid(model)
    model.add_argument("--max-new-tokens", type=flags.at_least_one, help="default: as the benchmark has it, else 128")
    model.add_argument("--seed", type=int, default=0, help="of random methods; another seed is another run")
    flags.add_device(model)
    flags.add_dtype(model)
    flags.add_attention(model)
    how = parser.add_argument_group("how")
    how.add_argument("--batch-size", type=int, default=1, help="questions at once (%(default)s)")
    how.add_argument("--workers", type=int, default=2, help="threads that prepare pictures (%(default)s)")
    how.add_argument("--processes", type=int, help="default: one per visible GPU, or 1")
    how.add_argument("--tag", help="name of the run; default: vtn_<tokens per picture>")
    how.add_argument("--on-error", choices=("stop", "skip"), default="stop", help="at a missing or broken picture")
    how.add_argument("--overwrite", action="store_true", help="delete old answers and begin anew")
    how.add_argument("--score", action="store_true", help="score the answers afterwards")
    return parser.parse_args(arguments)


class Run:
    """A run as asked for: everything checked and named, nothing loaded yet.

    Raises:
        ValueError, OSError: options that do not fit, files that are missing; before anything heavy.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.benchmark = BENCHMARKS.get(options.benchmark)
        if self.benchmark is None and not (options.question_file and options.answers_file):
            raise ValueError("give --benchmark, or --question-file and --answers-file of your own")
        if min(options.batch_size, options.workers, options.processes or 1) < 1:
            raise ValueError("--batch-size, --workers and --processes start at 1")
        if options.tag is not None and Path(options.tag).name != options.tag:
            raise ValueError(f"--tag is a name, not a path; got {options.tag!r}")
        self.pruner = flags.make_pruner(options.pruner, options.keep_tokens, options.pruner_args, options.seed)
        self.device = pick_device(options.device)
        self.grid = flags.parse_grid(options.image_grid) if options.image_grid else None
        self.checkpoint = Checkpoint(options.model_path, options.model_base, grid=self.grid)
        config = self.checkpoint.check(self.pruner)
        self.model_name = self.checkpoint.name
        self.conversation = options.conv_mode or self.checkpoint.template()
        self.question_file = self._question_file()
        self.image_folder = self._image_folder()
        self.questions = load_questions(options.benchmark, self.question_file, self.image_folder)[: options.limit]
        if not self.questions:
            raise ValueError(f"{self.question_file} holds no questions")
        self.answers_file = self._answers_file(tiled=getattr(config, "image_aspect_ratio", None) == "anyres")
        self._check_answers_file()
        self.folder = journal.run_folder(self.answers_file)
        self.max_new_tokens = options.max_new_tokens or (self.benchmark.max_new_tokens if self.benchmark else 128)
        if options.on_error == "stop":
            self._check_images()
        if options.score:
            if self.benchmark is None:
                raise ValueError("--score needs --benchmark: questions of your own have no scorer")
            scoring.check_files(options.benchmark, self.question_file, options.data_root, options.output_root)

    def _question_file(self) -> Path:
        if self.options.question_file is not None:
            return require(self.options.question_file, self.benchmark.section if self.benchmark else OWN_SECTION)
        return self.benchmark.find_questions(self.options.data_root, self.options.output_root)

    def _image_folder(self) -> Path | None:
        if self.options.image_folder is not None or self.benchmark is None:
            return self.options.image_folder
        if not self.benchmark.image_folder:
            return None
        roots = [self.options.data_root, self.options.output_root]
        place = f"{self.benchmark.folder}/{self.benchmark.image_folder}"
        return locate(roots, place, self.benchmark.section, "folder")

    def _answers_file(self, tiled: bool) -> Path:
        options = self.options
        if options.answers_file is not None:
            return options.answers_file
        budget = None if self.pruner is None else self.pruner.keep_tokens
        tag = options.tag or run_tag(budget, tiled, options.pruner, options.pruner_args, options.seed, self.grid)
        if options.limit is not None and options.tag is None:
            tag += f"-first{options.limit}"
        return self.benchmark.answers_file(options.output_root, self.question_file, self.model_name, tag)

    def _check_answers_file(self) -> None:
        """Answers must not be written over what is read."""
        written = os.path.realpath(self.answers_file)
        if written == os.path.realpath(self.question_file):
            raise ValueError(f"--answers-file and --question-file are the same file, {self.question_file}")
        if os.path.isdir(written):
            raise ValueError(f"--answers-file {self.answers_file} is a folder: name a file in it")
        named = (q.image for q in self.questions if q.image and q.image.name == self.answers_file.name)
        if any(os.path.realpath(image) == written for image in named):
            raise ValueError(f"--answers-file {self.answers_file} is a picture that is asked about")

    def _check_images(self) -> None:
        section = self.benchmark.section if self.benchmark else OWN_SECTION
        faulty = [question for question in self.questions if question.fault]
        if faulty:
            raise ValueError(
                f"{len(faulty)} of {len(self.questions)} questions of {self.question_file} cannot be asked, first "
                f"question {faulty[0].question_id}: {faulty[0].fault}; --on-error skip leaves such questions out"
            )
        lost = [question for question in self.questions if question.image and not question.image.is_file()]
        if lost:
            raise FileNotFoundError(
                f"{len(lost)} of {len(self.questions)} questions have no picture, first question "
                f"{lost[0].question_id}: no file at {lost[0].image.absolute()}; EVAL.md, section {section!r}, says "
                "where to get it; --on-error skip leaves such questions out"
            )

    def settings(self) -> dict[str, Any]:
        """Everything that can change an answer."""
        options = self.options
        return {
            "benchmark": options.benchmark,
            "questions": identity.questions_identity(self.questions, self.image_folder),
            "limit": options.limit,
            "image_folder": None if self.image_folder is None else str(self.image_folder.resolve()),
            "model": self.model_name,
            "checkpoint": identity.checkpoint_identity(options.model_path, options.model_base),
            "conversation": self.conversation,
            "pruner": None if self.pruner is None else {"name": self.pruner.name, **asdict(self.pruner)},
            "image_grid": self.grid,
            "max_new_tokens": self.max_new_tokens,
            "seed": options.seed,
            "dtype": options.dtype,
            "attention": options.attn_implementation,
            "batch_size": options.batch_size,
            "device": identity.device_name(self.device),
            **identity.code_of(self.pruner),
            "libraries": identity.library_versions(),
        }

    def record(self, processes: int) -> dict[str, Any]:
        """What is worth knowing of a run, but changes no answer."""
        return {
            "started": time.strftime("%Y-%m-%d %H:%M:%S"),
            "commit": identity.commit(),
            "options": {name: str(value) for name, value in vars(self.options).items()},
            "processes": processes,
            "workers": self.options.workers,
            "question_file": str(self.question_file),
            "data_root": str(self.options.data_root),
            "output_root": str(self.options.output_root),
        }

    def load(self, device: str) -> Answerer:
        """Load the checkpoint on ``device``."""
        options = self.options
        answerer = self.checkpoint.load(
            self.pruner,
            self.conversation,
            device=device,
            dtype=options.dtype,
            attn_implementation=options.attn_implementation,
        )
        answerer.max_new_tokens = self.max_new_tokens
        return answerer


def begin(run: Run, processes: int) -> bool:
    """Make the run's folder ready, under its lock; False if there is nothing left to do.

    Raises:
        RunRefused: old answers with other settings, or about other pictures, or no longer what the run wrote.
    """
    if run.options.overwrite:
        completion.discard(run.answers_file, run.folder)
    settings = run.settings()
    known = journal.check_settings(run.folder, settings)
    if run.answers_file.exists():
        if known is None:
            raise journal.RunRefused(f"{run.answers_file} exists, but not by this runner: --overwrite deletes it")
        completion.check_complete(run.answers_file, run.folder)
        return False
    known = known or journal.save_settings(run.folder, settings, run.record(processes))
    found = journal.read_journals(run.folder, known)
    found.report()
    completion.check_pictures([row["picture"] for row in found if row.get("picture")])
    return True


def work(run: Run, answerer: Answerer, pending: Sequence[int], turns: journal.Turns, book: journal.Journal) -> None:
    """Answer questions at positions of ``pending`` as long as there are ``turns``, and journal them.

    Raises:
        BrokenQuestion: a picture that cannot be read, unless such questions are to be skipped.
    """
    # Shown by the main process for all: turns come in order, so what lies before its own place is done as well.
    bar = tqdm(total=len(pending), unit="question", disable=not PartialState().is_main_process, smoothing=0.05)
    watch = Stopwatch(answerer.model.device)
    members = ([pending[place] for place in turn] for turn in turns)
    for batch in prepared_batches(answerer.prepare, run.questions, members, run.options.workers):
        broken = [item for item in batch if item.fault]
        if broken and run.options.on_error == "stop":
            raise BrokenQuestion(f"{broken[0].fault}; --on-error skip leaves such questions out")
        asked = [item for item in batch if not item.fault]
        answers, seconds = watch.time(answerer.answer, asked) if asked else ([], 0.0)
        entries = [entry_of(run, item, *answer) for item, answer in zip(asked, answers, strict=True)]
        for item, entry in zip(asked, entries, strict=True):
            entry |= {"seconds": seconds / len(entries), "picture": item.picture}
        entries += [
            {"position": item.position, "question_id": item.question.question_id, "skipped": item.fault}
            for item in broken
        ]
        elapsed = watch.elapsed
        book.append([entry | {"elapsed": elapsed} for entry in entries])
        bar.update(bisect_right(pending, batch[-1].position) - bar.n)
    bar.update(len(pending) - bar.n)
    bar.close()


def entry_of(run: Run, item: Prepared, text: str, tokens: dict[str, float] | None) -> dict:
    """The journal's line of an answer; its id depends on run and position alone, so that resuming changes nothing."""
    question: Question = item.question
    answer = {
        "question_id": question.question_id,
        "prompt": question.prompt,
        "text": text,
        "answer_id": shortuuid.uuid(f"{run.model_name}/{run.answers_file.name}/{item.position}/{text}"),
        "model_id": run.model_name,
        "metadata": {},
        **question.extra,
    }
    if "round_id" in answer:
        order = (
            "question_id",
            "round_id",
            "prompt",
            "text",
            "options",
            "option_char",
            "answer_id",
            "model_id",
            "metadata",
        )
        answer = {name: answer[name] for name in order}
    return {"position": item.position, "tokens": tokens, "answer": answer}


def execute(run: Run) -> None:
    """Do this process's share of the run; the main process begins and ends it."""
    state = join_processes(run.device)
    main, folder = state.is_main_process, run.folder
    with contextlib.ExitStack() as held:
        if main:
            held.enter_context(journal.hold(folder / "lock"))
            with journal.hold(folder / "workers.lock"):  # nobody left over from a killed run
                needed = begin(run, state.num_processes)
        barrier(state)
        if not main:
            held.enter_context(journal.hold(folder / "workers.lock", shared=True))
            needed = not run.answers_file.exists()
        if needed:
            answer_share(run, state)
        elif main:
            print(f"already complete, nothing to do: {run.answers_file} (--overwrite asks again)")
            if (folder / "skipped.jsonl").is_file():
                print(f"it skipped questions: {folder / 'skipped.jsonl'}")
        if main and run.options.score:
            scoring.score_file(run.options.benchmark, run.answers_file, run.options.data_root, run.options.output_root)


def answer_share(run: Run, state: PartialState) -> None:
    """Answer the questions that fall to this process; the main process then puts all answers together."""
    main, folder = state.is_main_process, run.folder
    known = journal.identity_of(folder)
    done = journal.by_position(journal.read_journals(folder, known))
    session = f"{journal.sessions(folder):03d}"
    pending = [position for position in range(len(run.questions)) if position not in done]
    turns = journal.Turns(folder / "journal" / f"{session}.next", len(pending), run.options.batch_size)
    if main:
        turns.reset()
        if done:
            print(f"going on: {len(done)} of {len(run.questions)} questions are answered")
    if pending:
        torch.manual_seed(run.options.seed)
        answerer = run.load(str(state.device) if run.device == "cuda" else run.device)
        barrier(state)  # nobody appends before everybody has read, and all times begin here
        book = journal.Journal(folder / "journal" / f"{session}_{state.process_index}.jsonl", known)
        work(run, answerer, pending, turns, book)
        book.close()
    barrier(state)
    if main:
        chunked = run.benchmark is not None and run.benchmark.chunked and run.options.answers_file is None
        summary = completion.finish(
            run.answers_file,
            folder,
            known,
            len(run.questions),
            state.num_processes if chunked else None,
            {"processes": state.num_processes},
        )
        report_summary(run, summary)


def report_summary(run: Run, summary: dict) -> None:
    rate = summary["questions"] / summary["wall_seconds"] if summary["wall_seconds"] else 0.0
    skipped = f", {summary['skipped']} SKIPPED (see {run.folder / 'skipped.jsonl'})" if summary["skipped"] else ""
    print(
        f"{summary['questions']} questions{skipped} in {summary['wall_seconds']:.1f} s, {rate:.2f} per second; "
        f"{summary['visual_tokens']:.1f} visual tokens per picture, {summary['newline_tokens']:.1f} newlines beside"
    )
    print(f"answers: {run.answers_file}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 if all went well, 2 with one line on standard error if it could not."""
    options = parse_arguments(arguments)
    disable_progress_bar()  # one bar, that of the questions
    try:
        run = Run(options)
        devices = torch.cuda.device_count() if run.device == "cuda" else None
        processes = options.processes or devices or 1
        if devices is not None and not is_launched() and processes > devices:
            raise ValueError(f"{processes} processes need a GPU each, but {devices} can be used here")
        if processes > 1 and not is_launched():
            return run_processes("llava.eval.run", sys.argv[1:] if arguments is None else arguments, processes)
        execute(run)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
