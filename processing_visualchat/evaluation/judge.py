"""
A judge model that scores open answers, behind an OpenAI-compatible address.

Each reply of the judge is kept in `judge.jsonl`, with the prompt and the model. A judge that does not answer is asked
again after a while, and one that answers in another form than asked for at once; if that does not help, the score is
missing, and counted as such. Answers to questions without a reference are not judged: it does not see the images.
"""

import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .answer_file import append, read_lines
from .metrics import EXTRA


JUDGMENTS = "judge.jsonl"
PROMPT = """\
You compare the answer of an assistant with a reference answer. The question was asked about images, which you do not \
see; the reference is right about them.

Question: {question}
Reference answer: {reference}
Answer of the assistant: {answer}

Say in one or two sentences what the answer gets right and wrong. Then write, on a line of its own, "Score: N", where \
N is a whole number from 0 (wrong, or not an answer) to 10 (as right and complete as the reference)."""
SCORE = re.compile(r"^\W*score\W*\s*(\d+(?:\.\d+)?)\s*(?:/\s*10)?\W*$", re.IGNORECASE | re.MULTILINE)


@dataclass(frozen=True)
class Judge:
    """
    Args:
        url (`str`): The base of the API, as `http://localhost:8000/v1`.
        model (`str`): The name of the model there.
        prompt (`str`, *optional*): With `{question}`, `{reference}` and `{answer}`; it asks for a line "Score: N".
        key_variable (`str`, *optional*, defaults to `"OPENAI_API_KEY"`): The environment variable that holds the key.
        attempts (`int`, *optional*, defaults to 3): How often it is asked for one score, if its replies have none.
        retries (`int`, *optional*, defaults to 5): How often a request is sent again that has no reply, or one of a
            server that is busy: after the seconds that the server asks for, or else from 0.5, doubled up to 8.
        timeout (`float`, *optional*, defaults to 60): Seconds to wait for a reply.
        max_parallel (`int`, *optional*, defaults to 8): Requests at the same time.
    """

    url: str
    model: str
    prompt: str = PROMPT
    key_variable: str = "OPENAI_API_KEY"
    attempts: int = 3
    retries: int = 5
    timeout: float = 60.0
    max_parallel: int = 8

    def score(self, lines: list[dict], folder: Path) -> dict[tuple[str, int], float | None]:
        """
        The scores, from 0 to 1, of all rounds with references, by conversation and number of the round; `None` for
        one that the judge did not give. Scores of `judge.jsonl` for the same prompt and model are not asked for again.

        Raises:
            `ImportError`: the package `openai` is not installed.
        """
        questions = [*self._questions(lines)]
        judged = read_lines(folder / JUDGMENTS)
        known = {_key(line): line["score"] for line in judged if line["score"] is not None}
        open_questions = [each for each in questions if _key(each) not in known]
        client = self._connect()
        with ThreadPoolExecutor(self.max_parallel) as pool:
            for line in pool.map(lambda each: self._ask(client, each), open_questions):
                append(folder / JUDGMENTS, [line])
                known[_key(line)] = line["score"]
        return {(each["id"], each["round"]): known.get(_key(each)) for each in questions}

    def _questions(self, lines: list[dict]) -> Iterator[dict[str, Any]]:
        for line in lines:
            for number, asked in enumerate(line["rounds"], 1):
                if asked["references"] and "fault" not in asked:
                    texts = {name: asked[name] for name in ("question", "answer")}
                    prompt = self.prompt.format(reference=" / or: ".join(asked["references"]), **texts)
                    yield {"id": line["id"], "round": number, "model": self.model, "prompt": prompt}

    def _connect(self) -> Any:
        try:
            from openai import OpenAI
        except ImportError as error:
            raise ImportError(f"A judge needs the package openai: {EXTRA}") from error
        key = os.environ.get(self.key_variable) or "none"  # a server of one's own asks for none
        return OpenAI(base_url=self.url, api_key=key, timeout=self.timeout, max_retries=self.retries)

    def _ask(self, client: Any, question: dict[str, Any]) -> dict[str, Any]:
        """A line of `judge.jsonl`: the question with all replies and faults, and the score or `None`."""
        from openai import OpenAIError

        replies: list[dict[str, str]] = []
        for _ in range(self.attempts):
            try:
                completion = client.chat.completions.create(
                    model=self.model, messages=[{"role": "user", "content": question["prompt"]}], temperature=0
                )
                text = (completion.choices[0].message.content or "") if completion.choices else ""
            except (OpenAIError, ValueError) as error:
                replies.append({"fault": f"{type(error).__name__}: {error}"[:500]})
                break
            found = SCORE.findall(text)
            score = float(found[-1]) / 10 if found else None
            if score is not None and score <= 1:
                return {**question, "replies": [*replies, {"text": text}], "score": score}
            replies.append({"text": text, "fault": 'no line "Score: N" with N from 0 to 10'})
        return {**question, "replies": replies, "score": None}


def _key(line: dict[str, Any]) -> tuple:
    return line["id"], line["round"], line["model"], line["prompt"]
