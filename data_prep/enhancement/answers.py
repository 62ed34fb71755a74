"""Answers of a language model to questions about mentions: asked side by side, kept as they come, each asked once."""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from string import Formatter

from data_prep.enhancement.choosers import Chooser, Question
from data_prep.enhancement.endpoint import Endpoint
from dsmip.errors import UserError
from dsmip.progress import Progress, counting, no_progress
from dsmip.storage.atomic import naming_full_disk

PROMPT = """A sentence mentions "{word}". Which of these descriptions is of what it means there?

Sentence: {sentence}

{candidates}

Answer with the number of one description and nothing else, or with 0 if none of them fits."""
_FIELDS = ("word", "sentence", "candidates")
_SHOWN = 300  # characters of a description in a question
_JUDGED_AFTER = 10  # answers: a model that mostly says no number is found out early


class AnswerFile:
    """The answers that are known, in a file that grows by a line with each.

    A line has the question's digest, its mention's id and word, the model's words, and the number found in them (null:
    none, and the question is asked again in the next run).
    """

    def __init__(self, path: Path) -> None:
        """Reads what is there; a line that a killed process left unfinished is cut off."""
        self.path = path
        self.choices: dict[str, int] = {}
        content = path.read_bytes() if path.is_file() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with path.open("r+b") as stream:
                stream.truncate(len(whole))
        for line in whole.splitlines():
            try:
                record = json.loads(line)
                if isinstance(record["choice"], int):
                    self.choices[str(record["question"])] = record["choice"]
            except (ValueError, LookupError, TypeError, RecursionError):
                raise UserError(f"{path} is damaged; remove it, and its questions are asked again") from None

    def add(self, digest: str, question: Question, answer: str, choice: int | None) -> None:
        """Keeps an answer."""
        about = {"question": digest, "mention_id": question.mention_id, "word": question.word}
        line = json.dumps({**about, "answer": answer, "choice": choice}) + "\n"  # ASCII: half surrogates are escaped
        with naming_full_disk(self.path.parent), self.path.open("a", encoding="ascii") as stream:
            stream.write(line)
        if choice is not None:
            self.choices[digest] = choice


def by_endpoint(endpoint: Endpoint, prompt: str, path: Path, progress: Progress = no_progress) -> Chooser:
    """Asks a model for each question that has several candidates; a single candidate is taken.

    Questions that it gives no number to get no candidate.

    Args:
        endpoint: Whom to ask.
        prompt: Checked by `check_prompt`.
        path: The file of answers: those in it are known, new ones are added.
        progress: Told how many are answered.
    """

    def choose(questions: Sequence[Question]) -> Iterable[int | None]:
        answers = AnswerFile(path)
        texts = {question.mention_id: _text(question, prompt) for question in questions if len(question.candidates) > 1}
        digests = {name: _digest(endpoint.options.model, text) for name, text in texts.items()}
        open_ones = {
            digests[question.mention_id]: question
            for question in questions
            if question.mention_id in texts and digests[question.mention_id] not in answers.choices
        }
        _ask_all(endpoint, open_ones, texts, answers, progress)
        for question in questions:
            if len(question.candidates) < 2:
                yield 0 if question.candidates else None
                continue
            number = answers.choices.get(digests[question.mention_id], 0)
            yield number - 1 if number else None

    return choose


def _ask_all(
    endpoint: Endpoint,
    questions: dict[str, Question],
    texts: dict[str, str],
    answers: AnswerFile,
    progress: Progress,
) -> None:
    add = counting(progress, "answers", len(questions))
    waiting = list(questions.items())[::-1]
    asked: dict[Future[str], tuple[str, Question]] = {}
    useless, answered = list[str](), 0
    pool = ThreadPoolExecutor(endpoint.options.at_once)
    try:
        while waiting or asked:
            while waiting and len(asked) < endpoint.options.at_once:
                digest, question = waiting.pop()
                asked[pool.submit(endpoint.ask, texts[question.mention_id])] = (digest, question)
            failed: BaseException | None = None
            for done in wait(asked, return_when=FIRST_COMPLETED).done:
                digest, question = asked.pop(done)
                if (error := done.exception()) is not None:
                    failed = failed or error  # the others' answers are kept first
                    continue
                answer, answered = done.result(), answered + 1
                choice = number_in(answer, len(question.candidates))
                if choice is None:
                    useless.append(answer)
                answers.add(digest, question, answer, choice)
                add(1)
            if failed is not None:
                raise failed
            if answered >= min(_JUDGED_AFTER, len(questions)) and 2 * len(useless) > answered:
                raise UserError(
                    f"endpoint {endpoint.address}: {len(useless)} of {answered} answers name no candidate by number, "
                    f"such as {' '.join(useless[-1].split())[:80]!r}; choose another --model or --prompt"
                )
    finally:
        endpoint.stop()
        pool.shutdown(wait=False, cancel_futures=True)


def number_in(answer: str, count: int) -> int | None:
    """The number that an answer begins with, or the only one in it; None where there is none from 0 to `count`."""
    found = re.match(r"\W*(\d{1,6})\b", answer)
    numbers = [found[1]] if found else re.findall(r"\b\d{1,6}\b", answer)
    if len(set(numbers)) != 1 or int(numbers[0]) > count:
        return None
    return int(numbers[0])


def check_prompt(prompt: str, source: str) -> None:
    """Checks that a prompt names what it must.

    Raises:
        UserError: It has an unknown field, or lacks one.
    """
    try:
        used = {name for _, name, _, _ in Formatter().parse(prompt) if name is not None}
        if used == set(_FIELDS):
            prompt.format(**dict.fromkeys(_FIELDS, ""))
            return
    except (ValueError, LookupError):
        pass
    names = ", ".join(f"{{{name}}}" for name in _FIELDS)
    raise UserError(f"{source}: a prompt has each of {names}, and no other field; write braces as {{{{ and }}}}")


def _text(question: Question, prompt: str) -> str:
    lines = (
        f"{number}. {each.description.name}: {each.description.text[:_SHOWN]}"
        for number, each in enumerate(question.candidates, start=1)
    )
    return prompt.format(word=question.word, sentence=question.sentence, candidates="\n".join(lines))


def _digest(model: str, text: str) -> str:
    return hashlib.sha256(f"{model}\0{text}".encode("utf-8", "surrogatepass")).hexdigest()[:32]
